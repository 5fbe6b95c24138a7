"""A slot that fails all its jobs is suspended and tried again; jobs that fail everywhere cost no slot."""

from __future__ import annotations

import pytest

from tests.host.jobs import await_states, outcome, slots_shown
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

NUM_JOBS = 40


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu,cpu")


def breaks(slots: str) -> Workflow:
    return {"work": node("CPTBreaks", slots=slots), "out": node("CPTOut", value=["work", 0])}


def test_a_broken_slot_does_not_swallow_all_jobs(server: HostServer) -> None:
    entries = [server.run(breaks("0")) for _ in range(NUM_JOBS)]  # One after the other: the first slot is always idle.
    failed = [entry for entry in entries if outcome(entry) == "error"]
    assert {entry["gpu_id"] for entry in failed} == {0}
    assert 5 <= len(failed) <= 7
    shown = await_states(server, ["suspended", "idle", "idle"])
    assert "failed 5 jobs in a row" in shown[0]["why_suspended"]
    assert shown[0]["metrics"]["suspensions"] >= 1
    health = server.request("GET", "/health")[1]["slots"]
    assert [slot["state"] for slot in health] == ["suspended", "idle", "idle"]
    assert "failed 5 jobs" in health[0]["error"]
    assert 'comfy_parallel_slot_suspended{device="cpu",gpu_id="0"} 1.0' in server.request("GET", "/metrics")[1]
    assert "slot 0 (cpu) is suspended: it failed 5 jobs in a row" in server.log()
    bound = server.submit(breaks(""), 0)["prompt_id"]  # It waits until the slot is tried again.
    entry = server.wait([bound])[bound]
    assert (outcome(entry), entry["gpu_id"]) == ("success", 0)
    shown = await_states(server, ["idle"] * 3)
    assert shown[0]["why_suspended"] is None


def test_jobs_that_fail_everywhere_suspend_no_slot_for_long(server: HostServer) -> None:
    entries = [server.run(breaks("012")) for _ in range(NUM_JOBS)]
    assert {outcome(entry) for entry in entries} == {"error"}
    await_states(server, ["idle"] * 3)
    assert "is resumed: its jobs failed on other slots as well" in server.log()
    assert [outcome(server.run(breaks(""), slot)) for slot in range(3)] == ["success"] * 3


def test_an_operator_resumes_it_at_once(server: HostServer) -> None:
    for number in range(9):  # One client's jobs that are bound to it say nothing of a slot, two kinds of jobs do.
        server.run(breaks("1"), 1)
        assert slots_shown(server)[1]["state"] != "suspended", number
    server.run({**breaks("1"), "more": node("CPTOut", value=["one", 0]), "one": node("CPTConstInt", value=1)}, 1)
    await_states(server, ["idle", "suspended", "idle"])
    status, reply = server.request("POST", "/parallel/resume", {}, headers={"X-TARGET-GPU": "1"})
    assert status == 200
    assert reply["slots"][0]["state"] in ("idle", "starting"), "its worker may be on its way back from the last job"
    assert outcome(server.run(breaks(""), 1)) == "success"
