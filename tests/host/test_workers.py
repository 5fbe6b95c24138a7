"""A worker that a node ends is started again: that node's job fails, and nothing else notices."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import await_idle, held, message, new_key, outcome, quick, release, shown, slots_shown, start_held
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

NUM_SLOTS = 2
SLOTS = range(NUM_SLOTS)
DRAWS = 200
SECRETS = {"api_key_comfy_org": "secret-key-5f2c", "auth_token_comfy_org": "secret-token-81d7"}
PAGES = ("/queue", "/queue/all", "/debug/queues", "/metrics", "/history", "/api/jobs")


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def kill() -> Workflow:
    return {"kill": node("CPTKill"), "end": node("CPTOut", value=["kill", 0])}


def fail() -> Workflow:
    return {"fail": node("CPTFail", message="as nodes do"), "end": node("CPTOut", value=["fail", 0])}


def draw(seed: int) -> Workflow:
    return {"draw": node("CPTRandom", seed=seed, rounds=DRAWS), "out": node("CPTOut", value=["draw", 0])}


def meet_and_draw(key: str) -> Workflow:
    """Waits for another job with this key; both then draw with the seed 2, the number of jobs."""
    meeting = node("CPTRendezvous", key=key, parties=2, timeout=60.0)
    return {**draw(0), "meet": meeting, "draw": node("CPTRandom", seed=["meet", 0], rounds=DRAWS)}


def restarts(server: HostServer) -> list[int]:
    """How often each slot's worker was started again; it counts that before it takes its next job."""
    for slot in SLOTS:
        assert outcome(server.run(quick(0), slot)) == "success"
    return [queue["metrics"]["worker_restarts"] for queue in slots_shown(server)]


# The job that ended its worker.


@pytest.mark.parametrize("slot", SLOTS)
def test_its_history_holds_the_reason(server: HostServer, slot: int) -> None:
    job_id = server.submit(kill(), slot, "somebody")["prompt_id"]
    entry = server.wait([job_id])[job_id]
    assert outcome(entry) == "error"
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["completed"] is False
    assert entry["gpu_id"] == slot
    error = message(entry, "execution_error")
    assert (error["node_id"], error["node_type"]) == ("kill", "CPTKill")
    assert error["exception_type"] == "SystemExit"
    assert error["exception_message"].endswith("killed by test")
    assert any("killed by test" in line for line in error["traceback"])


def test_without_a_client_its_history_names_no_node(server: HostServer) -> None:
    """The host notes the running node for a client only; clients check that node_id is a string."""
    error = message(server.run(kill(), 0), "execution_error")
    assert {type(error[name]) for name in ("node_id", "node_type")} == {str}


def test_its_fields_are_those_of_an_ordinary_failure(server: HostServer) -> None:
    killed, failed = (message(server.run(job, 0), "execution_error") for job in (kill(), fail()))
    assert kinds(killed) == kinds(failed)


def kinds(data: JSON) -> dict[str, type]:
    return {name: type(value) for name, value in data.items()}


@pytest.mark.parametrize("slot", SLOTS)
def test_its_client_is_told_and_nobody_else(server: HostServer, slot: int) -> None:
    with server.websocket() as client, server.websocket() as other:
        job_id = server.submit(kill(), slot, client.client_id)["prompt_id"]
        error = client.wait_for_end(job_id)
        end = client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] is None)
        last = server.submit(quick(1), client_id=other.client_id)["prompt_id"]
        other.wait_for_end(last)
        assert {event["data"].get("prompt_id", last) for event in other.events} == {last}
    assert error["type"] == "execution_error"
    assert error["data"]["exception_type"] == "SystemExit"
    assert error["data"]["node_id"] == "kill"
    assert (error["data"]["gpu_id"], end["data"]["gpu_id"]) == (slot, slot)
    assert end["data"]["prompt_id"] == job_id


def test_its_client_comes_back_to_no_running_node(server: HostServer) -> None:
    with server.websocket() as client:
        client.wait_for_end(server.submit(kill(), 1, client.client_id)["prompt_id"])
        client.close()
        await_idle(server)  # The host has noticed by now: it would drop a new connection with the same name.
        with server.websocket(client.client_id) as back:
            back.wait_for(lambda event: event["type"] == "status")
            job_id = server.submit(quick(2), 0, back.client_id)["prompt_id"]
            back.wait_for_end(job_id)
            told = {event["data"].get("prompt_id") for event in back.of_type("executing")}
    assert told <= {job_id}


# The slot that it ran on.


@pytest.mark.parametrize("slot", SLOTS)
def test_the_jobs_behind_it_run_on_the_same_slot(server: HostServer, slot: int) -> None:
    before = restarts(server)
    workflows = [kill(), quick(10), quick(11), kill(), kill(), quick(12)]
    with held(server, slot) as running:
        ids = [server.submit(workflow, slot)["prompt_id"] for workflow in workflows]
        assert slots_shown(server)[slot]["pending"] == ids
        release(server, *running)
        entries = server.wait(ids)
    assert [outcome(entries[i]) for i in ids] == ["error", "success", "success", "error", "error", "success"]
    assert [shown(entries[i]) for i in ids if outcome(entries[i]) == "success"] == [10, 11, 12]
    assert {entry["gpu_id"] for entry in entries.values()} == {slot}
    assert [i for i in server.request("GET", "/history")[1] if i in entries] == ids
    assert restarts(server) == [count + 3 * (index == slot) for index, count in enumerate(before)]


