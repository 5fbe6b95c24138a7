"""A job that loses its GPU fails that slot: what is bound to it is refused, the others work on, and it is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import await_states, hold, message, outcome, quick
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.test_journal import await_count, notes, noting
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

REASON = "CUDA error: device-side assert triggered"
LEAVES = 75


def loses(way: str) -> Workflow:
    return {"lose": node("CPTLosesDevice", way=way), "out": node("CPTOut", value=["lose", 0])}


def error_of(entry: JSON) -> str:
    text: str = message(entry, "execution_error")["exception_message"]
    return text


@pytest.fixture(scope="module")
def module_server(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots="cpu,cpu,cpu")


@pytest.fixture
def server(module_server: HostServer) -> HostServer:
    """All of its slots take jobs."""
    assert module_server.request("POST", "/parallel/resume", {})[0] == 200
    return module_server


@pytest.mark.parametrize("way", ["asserts", "asserts_as_torch_does", "hides_it", "kills_its_thread"])
def test_the_slot_fails_and_the_others_work_on(server: HostServer, way: str) -> None:
    with server.websocket() as client:
        held = server.submit(hold(), 1, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "executing" and event["data"].get("prompt_id") == held)
        waits = server.submit(loses(way), 1, client.client_id)["prompt_id"]
        bound = [server.submit(quick(920 + number), 1, client.client_id)["prompt_id"] for number in range(3)]
        server.request("POST", "/interrupt", {"prompt_id": held})
        entries = server.wait([waits, *bound])
        assert client.wait_for_end(bound[-1])["type"] == "execution_error"
    assert REASON in error_of(entries[waits])
    assert "restart ComfyUI" in error_of(entries[waits])
    for prompt_id in bound:
        assert outcome(entries[prompt_id]) == "error"
        assert error_of(entries[prompt_id]).startswith("it was bound to slot 1 (cpu), which has failed")
        assert REASON in error_of(entries[prompt_id])
    status, reply = server.request("POST", "/prompt", {"prompt": quick(930)}, headers={"X-TARGET-GPU": "1"})
    assert (status, reply["error"]["type"]) == (503, "slot_failed")
    assert REASON in reply["error"]["message"]
    autos = [server.submit(quick(940 + number))["prompt_id"] for number in range(6)]
    assert {(outcome(entry), entry["gpu_id"] == 1) for entry in server.wait(autos).values()} == {("success", False)}
    await_states(server, ["idle", "failed", "idle"])
    shown = server.request("GET", "/queue/all")[1]["queues"][1]
    assert shown["health"] == "broken"
    assert REASON in shown["error"]
    assert (
        'comfy_parallel_slot_state{device="cpu",gpu_id="1",state="failed"} 1.0' in server.request("GET", "/metrics")[1]
    )
    assert REASON in server.request("GET", "/health")[1]["slots"][1]["error"]
    assert server.request("GET", "/ready")[0] == 200


@pytest.mark.parametrize("way", ["one_call_only", "runs_out", "speaks_of_it"])
def test_errors_of_one_call_fail_only_their_job(server: HostServer, way: str) -> None:
    assert outcome(server.run(loses(way), 0)) == "error"
    await_states(server, ["idle"] * 3)


def test_when_all_have_failed_jobs_are_refused(server: HostServer) -> None:
    for slot in range(3):
        server.run(loses("asserts"), slot)
    await_states(server, ["failed"] * 3)
    status, reply = server.request("POST", "/prompt", {"prompt": quick(1)})
    assert (status, reply["error"]["type"]) == (503, "slot_failed")
    assert server.request("GET", "/ready")[0] == 503
    assert server.request("POST", "/parallel/resume", {})[0] == 200
    assert outcome(server.run(quick(2))) == "success"


def test_it_ends_in_order_if_asked_to_and_keeps_its_queue(make_server: MakeServer, tmp_path: Path) -> None:
    env = {"COMFY_PARALLEL_EXIT_ON_FAILED": "1", "COMFY_PARALLEL_ATTEMPTS": "1"}
    server, file = make_server(slots="cpu,cpu", env=env), tmp_path / "notes"
    running = server.submit(noting(file, "runs", 4), 0)["prompt_id"]
    await_count(file, "runs")
    waiting = [server.submit(noting(file, f"waits{number}"), 0)["prompt_id"] for number in range(2)]
    fatal = server.submit(loses("asserts"), 1)["prompt_id"]
    deadline = time.monotonic() + 60
    while server.is_running and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert server.stop() == LEAVES, server.log()[-3000:]
    server.start()
    entries = server.wait([running, fatal, *waiting])
    assert REASON in error_of(entries[fatal])
    assert [outcome(entries[one]) for one in (running, *waiting)] == ["success"] * 3
    assert sorted(notes(file)) == ["runs", "runs", "waits0", "waits1"]
    await_states(server, ["idle", "idle"])
