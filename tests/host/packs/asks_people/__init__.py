"""Waits in a module's dict for an answer that a route puts there, as choosers do: this must stay one for all."""

from __future__ import annotations

import time

from aiohttp import web
from server import PromptServer

waiting = {}


class Choices:
    answers = {}
    asked = set()


@PromptServer.instance.routes.post("/test_packs/answer")
async def answer(request):
    body = await request.json()
    if body["question"] not in waiting or body["question"] not in Choices.asked:
        return web.json_response({"error": "nobody waits for this"}, status=404)
    waiting[body["question"]] = body["answer"]
    Choices.answers[body["question"]] = body["answer"]
    return web.json_response({})


class PackAsks:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "ask"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"question": ("STRING", {})}}

    def ask(self, question):
        waiting[question] = None
        Choices.asked.add(question)
        end = time.monotonic() + 30
        while waiting[question] is None or question not in Choices.answers:
            if time.monotonic() > end:
                raise TimeoutError(f"nobody answered {question}")
            time.sleep(0.01)
        Choices.asked.discard(question)
        return (f"{waiting.pop(question)} {Choices.answers.pop(question)}",)


NODE_CLASS_MAPPINGS = {"PackAsks": PackAsks}
