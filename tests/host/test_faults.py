"""However a node ends, its job fails with the reason, its slot works on, and the other slot notices nothing."""

from __future__ import annotations

import pytest

from tests.host.jobs import message, outcome, quick, shown
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

KINDS = {
    "exit": "SystemExit",
    "keyboard": "KeyboardInterrupt",
    "generator": "GeneratorExit",
    "cancelled": "CancelledError",
    "own": "Own",
    "stop": "StopIteration",
    "stop_async": "StopAsyncIteration",
    "recursion": "RecursionError",
    "cause": "ValueError",
    "outside": "Own",
}


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def raises(kind: str) -> Workflow:
    return {"bad": node("CPTRaises", kind=kind), "out": node("CPTOut", value=["bad", 0])}


def test_an_error_that_its_node_keeps_holds_nothing_of_the_jobs_that_it_ended(server: HostServer) -> None:
    def go(raises: bool) -> Workflow:
        return {"go": node("CPTKeptError", raises=raises), "out": node("CPTOut", value=["go", 0])}

    for _ in range(2):
        entry = server.run(go(True), 0)
        assert "one and the same object" in message(entry, "execution_error")["exception_message"]
        assert message(entry, "execution_error")["traceback"]
    assert shown(server.run(go(False), 0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_its_job_fails_and_nothing_else(server: HostServer, kind: str) -> None:
    with server.websocket() as client:
        job_id = server.submit(raises(kind), 0, client.client_id)["prompt_id"]
        number = 700 + 2 * list(KINDS).index(kind)  # ComfyUI does not show cached results to jobs without a client.
        other = server.submit(quick(number), 1)["prompt_id"]
        end = client.wait_for_end(job_id, 60)
        entries = server.wait([job_id, other])
    assert (end["type"], end["data"]["prompt_id"]) == ("execution_error", job_id)
    error = message(entries[job_id], "execution_error")
    if kind != "stop":  # A coroutine cannot raise it: Python makes another error of it.
        assert error["exception_type"].rpartition(".")[2] == KINDS[kind]
    assert (outcome(entries[other]), shown(entries[other])) == ("success", number)
    entry = server.run(quick(number + 1), 0)
    assert (outcome(entry), shown(entry), entry["gpu_id"]) == ("success", number + 1, 0)