def test_many_kills_for_any_slot_end_all_and_leave_all_slots_working(server: HostServer) -> None:
    before = restarts(server)
    with held(server, *SLOTS):
        killed = [server.submit(kill())["prompt_id"] for _ in range(12)]
        others = [server.submit(quick(20 + number))["prompt_id"] for number in range(6)]
    ended, entries = server.wait(killed), server.wait(others)
    assert {outcome(entry) for entry in ended.values()} == {"error"}
    assert [shown(entries[job_id]) for job_id in others] == list(range(20, 26))
    ran_on = [entry["gpu_id"] for entry in ended.values()]
    assert restarts(server) == [count + ran_on.count(slot) for slot, count in enumerate(before)]


def test_its_state_and_restarts_are_shown(server: HostServer) -> None:
    before = restarts(server)
    server.run(kill(), 1)
    assert restarts(server) == [before[0], before[1] + 1]
    assert [queue["state"] for queue in slots_shown(server)] == ["idle", "idle"]
    with held(server, 1):
        assert [queue["state"] for queue in slots_shown(server)] == ["idle", "running"]
    count = f'comfy_parallel_worker_restarts_total{{device="cpu",gpu_id="1"}} {before[1] + 1}.0'
    assert count in server.request("GET", "/metrics")[1]
    assert server.log().count("slot 1 (cpu): worker died") == before[1] + 1


@pytest.mark.parametrize(("bad", "num_restarts", "cached"), [(fail(), 0, ["value", "out"]), (kill(), 1, [])])
def test_an_ordinary_failure_restarts_nothing(
    server: HostServer, bad: Workflow, num_restarts: int, cached: list[str]
) -> None:
    """A worker that goes on has its results cached; a new one has not."""
    before = restarts(server)
    assert outcome(server.run(quick(30), 0)) == "success"
    assert outcome(server.run({**quick(30), **bad}, 0)) == "error"
    entry = server.run(quick(30), 0)
    assert sorted(message(entry, "execution_cached")["nodes"]) == sorted(cached)
    assert outcome(entry) == "success"
    assert restarts(server) == [before[0] + num_restarts, before[1]]


# The other slot.


@pytest.mark.parametrize("slot", SLOTS)
def test_the_other_slots_job_goes_on(server: HostServer, slot: int) -> None:
    with server.websocket() as client:
        steps = {"work": node("CPTProgress", steps=100_000, ms=1, seed=1), "out": node("CPTOut", value=["work", 0])}
        job_id = server.submit(steps, slot, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "progress")
        for _ in range(3):
            assert outcome(server.run(kill(), 1 - slot)) == "error"
            done = client.of_type("progress")[-1]["data"]["value"]
            client.wait_for(lambda event, done=done: event["type"] == "progress" and event["data"]["value"] > done)  # type: ignore[misc]
        assert outcome(release(server, job_id)[job_id]) == "interrupted"
        assert {event["data"]["gpu_id"] for event in client.of_type("progress")} == {slot}


@pytest.mark.parametrize("slot", SLOTS)
def test_the_other_slots_result_is_right(server: HostServer, slot: int) -> None:
    expected = shown(server.run(draw(2), slot))
    assert expected != shown(server.run(draw(3), slot))
    key = new_key()
    with server.websocket() as client:
        first = server.submit(meet_and_draw(key), slot, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] == "meet")
        for _ in range(2):
            assert outcome(server.run(kill(), 1 - slot)) == "error"
        second = server.submit(meet_and_draw(key), 1 - slot)["prompt_id"]
        entries = server.wait([first, second])
    assert [shown(entries[job_id]) for job_id in (first, second)] == [expected, expected]


# What no page may show.


def test_keys_sent_with_a_job_are_never_shown(server: HostServer) -> None:
    extra_data = {**SECRETS, "note": "not secret"}
    pages: list[str] = []
    with held(server, 1), server.websocket() as client:
        running = server.submit(keyed("hold"), 0, client.client_id, extra_data=extra_data)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] == "hold")
        waiting = [
            server.submit(workflow, slot, extra_data=extra_data)["prompt_id"]
            for workflow in (quick(40), kill(), fail())
            for slot in (*SLOTS, None)
        ]
        pages += all_pages(server, [running, *waiting])
        release(server, running)
    server.wait(waiting)
    pages += all_pages(server, [running, *waiting])
    told = json.dumps(client.events)
    for secret in SECRETS.values():
        assert not [page for page in (*pages, told, server.log()) if secret in page]
    assert sum("not secret" in page for page in pages) >= 6, "the pages show what is no secret"


def keyed(name: str) -> Workflow:
    return {name: node("CPTSleep", seconds=60.0, seed=4), "out": node("CPTOut", value=[name, 0])}


def all_pages(server: HostServer, job_ids: list[str]) -> list[str]:
    paths = [*PAGES, *(f"{page}/{job_id}" for page in ("/history", "/api/jobs") for job_id in job_ids)]
    return [json.dumps(server.request("GET", path)[1]) for path in paths]


# Stopping.


def test_it_stops_while_all_slots_work_as_stock_does(
    server: HostServer, make_server: MakeServer, with_default_signals: None
) -> None:
    """The last test: it ends the module's host."""
    with ThreadPoolExecutor(2) as pool:
        stocks = pool.submit(lambda: stop_by_both(make_server(slots=None)))
        ours = pool.submit(lambda: [stop_at_work(server, signal.SIGTERM), stop_at_work(make_server(), signal.SIGINT)])
    assert ours.result() == stocks.result() == [-signal.SIGTERM, 0]


def stop_by_both(server: HostServer) -> list[int | None]:
    by_term = stop_at_work(server, signal.SIGTERM)
    server.start()
    return [by_term, stop_at_work(server, signal.SIGINT)]


def stop_at_work(server: HostServer, number: int) -> int | None:
    """The exit status; a host that does not obey within seconds gets SIGKILL, and has that one's."""
    watcher = server.websocket()
    for slot in SLOTS if server.slots else [None]:
        start_held(server, watcher, slot)
    return server.stop(signal_number=number)
