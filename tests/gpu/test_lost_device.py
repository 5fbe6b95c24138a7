"""A failed device assert on a real GPU: with slots in processes it costs one process, with threads that GPU's slots.

One GPU is enough: two slots share it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.gpu.conftest import MakeGpuServer
from tests.host.jobs import message, outcome, progress, quick
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.test_journal import await_count, noting
from tests.host.workflows import Workflow, node

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

REASON = "device-side assert triggered"
LEAVES = 75


def asserts() -> Workflow:
    return {"lose": node("CPTAsserts"), "out": node("CPTOut", value=["lose", 0])}


def slots_shown(server: HostServer) -> list[JSON]:
    found: list[JSON] = server.request("GET", "/queue/all")[1]["queues"]
    return found


def test_in_a_process_it_costs_that_process_and_job(make_gpu_server: MakeGpuServer) -> None:
    server = make_gpu_server(slots="cuda:0=process,cuda:0=process")
    assert [outcome(server.run(quick(slot), slot)) for slot in (0, 1)] == ["success"] * 2
    pids = [slot["worker"]["pid"] for slot in slots_shown(server)]
    beside = server.submit(progress(1, steps=100, ms=50), 1)["prompt_id"]
    lost = server.submit(asserts(), 0)["prompt_id"]
    following = server.submit(quick(5), 0)["prompt_id"]
    entries = server.wait([lost, beside, following], timeout_s=300)
    assert REASON in message(entries[lost], "execution_error")["exception_message"]
    assert [outcome(entries[one]) for one in (beside, following)] == ["success"] * 2
    now = [slot["worker"]["pid"] for slot in slots_shown(server)]
    assert now[0] not in (None, pids[0])
    assert now[1] == pids[1]


def test_in_threads_it_fails_the_slots_of_that_gpu_and_the_server_answers(make_gpu_server: MakeGpuServer) -> None:
    server = make_gpu_server(slots="cuda:0,cuda:0")
    assert [outcome(server.run(quick(slot), slot)) for slot in (0, 1)] == ["success"] * 2
    entry = server.run(asserts(), 0)
    assert REASON in message(entry, "execution_error")["exception_message"]
    assert [slot["state"] for slot in slots_shown(server)] == ["failed", "failed"]
    for _ in range(3):
        assert [server.request("GET", path)[0] for path in ("/queue/all", "/metrics", "/health", "/queue")] == [200] * 4
    for slot in (0, 1, None):
        headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
        status, reply = server.request("POST", "/prompt", {"prompt": quick(9)}, headers=headers)
        assert (status, reply["error"]["type"]) == (503, "slot_failed")
    assert REASON in server.request("GET", "/health")[1]["slots"][0]["error"]


def test_it_ends_in_order_if_asked_to_and_its_queue_goes_on(make_gpu_server: MakeGpuServer, tmp_path: Path) -> None:
    server = make_gpu_server(slots="cuda:0,cuda:0", env={"COMFY_PARALLEL_EXIT_ON_FAILED": "1"})
    file = tmp_path / "notes"
    running = server.submit(noting(file, "runs", 20), 1)["prompt_id"]
    await_count(file, "runs")
    lost = server.submit(asserts(), 0)["prompt_id"]
    deadline = time.monotonic() + 120
    while server.is_running and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert server.stop() == LEAVES, server.log()[-3000:]
    server.start()
    entries = server.wait([running, lost], timeout_s=300)
    assert REASON in message(entries[lost], "execution_error")["exception_message"]
    assert outcome(entries[running]) == "success"
    assert [slot["state"] for slot in slots_shown(server)] == ["idle", "idle"]
