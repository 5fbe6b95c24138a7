"""Asks a person for an answer by the number of the node, as choosers of pictures do; a route brings it."""

from __future__ import annotations

import time

from aiohttp import web
from comfy.model_management import throw_exception_if_processing_interrupted
from server import PromptServer


class Answers:
    """One for all: who waits, and what came."""

    asking = None
    latest = None
    kept = {}

    @classmethod
    def ask(cls, number):
        cls.asking, cls.latest = number, None
        while cls.latest is None:
            throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        cls.asking = None
        return cls.latest


@PromptServer.instance.routes.post("/test_packs/answer_by_number")
async def answer(request):
    data = await request.json()
    if Answers.asking != data["number"] or Answers.latest is not None:
        return web.json_response({}, status=404)
    Answers.latest = data["answer"]
    return web.json_response({})


class PackAsksByNumber:
    """Returns the answer."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}, "hidden": {"id": "UNIQUE_ID"}}

    def work(self, number, id):
        return (Answers.ask(id),)


NODE_CLASS_MAPPINGS = {"PackAsksByNumber": PackAsksByNumber}
