"""A custom node pack that tells, on `GET /dump`, what this process looks like from inside.

`CPT_TARGETS` is a JSON list of attributes, written `module:path`. The pack imports nothing of comfy_parallel.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import marshal
import os
import sys
import threading
from types import CodeType, ModuleType
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def dump() -> dict[str, Any]:
    targets = json.loads(os.environ.get("CPT_TARGETS", "[]"))
    return {
        "targets": {target: described(*located(target)) for target in targets},
        "namespaces": {name: namespace(name) for name in sorted({target.partition(":")[0] for target in targets})},
        "module_classes": {
            name: qualified(type(module))
            for name, module in sys.modules.items()
            if isinstance(module, ModuleType) and type(module) is not ModuleType
        },
        "modules": sorted(sys.modules),
        "meta_path": [
            finder.__qualname__ if isinstance(finder, type) else qualified(type(finder)) for finder in sys.meta_path
        ],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "scheduler": scheduler(),
    }


def dump_server(server: Any) -> dict[str, Any]:
    return {
        "middlewares": [described(middleware) for middleware in server.app.middlewares],
        "routes": sorted({(route.method, route.resource.canonical) for route in server.app.router.routes()}),
        "queue": [qualified(cls) for cls in type(server.prompt_queue).__mro__],
        "attributes": sorted(vars(server)),
    }


def located(target: str) -> tuple[Any, ...]:
    """The attribute as its owner stores it, or nothing."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = sys.modules[module]
        for parent in parents:
            owner = getattr(owner, parent)
        return (inspect.getattr_static(owner, name),)
    except (AttributeError, KeyError):
        return ()


def described(*values: Any) -> list[Any] | None:
    """Type, module, qualified name and code of a value; None for no value."""
    if not values:
        return None
    value = getattr(values[0], "__func__", values[0])
    own = vars(type(value))
    names = [
        getattr(value, name, None) if name in dir(type(value)) else None for name in ("__module__", "__qualname__")
    ]
    code = value.__code__ if "__code__" in own and isinstance(value.__code__, CodeType) else None
    return [qualified(type(values[0])), *map(str, names), code and code_digest(code)]


def code_digest(code: CodeType) -> str:
    """The same for the same function in another copy of its file."""
    return hashlib.sha256(marshal.dumps(relocated(code))).hexdigest()


def relocated(code: CodeType) -> CodeType:
    constants = tuple(relocated(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_filename="", co_consts=constants)


def namespace(module: str) -> dict[str, Any]:
    return (
        {name: described(value) for name, value in vars(sys.modules[module]).items()} if module in sys.modules else {}
    )


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def scheduler() -> list[Any] | None:
    """Whether the scheduler is on and how many slots there are; None where it was never imported."""
    start, slot = sys.modules.get("comfy_parallel.install"), sys.modules.get("comfy_parallel.slots.slot")
    return None if start is None or slot is None else [start._patches is not None, len(slot.slots())]


def add_route() -> None:
    from aiohttp import web
    from server import PromptServer

    server = PromptServer.instance

    @server.routes.get("/dump")
    async def get_dump(request: web.Request) -> web.Response:
        return web.json_response({**dump(), **dump_server(server)})


if "server" in sys.modules:
    add_route()
