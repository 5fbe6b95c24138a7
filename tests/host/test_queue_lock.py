"""A job that keeps the queue's lock stops nobody else, and it is said which job that is."""

from __future__ import annotations

import pytest

from tests.host.jobs import interrupt, outcome, quick
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

TAKEN = "has not given back the queue's lock"


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def locks(kind: str) -> Workflow:
    return {"lock": node("CPTLock", kind=kind), "out": node("CPTOut", value=["lock", 0])}


def test_a_job_that_holds_it_for_ever_stops_only_itself(server: HostServer) -> None:
    told = server.log().count(TAKEN)
    stuck = server.submit(locks("holds"), 0)["prompt_id"]
    assert [outcome(server.run(quick(number), 1)) for number in (900, 901)] == ["success"] * 2
    assert server.request("GET", "/queue/all")[1]["queues"][0]["running"] == [stuck]
    interrupt(server, stuck)
    assert outcome(server.wait([stuck])[stuck]) == "interrupted"
    assert outcome(server.run(quick(902), 0)) == "success"
    log = server.log()
    assert log.count(TAKEN) == told + 1
    assert f"slot 0 (cpu): job {stuck} {TAKEN}" in log
    assert "locks.py" in log, "where the job is"


@pytest.mark.parametrize("kind", ["leaves", "loop"])
def test_a_job_that_would_wait_for_itself_ends(server: HostServer, kind: str) -> None:
    assert outcome(server.run(locks(kind), 0)) == "success"
    ids = [server.submit(quick(910 + number), number % 2)["prompt_id"] for number in range(4)]
    assert {outcome(entry) for entry in server.wait(ids).values()} == {"success"}
