"""Slots are paused, drained and resumed, and SIGTERM lets running jobs end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import held, hold, outcome, progress, queue_ids, quick, release, start_held
from tests.host.pool import ServerPool
from tests.host.server import JSON, POLL_S, HostServer

pytestmark = pytest.mark.host

WAIT_S = 60.0


@pytest.fixture(scope="module")
def module_server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


@pytest.fixture
def server(module_server: HostServer) -> Iterator[HostServer]:
    """All of its slots are resumed before and after."""
    yield module_server
    assert act(module_server, "resume")[0] == 200


def act(server: HostServer, action: str, slot: int | None = None, **body: object) -> tuple[int, JSON]:
    headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
    status, reply = server.request("POST", f"/parallel/{action}", body or None, headers=headers)
    return status, reply


def states(server: HostServer) -> list[str]:
    return [queue["state"] for queue in server.request("GET", "/queue/all")[1]["queues"]]


def await_state(server: HostServer, slot: int, state: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while states(server)[slot] != state:
        assert time.monotonic() < deadline, f"slot {slot} is {states(server)[slot]}, not {state}"
        time.sleep(POLL_S)


def refusal(server: HostServer, path: str, body: JSON | None = None, slot: int | None = None) -> tuple[int, str, JSON]:
    """Status, Retry-After and body of a request that is refused."""
    headers = {"Content-Type": "application/json", **({} if slot is None else {"X-TARGET-GPU": str(slot)})}
    data = None if body is None else json.dumps(body).encode()
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=WAIT_S)
    with raised.value as reply:
        return reply.code, reply.headers.get("Retry-After", ""), json.loads(reply.read())


def test_a_paused_slot_ends_its_job_and_those_bound_to_it_wait(server: HostServer) -> None:
    with server.websocket() as watcher:
        running = start_held(server, watcher, 0, seed=1)
        assert act(server, "pause", 0) == (200, {"slots": [{"gpu_id": 0, "state": "draining", "refuses_jobs": False}]})
        bound = server.submit(quick(101), 0)["prompt_id"]
        autos = [server.submit(quick(102 + number))["prompt_id"] for number in range(3)]
        assert {entry["gpu_id"] for entry in server.wait(autos).values()} == {1}
        assert states(server)[0] == "draining"
        release(server, running)
    await_state(server, 0, "paused")
    assert act(server, "pause", 0)[1]["slots"][0]["state"] == "paused"
    assert queue_ids(server) == ([], [bound])
    assert act(server, "resume", 0)[0] == 200
    entry = server.wait([bound])[bound]
    assert (entry["gpu_id"], outcome(entry)) == (0, "success")


def test_when_all_are_paused_jobs_wait_and_the_server_is_not_ready(server: HostServer) -> None:
    assert server.request("GET", "/ready") == (200, {"ready": True, "reason": None})
    act(server, "pause")
    ids = [server.submit(quick(110 + number))["prompt_id"] for number in range(4)]
    status, retry_after, reply = refusal(server, "/ready")
    assert (status, retry_after, reply["ready"]) == (503, "10", False)
    assert "no slot can take jobs" in reply["reason"]
    assert sorted(queue_ids(server)[1]) == sorted(ids)
    health = server.request("GET", "/health")
    assert (health[0], [slot["state"] for slot in health[1]["slots"]]) == (200, ["paused", "paused"])
    assert [slot["health"] for slot in health[1]["slots"]] == ["ok", "ok"]
    act(server, "resume", gpu_ids=[1])
    assert {(outcome(entry), entry["gpu_id"]) for entry in server.wait(ids).values()} == {("success", 1)}
    assert server.request("GET", "/ready")[0] == 200


def test_a_draining_server_refuses_and_queues_nothing(server: HostServer) -> None:
    with held(server, 0):
        waits = server.submit(quick(120), 0)["prompt_id"]
        assert act(server, "drain")[0] == 200
        before = queue_ids(server)
        for body, slot in (({"prompt": quick(121)}, None), ({"prompt": quick(122)}, 1), ({"prompt": {}}, None)):
            status, retry_after, reply = refusal(server, "/prompt", body, slot)
            assert (status, retry_after, reply["error"]["type"]) == (503, "10", "draining")
            assert reply["node_errors"] == {}
        status, _, reply = refusal(server, "/parallel/preload", {"files": ["checkpoints/a.safetensors"]})
        assert (status, reply["error"]["type"]) == (503, "draining")
        assert refusal(server, "/ready")[2]["reason"] == "the server is draining"
        assert queue_ids(server) == before
        act(server, "resume")
        assert states(server)[0] == "running"
    assert outcome(server.wait([waits])[waits]) == "success"


def test_a_draining_slot_refuses_only_what_is_bound_to_it(server: HostServer) -> None:
    act(server, "drain", 0)
    in_body = {"prompt": quick(130), "extra_data": {"target_gpu": 0}}
    assert refusal(server, "/prompt", in_body)[0] == 503
    assert refusal(server, "/prompt", {"prompt": quick(131)}, 0)[2]["error"]["message"].startswith("slot 0 is draining")
    files = {"files": ["checkpoints/a.safetensors"], "gpu_ids": [0, 1]}
    assert refusal(server, "/parallel/preload", files)[0] == 503
    assert queue_ids(server) == ([], [])
    assert server.run(quick(132))["gpu_id"] == 1
    assert server.request("GET", "/ready")[0] == 200


def test_pausing_at_any_moment_loses_no_job_and_doubles_none(server: HostServer) -> None:
    succeeded = [queue["metrics"]["jobs_succeeded"] for queue in server.request("GET", "/queue/all")[1]["queues"]]
    ids = []
    for number in range(40):
        ids.append(server.submit(quick(200 + number), None if number % 3 else number % 2)["prompt_id"])
        act(server, ("pause", "resume")[number // 2 % 2], number % 2)
    act(server, "resume")
    assert {outcome(entry) for entry in server.wait(ids).values()} == {"success"}
    after = [queue["metrics"]["jobs_succeeded"] for queue in server.request("GET", "/queue/all")[1]["queues"]]
    assert sum(after) - sum(succeeded) == len(ids)


@pytest.mark.parametrize("action", ["pause", "resume", "drain"])
def test_what_cannot_be_meant_changes_nothing(server: HostServer, action: str) -> None:
    before = states(server)
    for body in ({"gpu_ids": []}, {"gpu_ids": [2]}, {"gpu_ids": 0}, {"gpu_ids": [True]}):
        assert act(server, action, **body)[0] == 400
    assert act(server, action, 7)[0] == 400
    assert server.request("POST", f"/parallel/{action}", data=b"[]")[0] == 400
    assert states(server) == before


def await_end(server: HostServer) -> int | None:
    """The exit status of a host that is ending by itself."""
    deadline = time.monotonic() + WAIT_S
    while server.is_running and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert not server.is_running, server.log()[-2000:]
    return server.stop()


def test_sigterm_lets_running_jobs_end_and_tells_those_that_wait(make_server: MakeServer) -> None:
    server = make_server(slots="cpu,cpu", env={"COMFY_PARALLEL_DRAIN_S": "60"})
    events = urllib.request.urlopen(f"{server.url}/parallel/events", timeout=WAIT_S)
    with server.websocket() as client:
        job_id = server.submit(progress(1, steps=100, ms=100), 0, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "progress")
        waiting = [server.submit(quick(number), 0)["prompt_id"] for number in range(2)]
        os.kill(server.pid, signal.SIGTERM)
        await_state(server, 1, "paused")
        assert refusal(server, "/prompt", {"prompt": quick(9)})[:2] == (503, "10")
        assert refusal(server, "/ready")[0] == 503
        assert refusal(server, "/parallel/resume", {})[0] == 503
        assert client.wait_for_end(job_id)["type"] == "execution_success"
        client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] is None)
    assert await_end(server) == 0
    with events:
        assert events.readline() == b"event: snapshot\n"
        while events.readline():  # A reader of the live data ends with the server, and does not keep it.
            pass
    log = server.log()
    assert "2 jobs go on when the server is started again: each waits" in log
    server.start()
    assert set(server.wait(waiting)) == set(waiting)
    # The host's in-memory database may complain when the collector meets its connection on another thread.
    assert not re.search(r'File "[^"]*/comfy_parallel/(\w+/)*\w+\.py"', log), log


def test_sigterm_ends_at_once_unless_asked(make_server: MakeServer) -> None:
    server = make_server(slots="cpu,cpu")
    with server.websocket() as client:
        start_held(server, client, 0)
        started = time.monotonic()
        assert server.stop() == -signal.SIGTERM
        assert time.monotonic() - started < WAIT_S


def test_a_job_that_does_not_end_in_time_is_told(make_server: MakeServer) -> None:
    server = make_server(slots="cpu,cpu", env={"COMFY_PARALLEL_DRAIN_S": "1", "COMFY_PARALLEL_STATE": "off"})
    job_id = server.submit(hold(), 0)["prompt_id"]
    await_state(server, 0, "running")
    os.kill(server.pid, signal.SIGTERM)
    assert await_end(server) == 0
    assert f"lost, it still runs: job number 0, prompt_id '{job_id}'" in server.log()
