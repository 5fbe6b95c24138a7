"""What clients may send to stock, and jobs that end whatever their nodes' errors do, hold for N slots too."""

from __future__ import annotations

import random
import time
import uuid

import pytest

from tests.host.jobs import await_idle, held, hold, interrupt, message, outcome, queue_ids, quick, shown
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


@pytest.mark.parametrize("slot", [1, None])
def test_jobs_with_one_id_run_in_turn(server: HostServer, slot: int | None) -> None:
    same, value = str(uuid.uuid4()), random.getrandbits(40)
    with server.websocket() as client:
        server.submit(hold(1), 0, client.client_id, prompt_id=same)
        client.wait_for(lambda event: event["type"] == "executing" and event["data"].get("node") == "hold")
        server.submit(quick(value), slot, prompt_id=same)
        other = server.submit(quick(6))["prompt_id"]
        assert server.wait([other])[other]["gpu_id"] == 1, "others do not wait for it"
        time.sleep(0.3)
        assert queue_ids(server) == ([same], [same])
        interrupt(server, same)
        assert client.wait_for_end(same)["type"] == "execution_interrupted"
        await_idle(server)
    entry = server.wait([same])[same]
    assert (outcome(entry), shown(entry)) == ("success", value)


@pytest.mark.parametrize(("targets", "status"), [("out", 200), ("out and more", 200), (["out"], 200), ("value", 400)])
def test_the_nodes_to_execute_may_be_named_in_a_string(
    server: HostServer, targets: str | list[str], status: int
) -> None:
    value = random.getrandbits(40)
    body = {"prompt": quick(value), "partial_execution_targets": targets}
    answer, reply = server.request("POST", "/prompt", body)
    assert answer == status, reply
    if status == 200:
        assert shown(server.wait([reply["prompt_id"]])[reply["prompt_id"]]) == value


def unprintable(kind: str) -> Workflow:
    return {"fail": node("CPTUnprintable", kind=kind), "out": node("CPTOut", value=["fail", 0])}


@pytest.mark.parametrize("kind", ["Unspeakable", "Unshowable", "Leaving"])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_job_ends_although_its_error_cannot_be_shown(server: HostServer, kind: str, slot: int) -> None:
    with server.websocket() as client:
        job_id = server.submit(unprintable(kind), slot, client.client_id)["prompt_id"]
        assert client.wait_for_end(job_id)["type"] == "execution_error"
    entry = server.wait([job_id])[job_id]
    assert (outcome(entry), entry["gpu_id"]) == ("error", slot)
    assert message(entry, "execution_error")["node_id"] == "fail"
    await_idle(server)
    assert [queue["running"] for queue in server.request("GET", "/queue/all")[1]["queues"]] == [[], []]
    following = server.run(quick(8), slot)
    assert (outcome(following), following["gpu_id"]) == ("success", slot)


def test_the_job_list_says_where_each_of_many_jobs_is(server: HostServer) -> None:
    if server.request("GET", "/api/jobs")[0] == 404:
        pytest.skip("this host has no job list")
    with held(server, 0, 1) as running:
        waiting = [server.submit(quick(number), number % 2)["prompt_id"] for number in range(300)]
        began = time.monotonic()
        jobs = {job["id"]: job["gpu_id"] for job in server.request("GET", "/api/jobs")[1]["jobs"]}
        assert time.monotonic() - began < 30
        assert [jobs[job_id] for job_id in running] == [0, 1]
        assert [jobs[job_id] for job_id in waiting] == [number % 2 for number in range(300)]
        server.request("POST", "/queue", {"clear": True})
