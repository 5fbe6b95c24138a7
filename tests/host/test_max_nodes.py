"""A job with more nodes than the server takes is refused, or ends as an error when it makes them itself."""

from __future__ import annotations

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import message, outcome, quick
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

MOST = 20


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    return make_module_server(env={"COMFY_PARALLEL_MAX_NODES": str(MOST)})


def wide(nodes: int) -> Workflow:
    """So many nodes, half of which show a number."""
    values = {str(number): node("CPTConstInt", value=number) for number in range(nodes - nodes // 2)}
    return values | {f"out {number}": node("CPTOut", value=[str(number), 0]) for number in range(nodes // 2)}


def test_up_to_the_limit_jobs_run(server: HostServer) -> None:
    assert outcome(server.run(wide(MOST))) == "success"


def test_one_more_is_refused_with_the_number_the_limit_and_the_variable(server: HostServer) -> None:
    status, reply = server.request("POST", "/prompt", {"prompt": wide(MOST + 1)})
    error = reply["error"]
    assert (status, error["type"], reply["node_errors"]) == (400, "too_many_nodes", {})
    assert error["message"] == f"the job has {MOST + 1} nodes, and this server takes at most {MOST}"
    assert "COMFY_PARALLEL_MAX_NODES" in error["details"]
    assert server.request("GET", "/queue/all")[1]["total_pending"] == 0


def test_a_job_that_makes_too_many_ends_as_an_error_that_says_so(server: HostServer) -> None:
    def expanding(count: int) -> Workflow:
        return {"sum": node("CPTExpand", base=1, count=count), "out": node("CPTOut", value=["sum", 0])}

    assert outcome(server.run(expanding(3), 1)) == "success"
    entry = server.run(expanding(MOST), 1)
    assert outcome(entry) == "error"
    error = message(entry, "execution_error")
    assert f"at most {MOST}" in error["exception_message"]
    assert "COMFY_PARALLEL_MAX_NODES" in error["exception_message"]
    assert error["node_id"] == "sum"
    assert outcome(server.run(quick(1), 1)) == "success"
