"""Our example workflows among the templates of ComfyUI's page, for as long as their nodes are there.

The host offers a folder of this name of any node pack by itself, also where the pack is off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aiohttp import web

FOLDER = Path(__file__).resolve().parents[1] / "ui" / "example_workflows"
LIST = "/workflow_templates"
_OURS = "comfy_parallel"


def add_names(front: Any, reply: bytes) -> bytes:
    """The host's list of templates by pack, and ours."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    return json.dumps({**json.loads(reply), _OURS: names}).encode()


def add_routes(routes: web.RouteTableDef) -> None:
    """Serve the workflows and their pictures, before the host builds its routing table."""
    files = {path.name: path for path in FOLDER.iterdir()}

    @routes.get(f"{LIST}/{_OURS}/{{name}}")
    async def template(request: web.Request) -> web.StreamResponse:
        path = files.get(request.match_info["name"])
        return web.Response(status=404, text="no such file\n") if path is None else web.FileResponse(path)
