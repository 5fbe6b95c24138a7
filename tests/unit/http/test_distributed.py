"""Workers over HTTP: the configuration, real processes in the place of ComfyUIs, and requests with something wrong."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import FormData, web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from comfy_parallel.fleet import local_workers
from comfy_parallel.fleet.gpu_config_file import GpuConfigFile
from comfy_parallel.fleet.local_workers import LocalWorkers, for_workers
from comfy_parallel.fleet.whole_host import Install
from comfy_parallel.http import distributed_jobs, routes
from comfy_parallel.isolation import save_numbers
from tests.free_ports import free_ports

LIMIT_S = 60.0
# A program that is called like ComfyUI, is ready like it, and says what it was given.
HOST = """
import sys, os, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        print("freed", self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("arguments", *sys.argv[1:], flush=True)
print("devices", os.environ["COMFY_PARALLEL_DEVICES"], os.environ["COMFY_PARALLEL_GPU_CONFIG"], flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


class Served:
    """A server with our routes, and the workers that it knows."""

    def __init__(
        self, client: TestClient[Any, Any], workers: LocalWorkers, routes: web.RouteTableDef, submitted: list[Any]
    ) -> None:
        self.client, self.workers, self.routes, self.submitted = client, workers, routes, submitted

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        async with self.client.request(method, path, data=data) as reply:
            text = await reply.text()
            return reply.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def done(self, method: str, path: str, body: Any = None) -> Any:
        status, reply = await self.ask(method, path, body)
        assert status == 200, reply
        return reply

    async def eventually(self, worker_id: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        for _ in range(int(LIMIT_S / 0.05)):
            told = await self.done("GET", "/parallel/workers")
            worker: dict[str, Any] = next(one for one in told["workers"] if one["id"] == worker_id)
            if holds(worker):
                return worker
            await asyncio.sleep(0.05)
        raise AssertionError(worker)

    async def written(self, worker_id: str, word: str) -> None:
        """Return when the worker's log has this word; what it writes is there a moment later."""
        for _ in range(int(LIMIT_S / 0.05)):
            told = await self.done("GET", f"/parallel/workers/{worker_id}/log")
            if any(word in line for line in told["lines"]):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(told)


@pytest.fixture
def port() -> int:
    return free_ports(1)


@pytest.fixture
async def served(tmp_path: Path, front: Any, port: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    (tmp_path / "main.py").write_text(textwrap.dedent(HOST))
    (tmp_path / "gpu_config.json").write_text(
        json.dumps(
            {
                "workers": [
                    {"id": 1, "name": "One", "port": port, "extra_args": "--listen --reserve-vram 2", "mine": [1]},
                    {"id": "far", "host": "10.0.0.9", "port": 8188, "enabled": True},
                ],
                "kept": True,
            }
        )
    )
    install = Install(
        comfyui=tmp_path, python=sys.executable, folder=tmp_path / "own", has_database=True, env={}, visible=None
    )
    workers = LocalWorkers(
        GpuConfigFile(tmp_path / "gpu_config.json"), install, ["--port", "8188", "--lowvram"], is_cpu=True
    )
    monkeypatch.setattr(local_workers, "_workers", workers)
    submitted: list[Any] = []

    async def submit(request: web.Request) -> web.StreamResponse:
        submitted.append(json.loads(await request.read()))
        return web.json_response({"prompt_id": "a", "number": 1, "node_errors": {}, "gpu_id": None})

    app = web.Application()
    server = SimpleNamespace(app=app, routes=web.RouteTableDef())
    routes.add_routes(server, front, lambda slot: [], submit)
    app.add_routes(server.routes)
    async with TestClient(TestServer(app)) as client:
        yield Served(client, workers, server.routes, submitted)
    workers.stop_all()
    save_numbers.share(None)


async def test_a_worker_is_launched_killed_restarted_and_stopped(served: Served, port: int) -> None:
    told = await served.done("POST", "/parallel/workers/1/launch")
    assert told["worker"]["state"] in ("starting", "waiting")
    first = await served.eventually("1", lambda one: one["state"] == "ready")
    again = await served.done("POST", "/parallel/workers/1/launch")
    assert again["worker"]["pid"] == first["pid"]
    log = await served.done("GET", "/parallel/workers/1/log?lines=50")
    words = "\n".join(log["lines"])
    assert f"arguments --lowvram --listen --reserve-vram 2 --port {port} --cpu" in words
    assert "devices cpu off" in words
    served.workers._running["1"].kill("a test wants it")
    second = await served.eventually("1", lambda one: one["state"] == "ready" and one["restarts"] == 1)
    assert second["pid"] != first["pid"]
    assert second["last_end"] == "was ended by force: a test wants it"
    await served.done("POST", "/multigpu/clear_memory")
    await served.written("1", "freed")
    await served.done("POST", "/parallel/workers/1/restart")
    third = await served.eventually("1", lambda one: one["state"] == "ready")
    assert third["pid"] != second["pid"]
    managed = await served.done("GET", "/distributed/managed_workers")
    assert list(managed["managed_workers"]) == ["1"]
    told = await served.done("POST", "/distributed/stop_worker", {"worker_id": 1})
    assert (told["worker"]["state"], told["pid"]) == ("stopped", None)
    assert (await served.done("GET", "/distributed/managed_workers"))["managed_workers"] == {}


async def test_it_is_launched_at_the_start_where_the_settings_say_so(served: Served, port: int) -> None:
    await served.done("POST", "/multigpu/config/update_worker", {"worker_id": 1, "enabled": True})
    served.workers.launch_at_start()
    assert not served.workers.is_running("1")
    await served.done("POST", "/multigpu/config/update_setting", {"key": "auto_launch_workers", "value": True})
    served.workers.launch_at_start()
    assert served.workers.is_running("1")


async def test_a_port_that_is_taken_and_a_worker_elsewhere_are_refused(served: Served, port: int) -> None:
    async with TestServer(web.Application(), port=port):
        status, reply = await served.ask("POST", "/parallel/workers/1/launch")
        assert (status, reply["error"]["type"]) == (400, "cannot_launch")
        assert f"port {port} is taken" in reply["error"]["message"]
    status, reply = await served.ask("POST", "/parallel/workers/far/launch")
    assert (status, reply["error"]["type"]) == (400, "not_local")
    status, reply = await served.ask("POST", "/parallel/workers/none/stop")
    assert (status, reply["error"]["details"]) == (404, "ask for one of: 1, far")


async def test_arguments_that_are_ours_are_refused(served: Served) -> None:
    await served.done("POST", "/distributed/config/update_worker", {"worker_id": 1, "extra_args": "--database-url x"})
    status, reply = await served.ask("POST", "/parallel/workers/1/launch")
    assert (status, reply["error"]["type"]) == (400, "cannot_launch")


async def test_the_configuration_is_changed_and_the_rest_kept(served: Served) -> None:
    await served.done(
        "POST", "/distributed/config/update_worker", {"worker_id": "1", "name": "Uno", "extra_args": None}
    )
    await served.done("POST", "/distributed/config/update_worker", {"worker_id": "new", "port": 9000})
    await served.done("POST", "/distributed/config/update_master", {"port": 8188})
    await served.done("POST", "/distributed/config", {"tunnel": {"status": "stopped"}})
    await served.done("POST", "/distributed/config/delete_worker", {"worker_id": "far"})
    written = json.loads(served.workers.file.path.read_text())
    assert written["kept"] is True
    assert [worker["id"] for worker in written["workers"]] == [1, "new"]
    assert written["workers"][0] == {"id": 1, "name": "Uno", "port": written["workers"][0]["port"], "mine": [1]}
    told = await served.done("GET", "/multigpu/config")
    assert told["master"] == {"port": 8188}
    assert told["settings"]["worker_timeout_seconds"] == 60
    assert told["tunnel"] == {"status": "stopped"}


async def test_a_workflow_is_queued_for_as_many_as_are_named(served: Served) -> None:
    asked = {"prompt": {"1": {}}, "client_id": "c", "enabled_worker_ids": ["1", "far"], "workflow": {"nodes": []}}
    told = await served.done("POST", "/distributed/queue", asked)
    assert (told["prompt_id"], told["worker_count"], told["auto_prepare_supported"]) == ("a", 2, True)
    await served.done("POST", "/distributed/queue", {**asked, "delegate_master": True})
    assert [one["extra_data"]["participants"] for one in served.submitted] == [3, 2]
    assert served.submitted[0]["prompt"] == {"1": {}}
    assert served.submitted[0]["extra_data"]["extra_pnginfo"]["workflow"] == {"nodes": []}


BODIES = (b"", b"{", b"[]", b"null", b"\xff", b'{"worker_id": []}', b'{"worker_id": true}', b'{"key": 1, "value": 2}')


async def test_whatever_is_sent_is_answered_and_nothing_breaks(served: Served) -> None:
    before = served.workers.read().json
    for route in served.routes:
        assert isinstance(route, web.RouteDef)
        if not re.match(r"/(distributed|multigpu)/|/parallel/workers", route.path):
            continue
        path = re.sub(r"\{[^}]*\}", "nobody", route.path)
        for body in BODIES if route.method == "POST" else (None,):
            status, reply = await served.ask(route.method, path, body)
            assert status in (200, 400, 404, 501), (path, body, reply)
            assert status == 200 or set(reply) - {"message"} == {"error", "node_errors"}, (path, body, reply)
    after = served.workers.read().json
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["heartbeat", "submit_tiles", "submit_image", "request_image", "job_complete"])
async def test_what_a_worker_sends_is_awaited_by_nobody(served: Served, name: str) -> None:
    sent = {"worker_id": "1", "multi_job_id": "exec_1", "job_id": "exec_1"}
    status, reply = await served.ask("POST", f"/distributed/{name}", sent)
    assert (status, reply["error"]["type"]) == (404, "no_such_job")
    assert "exec_1" in reply["message"]
    status, reply = await served.ask("POST", f"/distributed/{name}", {"worker_id": "1"})
    assert (status, reply["error"]["type"]) == (400, "invalid_request")
    assert await served.done("GET", "/distributed/queue_status/exec_1") == {"exists": False, "job_id": "exec_1"}
    assert await served.done("GET", "/distributed/job_status?multi_job_id=exec_1") == {"ready": False}


async def test_the_first_versions_workers_send_forms(served: Served) -> None:
    form = FormData({"multi_job_id": "mgpu_1", "worker_id": "1", "image_index": "0", "is_last": "true"})
    form.add_field("image", b"png", filename="image.png")
    async with served.client.post("/multigpu/job_complete", data=form) as reply:
        assert (reply.status, "mgpu_1" in (await reply.json())["message"]) == (404, True)


async def test_files_are_compared_and_loaded(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    (tmp_path / "clip.mp4").write_bytes(b"video")
    found = {name: SimpleNamespace(path=tmp_path / name) for name in ("grey.png", "clip.mp4")}
    monkeypatch.setattr(distributed_jobs, "named_file", found.get)
    digest = hashlib.md5((tmp_path / "grey.png").read_bytes()).hexdigest()
    for file, sent, told in (
        ("grey.png", digest, {"exists": True, "hash_matches": True}),
        ("grey.png", "0", {"exists": True, "hash_matches": False}),
        ("none.png", digest, {"exists": False}),
    ):
        reply = await served.done("POST", "/distributed/check_file", {"filename": file, "hash": sent})
        assert reply == {"status": "success", **told}
    reply = await served.done("POST", "/distributed/load_image", {"image_path": "grey.png"})
    assert reply["hash"] == digest
    image = Image.open(io.BytesIO(base64.b64decode(reply["image_data"].partition(",")[2])))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (7, 7, 7))
    reply = await served.done("POST", "/distributed/load_image", {"image_path": "clip.mp4"})
    assert reply["image_data"] == "data:video/mp4;base64," + base64.b64encode(b"video").decode()
    assert (await served.ask("POST", "/distributed/load_image", {"image_path": "none.png"}))[0] == 404


async def test_tunnels_are_refused_and_logs_shown(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await served.ask("POST", "/distributed/tunnel/start", {}))[0] == 501
    assert (await served.done("GET", "/distributed/tunnel/status"))["tunnel"]["status"] == "stopped"
    monkeypatch.setattr(distributed_jobs.facts, "log_lines", lambda: ["one\n", "two\n", "three\n"])
    reply = await served.done("GET", "/distributed/local_log?lines=2")
    assert (reply["content"], reply["truncated"]) == ("two\nthree\n", True)
    assert (await served.ask("GET", "/distributed/remote_worker_log/1"))[0] == 400
    assert (await served.ask("GET", "/distributed/remote_worker_log/none"))[0] == 404


async def test_a_file_that_cannot_be_read_is_told(served: Served) -> None:
    served.workers.file.path.write_text("{")
    for method, path in (("GET", "/parallel/workers"), ("GET", "/distributed/config"), ("POST", "/distributed/config")):
        status, reply = await served.ask(method, path, b"{}" if method == "POST" else None)
        assert (status, reply["error"]["type"]) == (400, "invalid_config"), path
    assert served.workers.file.path.read_text() == "{"


async def test_without_workers_each_route_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_workers, "_workers", None)
    assert (await served.ask("GET", "/parallel/workers"))[0] == 404
    assert (await served.ask("GET", "/distributed/config"))[0] == 404


async def test_a_packs_own_route_answers_in_the_place_of_ours(served: Served) -> None:
    async def of_pack(request: web.Request) -> web.Response:
        return web.json_response({"pack": True})

    served.routes.get("/distributed/config")(of_pack)
    assert await served.done("GET", "/distributed/config") == {"pack": True}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--port", "1", "--cpu", "--listen"], ["--cpu"]),
        (["--listen", "0.0.0.0", "--lowvram"], ["--lowvram"]),
        (["--listen", "--lowvram"], ["--lowvram"]),
        (["--port=1", "--cuda-device", "3", "--preview-method", "auto"], ["--preview-method", "auto"]),
        (
            ["--auto-launch", "--tls-keyfile", "a", "--tls-certfile=b", "--base-directory", "x"],
            ["--base-directory", "x"],
        ),
    ],
)
def test_workers_get_the_servers_arguments_without_its_own(given: list[str], kept: list[str]) -> None:
    assert list(for_workers(given)) == kept
