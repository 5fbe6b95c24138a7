"""What tests ask about shared weights, by HTTP."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from aiohttp import web
from server import PromptServer


def digests() -> dict[str, list[str]]:
    """Of each weight file, hashes of the memory that the slots' models share: its content, and its conversions."""
    import torch
    from comfy_parallel.weights import loading
    from comfy_parallel.weights.memory import Region, Span

    def digest(region: Region) -> str:
        size = getattr(region, "used", region.size)
        data: Any = region.tensor(Span.contiguous(0, torch.uint8, (size,))).numpy()
        return hashlib.sha256(data).hexdigest()

    store = loading.store()
    assert store is not None
    return {file.path: [digest(region) for region in file.regions()] for file in store.files()}


@PromptServer.instance.routes.get("/test/weights")
async def weights(request: web.Request) -> web.Response:
    return web.json_response(digests() if "comfy_parallel.weights.store" in sys.modules else {})
