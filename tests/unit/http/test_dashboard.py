"""The dashboard's files, events and previews, over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from comfy_parallel.http import dashboard, feed
from comfy_parallel.http.dashboard import FILES_DIR, page_files
from tests.fakes import host_item, take

VENDORED = {  # uplot 1.6.32 from npm, unchanged
    "vendor/uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
    "vendor/uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "vendor/uPlot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.name", lambda device: f"Card {device}")
    monkeypatch.setattr("comfy_parallel.slots.device.memory", lambda device: {"total_bytes": 80, "free_bytes": 30})


@pytest.fixture
async def client(front: Any) -> Any:
    server = SimpleNamespace(app=web.Application(), routes=web.RouteTableDef())
    dashboard.add_routes(server, front, lambda slot: [], lambda: {"files": []})
    server.app.add_routes(server.routes)
    async with TestClient(TestServer(server.app)) as connected:
        yield connected


@pytest.mark.parametrize("name", page_files())
async def test_each_file_of_the_page_is_served_as_what_it_is(client: Any, name: str) -> None:
    reply = await client.get(f"/parallel/ui/{name}")
    assert reply.status == 200
    assert await reply.read() == (FILES_DIR / name).read_bytes()
    assert reply.content_type == dashboard._KINDS[Path(name).suffix]
    assert "default-src 'self'" in reply.headers["Content-Security-Policy"]


async def test_the_page_is_reached_with_and_without_the_slash(client: Any) -> None:
    assert (await client.get("/parallel")).url.path == "/parallel/"
    reply = await client.get("/parallel/")
    assert (reply.status, reply.content_type) == (200, "text/html")


@pytest.mark.parametrize("name", ["../__init__.py", "..%2f__init__.py", "no.js", "%00", "vendor/", "/etc/passwd"])
async def test_other_files_are_not_served(client: Any, name: str) -> None:
    assert (await client.get(f"/parallel/ui/{name}")).status == 404


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """All that it names is relative; `http://www.w3.org` is no address but a name of SVG."""
    own = [path for name, path in page_files().items() if not name.startswith("vendor/")]
    found = {url for path in own for url in re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text(encoding="utf-8"))}
    assert found <= {"http://www.w3.org"}


def test_what_is_vendored_is_what_npm_has() -> None:
    assert {name: hashlib.sha256((FILES_DIR / name).read_bytes()).hexdigest() for name in VENDORED} == VENDORED
    others = {name for name in page_files() if name.startswith("vendor/")} - VENDORED.keys()
    assert others == set()


def test_both_languages_have_the_same_words_and_the_page_uses_no_others() -> None:
    words = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FILES_DIR / "locales").glob("*.json")}
    assert words.keys() == {"en", "zh"}
    assert words["en"].keys() == words["zh"].keys()
    blanks = {name: [set(re.findall(r"\{\w+\}", words[lang][name])) for lang in ("en", "zh")] for name in words["en"]}
    assert {name for name, (en, zh) in blanks.items() if en != zh} == set()
    sources = {path.name: path.read_text(encoding="utf-8") for path in FILES_DIR.parent.rglob("*.js")}
    sources["index.html"] = (FILES_DIR / "index.html").read_text(encoding="utf-8")
    text = "\n".join(source for name, source in sources.items() if not name.startswith("uPlot"))
    asked = set(re.findall(r'\bt\("([\w.]+)"', text)) | set(re.findall(r'data-t(?:-label)?="([\w.]+)"', text))
    assert asked <= words["en"].keys()
    named = set(re.findall(r'"([\w.]+)"', text))
    families = tuple(re.findall(r"\bt\(`([\w.]+\.)\$\{", text))
    assert {name for name in words["en"].keys() - named if not name.startswith(families)} == set()


async def test_events_begin_with_a_snapshot_and_end_with_the_server(client: Any) -> None:
    reply = await client.get("/parallel/events")
    assert (reply.status, reply.content_type) == (200, "text/event-stream")
    assert (await reply.content.readline()).decode() == "event: snapshot\n"
    data = json.loads((await reply.content.readline()).removeprefix(b"data: "))
    assert data["parts"]["server"]["slots"] == 2
    assert data["clock"] > 0
    await asyncio.wait_for(client.server.app.shutdown(), 60)
    await asyncio.wait_for(reply.content.read(), 60)


async def test_a_reader_that_leaves_makes_room_for_another(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_READERS", 1)
    monkeypatch.setattr(feed, "ALIVE_S", 0.0)
    monkeypatch.setattr(feed, "PAUSE_S", 0.01)
    first = await client.get("/parallel/events")
    refused = await client.get("/parallel/events")
    assert (refused.status, (await refused.json())["error"]["type"]) == (503, "too_many_readers")
    assert refused.headers["Retry-After"] == "10"
    first.close()
    for _ in range(6000):
        reply = await client.get("/parallel/events")
        if reply.status == 200:
            return
        await asyncio.sleep(0.01)
    pytest.fail("no room")


async def test_a_preview_of_the_running_job(client: Any, front: Any) -> None:
    queue = front.slot_queues[1]
    assert (await client.get("/parallel/preview/1")).status == 404
    queue.put(host_item("running"))
    take(queue)
    for size, longest, shown in (((64, 32), 256, (256, 128)), ((2000, 1000), None, (512, 256)), ((8, 8), None, (8, 8))):
        queue.slot.run.sight.note(2, ("JPEG", Image.new("RGBA", size, "red"), longest))
        reply = await client.get("/parallel/preview/1")
        assert (reply.status, reply.content_type) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(await reply.read())).size == shown


@pytest.mark.parametrize("name", ["2", "-1", "one", "01"])
async def test_a_preview_of_no_slot_is_refused(client: Any, name: str) -> None:
    reply = await client.get(f"/parallel/preview/{name}")
    assert (reply.status, (await reply.json())["error"]["details"]) == (400, "ask for one of: 0, 1")
