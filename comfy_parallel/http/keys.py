"""`Idempotency-Key`: a client that does not know whether its request has arrived may send it again."""

from __future__ import annotations

import hashlib
import re

from aiohttp import web

from comfy_parallel.core.scope import RequestKey
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest

HEADER = "Idempotency-Key"


async def request_key(request: web.Request) -> RequestKey | None:
    """The key that a request carries, with a digest of what it brings; None when it carries none.

    Raises:
        BadRequest: when it is empty, too long, or has other characters than visible ones of ASCII.
    """
    name = request.headers.get(HEADER)
    if name is None:
        return None
    if not re.fullmatch(r"[!-~]{1,255}", name):
        raise BadRequest(
            "invalid_idempotency_key",
            f"{HEADER} is {shown(name)}",
            "send 1 to 255 visible ASCII characters, such as a UUID, a new one for each job",
        )
    return RequestKey(name, hashlib.sha256(await request.read()).hexdigest())
