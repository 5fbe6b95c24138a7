"""What a pack's wrappers have seen, for the tests."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from server import PromptServer

SEEN: list[tuple[str, Any]] = []
SERVER = PromptServer.instance
QUEUE = SERVER.prompt_queue
NODE_CLASS_MAPPINGS: dict[str, Any] = {}


def saw(method: str, prompt_id: Any) -> None:
    SEEN.append((method, prompt_id))


@SERVER.routes.get("/pack/seen")
async def seen(request: web.Request) -> web.Response:
    return web.json_response(SEEN)


def id_of(result: Any) -> Any:
    return None if result is None else result[0][1]


def wrap_object(queue: Any) -> None:
    """Functions in the place of the object's methods, which call those."""
    get, put, task_done = queue.get, queue.put, queue.task_done
    wipe, delete, current = queue.wipe_queue, queue.delete_queue_item, queue.get_current_queue

    def seen_get(timeout: float | None = None) -> Any:
        result = get(timeout)
        saw("get", id_of(result))
        return result

    def seen_put(item: Any) -> None:
        saw("put", item[1])
        put(item)

    def seen_task_done(item_id: int, *args: Any, **kwargs: Any) -> None:
        running = queue.currently_running.get(item_id)
        task_done(item_id, *args, **kwargs)
        saw("task_done", running[1])

    def seen_wipe() -> None:
        saw("wipe_queue", None)
        wipe()

    def seen_delete(function: Any) -> Any:
        saw("delete_queue_item", None)
        return delete(function)

    def seen_current() -> Any:
        saw("get_current_queue", None)
        return current()

    queue.get, queue.put, queue.task_done = seen_get, seen_put, seen_task_done
    queue.wipe_queue, queue.delete_queue_item, queue.get_current_queue = seen_wipe, seen_delete, seen_current
