"""A job that runs out of memory costs its own slot what that keeps, runs once more, and then fails with advice."""

from __future__ import annotations

from typing import Any

import pytest

from tests.host.jobs import message, new_key, outcome, quick, shown
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def runs_out(times: int, kind: str = "torch", *, interrupts: bool = False, key: str = "") -> Workflow:
    key = key or new_key()
    return {
        "first": node("CPTCounts", key=key),
        "big": node("CPTRunsOut", key=key, times=times, kind=kind, interrupts=interrupts, after=["first", 0]),
        "out": node("CPTOut", value=["big", 0]),
    }


def slot_shown(server: HostServer, slot: int) -> JSON:
    found: JSON = server.request("GET", "/queue/all")[1]["queues"][slot]
    return found


@pytest.mark.parametrize("kind", ["torch", "host", "python"])
@pytest.mark.parametrize("has_client", [True, False])
def test_it_runs_once_more(server: HostServer, kind: str, has_client: bool) -> None:
    before = slot_shown(server, 0)["metrics"]
    with server.websocket() as client:
        job_id = server.submit(runs_out(1, kind), 0, client.client_id if has_client else None)["prompt_id"]
        entry = server.wait([job_id])[job_id]
        if has_client:
            client.wait_for_end(job_id, 60)
            kinds = [
                event["type"] for event in client.of_type("execution_success", "execution_error", "execution_start")
            ]
            assert kinds == ["execution_start", "execution_start", "execution_success"]
    assert (outcome(entry), shown(entry)) == ("success", 2)
    assert entry["outputs"]["first"] == {"count": [1]}, "what was shown before is shown, and computed once"
    assert message(entry, "execution_cached")["nodes"] == ["first"]
    after = slot_shown(server, 0)["metrics"]
    assert after["jobs_run_again"] == before["jobs_run_again"] + 1
    assert (after["jobs_failed"], after["jobs_out_of_memory"]) == (before["jobs_failed"], before["jobs_out_of_memory"])
    assert f"job {job_id} ran out of memory in node big (CPTRunsOut)" in server.log()


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_twice_is_an_error_that_says_what_to_do(server: HostServer, kind: str) -> None:
    before = slot_shown(server, 1)["metrics"]["jobs_failed"]
    with server.websocket() as client:
        job_id = server.submit(runs_out(5, kind), 1, client.client_id)["prompt_id"]
        told = client.wait_for_end(job_id, 60)
        entry = server.wait([job_id])[job_id]
    error = message(entry, "execution_error")
    assert told["type"] == "execution_error"
    assert told["data"]["exception_message"] == error["exception_message"]
    assert (outcome(entry), error["node_id"]) == ("error", "big")
    assert "out of memory, by test" in error["exception_message"]
    assert "slot 1 (cpu)" in error["exception_message"]
    assert "Use a smaller batch" in error["exception_message"]
    assert server.run(runs_out(0), 1)["outputs"]["out"] == {"value": [1]}
    assert slot_shown(server, 1)["metrics"]["jobs_failed"] == before + 1


def test_the_other_slot_keeps_its_models_and_results(server: HostServer) -> None:
    ids = [server.submit(txt2img(11), slot)["prompt_id"] for slot in range(2)]
    server.wait(ids)
    before: list[Any] = [slot_shown(server, slot)["models"] for slot in range(2)]
    assert before[0]
    assert before[1]
    assert outcome(server.run(runs_out(1), 0)) == "success"
    assert slot_shown(server, 0)["models"] == []
    assert slot_shown(server, 1)["models"] == before[1]
    assert len(message(server.run(txt2img(11), 1), "execution_cached")["nodes"]) == len(txt2img(11))
    assert outcome(server.run(txt2img(12), 0)) == "success"


def test_an_interrupt_ends_it_and_it_does_not_run_again(server: HostServer) -> None:
    key = new_key()
    assert outcome(server.run(runs_out(1, key=key, interrupts=True), 0)) == "interrupted"
    assert shown(server.run(runs_out(0, key=key), 0)) == 2, "it was called once before"
    assert outcome(server.run(quick(3), 0)) == "success"
