"""What the pages of ComfyUI-Distributed and of its first version ask of a server, in order, with a real worker."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.host.jobs import eventually, new_key, outcome, slots_shown
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.test_fan_out import SEED, alone, pixels, shared
from tests.host.workflows import node, txt2img
from tests.ports import free_port

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

LIMIT_S = 180.0


class Client:
    """As its `apiClient`: JSON both ways, and a refusal is known by its message."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: JSON | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(call, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as refusal:
            raise Refused(json.load(refusal)["message"]) from refusal

    def is_active(self) -> bool:
        """As its `probeWorker`."""
        try:
            return bool(self.ask("/prompt")["exec_info"]["queue_remaining"] >= 0)
        except OSError:
            return False


class Refused(Exception):
    """What the page shows of a refusal."""


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


@pytest.fixture(scope="module")
def worker(server: HostServer) -> Client:
    """A worker that was added and launched as its page does."""
    master, port = Client(server.url), free_port()
    assert master.ask("/distributed/config")["workers"] == []
    added = {"worker_id": "1", "name": "One", "host": "localhost", "port": port, "type": "local", "enabled": True}
    assert master.ask("/distributed/config/update_worker", {**added, "extra_args": "--cpu"})["status"] == "success"
    assert master.ask("/distributed/launch_worker", {"worker_id": "1"})["status"] == "success"
    launched = Client(f"http://127.0.0.1:{port}")
    eventually(launched.is_active, "the worker does not answer", LIMIT_S)
    return launched


def test_its_page_launches_shows_and_queues(server: HostServer, worker: Client) -> None:
    master = Client(server.url)
    eventually(lambda: master.ask("/distributed/managed_workers")["managed_workers"]["1"]["pid"], "no pid", LIMIT_S)
    assert "To see the GUI go to" in master.ask("/distributed/worker_log/1?lines=1000")["content"]
    assert master.ask("/distributed/worker/clear_launching", {"worker_id": "1"})["status"] == "success"
    assert master.ask("/distributed/network_info")["status"] == "success"
    active = [one["id"] for one in master.ask("/distributed/config")["workers"] if worker.is_active()]
    sent = {"prompt": shared(SEED), "workflow": {"nodes": []}, "client_id": "page", "delegate_master": False}
    told = {"enabled_worker_ids": active, "workers": [{"id": one} for one in active], "auto_prepare": True}
    reply = master.ask("/distributed/queue", {**sent, **told, "trace_execution_id": f"exec_{new_key()}"})
    assert (reply["worker_count"], reply["node_errors"], reply["auto_prepare_supported"]) == (1, {}, True)
    entry = server.wait([reply["prompt_id"]], LIMIT_S)[reply["prompt_id"]]
    assert pixels(server, entry) == alone(server, 2)


def test_the_page_of_the_first_version_prepares_and_queues(server: HostServer, worker: Client) -> None:
    master = Client(server.url)
    assert master.ask("/multigpu/config")["workers"][0]["name"] == "One"
    assert master.ask("/multigpu/config/update_worker", {"worker_id": "1", "enabled": True})["status"] == "success"
    assert master.ask("/multigpu/config/update_setting", {"key": "debug", "value": False})["status"] == "success"
    assert master.ask("/multigpu/prepare_job", {"multi_job_id": "mgpu_1"})["status"] == "success"
    hidden = {"multi_job_id": "mgpu_1", "is_worker": False, "master_url": "", "worker_batch_size": 1}
    workflow = shared(SEED, collector="MultiGPUCollector", enabled_worker_ids='["1"]', **hidden)
    workflow["seed"] = node("MultiGPUDistributor", seed=SEED, batch_size=1, is_worker=False, worker_id="")
    assert pixels(server, server.run(workflow, timeout_s=LIMIT_S)) == alone(server, 2)
    with pytest.raises(Refused, match="mgpu_1"):
        master.ask("/multigpu/job_complete", {"multi_job_id": "mgpu_1", "worker_id": "1", "image_index": 0})


@pytest.mark.parametrize("family", ["distributed", "multigpu"])
def test_memory_is_cleared_here_and_at_the_worker(server: HostServer, worker: Client, family: str) -> None:
    master = Client(server.url)
    server.run(txt2img(seed=SEED + len(family), steps=1), 0)
    job_id = worker.ask("/prompt", {"prompt": txt2img(seed=SEED, steps=1)})["prompt_id"]
    eventually(lambda: worker.ask(f"/history/{job_id}"), "the worker's job does not end", LIMIT_S)
    assert slots_shown(server)[0]["models"]
    assert worker.ask("/queue/all")["queues"][0]["models"]
    assert master.ask(f"/{family}/clear_memory", {})["status"] == "success"
    eventually(lambda: not slots_shown(server)[0]["models"], "models are loaded here", LIMIT_S)
    eventually(lambda: not worker.ask("/queue/all")["queues"][0]["models"], "models are loaded there", LIMIT_S)


def test_workers_are_interrupted_stopped_and_taken_out(server: HostServer, worker: Client) -> None:
    master = Client(server.url)
    slow = {"work": node("CPTSleep", seconds=60.0, seed=1), "out": node("CPTOut", value=["work", 0])}
    job_id = worker.ask("/prompt", {"prompt": slow})["prompt_id"]
    eventually(lambda: worker.ask("/queue")["queue_running"], "it does not run", LIMIT_S)
    worker.ask("/interrupt", {})
    eventually(lambda: worker.ask(f"/history/{job_id}"), "the worker's job does not end", LIMIT_S)
    assert outcome(worker.ask(f"/history/{job_id}")[job_id]) == "interrupted"
    with pytest.raises(Refused, match="no worker has the id"):
        master.ask("/distributed/stop_worker", {"worker_id": "9"})
    assert master.ask("/distributed/stop_worker", {"worker_id": "1"})["status"] == "success"
    assert master.ask("/distributed/managed_workers")["managed_workers"] == {}
    assert not worker.is_active()
    assert master.ask("/distributed/config/delete_worker", {"worker_id": "1"})["status"] == "success"
    assert master.ask("/distributed/config")["workers"] == []
