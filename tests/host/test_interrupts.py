"""An interrupt ends the jobs it names, all of them, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.host.jobs import (
    held,
    hold,
    interrupt,
    meet,
    message,
    new_key,
    outcome,
    progress,
    queue_ids,
    quick,
    release,
    run_on_each,
    start_held,
)
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer, WebSocketClient
from tests.host.storm import Storm
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

NUM_SLOTS = 4
SLOTS = range(NUM_SLOTS)
ROUNDS = 10


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots=",".join(["cpu"] * NUM_SLOTS))


@pytest.fixture
def client(server: HostServer) -> WebSocketClient:
    return server.websocket()


def assert_all_slots_work(server: HostServer) -> None:
    entries = run_on_each(server, [progress(random.getrandbits(60)) for _ in SLOTS])
    assert [outcome(entry) for entry in entries] == ["success"] * NUM_SLOTS
    assert [entry["gpu_id"] for entry in entries] == list(SLOTS)


# What each kind of request reaches.


@pytest.mark.parametrize("slot", SLOTS)
def test_an_id_ends_that_job_only(server: HostServer, slot: int) -> None:
    with held(server, *SLOTS) as running:
        interrupt(server, running[slot])
        entry = server.wait([running[slot]])[running[slot]]
        still_running, _ = queue_ids(server)
        assert set(still_running) == set(running) - {running[slot]}
    assert outcome(entry) == "interrupted"
    assert message(entry, "execution_interrupted")["node_id"] == "hold"
    assert entry["gpu_id"] == slot


def test_without_id_all_running_jobs_end_and_no_waiting_one(server: HostServer) -> None:
    with held(server, *SLOTS) as running:
        waiting = [server.submit(progress(slot), slot)["prompt_id"] for slot in SLOTS]
        waiting.append(server.submit(progress(NUM_SLOTS))["prompt_id"])
        interrupt(server)
        ended = server.wait(running)
        done = server.wait(waiting)
    assert {outcome(entry) for entry in ended.values()} == {"interrupted"}
    assert {outcome(entry) for entry in done.values()} == {"success"}


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"prompt_id": null}', b'{"prompt_id": ""}'])
def test_every_way_of_naming_no_job_means_all(server: HostServer, body: bytes | None) -> None:
    with held(server, 0, 3) as running:
        status, reply = server.request("POST", "/interrupt", data=body)
        assert status == 200, reply
        assert [outcome(entry) for entry in server.wait(running).values()] == ["interrupted"] * 2


@pytest.mark.parametrize("path", ["/interrupt", "/api/interrupt"])
@pytest.mark.parametrize("slot", [0, 2])
def test_the_header_alone_ends_that_slots_job(server: HostServer, slot: int, path: str) -> None:
    with held(server, *SLOTS) as running:
        status, reply = server.request("POST", path, headers={"X-TARGET-GPU": str(slot)})
        assert status == 200, reply
        entry = server.wait([running[slot]])[running[slot]]
        assert set(queue_ids(server)[0]) == set(running) - {running[slot]}
    assert outcome(entry) == "interrupted"


def test_the_header_auto_means_all(server: HostServer) -> None:
    with held(server, 1, 2) as running:
        interrupt(server, slot="auto")
        assert [outcome(entry) for entry in server.wait(running).values()] == ["interrupted"] * 2


def test_an_id_wins_over_the_header(server: HostServer) -> None:
    with held(server, 0, 1) as (kept, named):
        interrupt(server, named, slot=0)
        assert outcome(server.wait([named])[named]) == "interrupted"
        assert queue_ids(server)[0] == [kept]


@pytest.mark.parametrize("slot", [None, 0])
def test_an_unknown_id_ends_nothing(server: HostServer, slot: int | None) -> None:
    with held(server, 0, 1) as running:
        interrupt(server, new_key(), slot)
        assert queue_ids(server)[0] == running
        assert_runs_next_to(server, running)


def test_a_waiting_job_is_not_interrupted_later(server: HostServer) -> None:
    with held(server, 0, 1) as running:
        waiting = server.submit(progress(1), 1)["prompt_id"]
        interrupt(server, waiting)
        assert queue_ids(server) == (running, [waiting])
        release(server, running[1])
        assert outcome(server.wait([waiting])[waiting]) == "success"


def test_a_finished_job_passes_nothing_on(server: HostServer) -> None:
    finished = server.submit(quick(random.getrandbits(60)), 2)["prompt_id"]
    server.wait([finished])
    with held(server, 2) as running:
        interrupt(server, finished)
        assert_runs_next_to(server, running)
        assert queue_ids(server)[0] == running


def assert_runs_next_to(server: HostServer, running: list[str]) -> None:
    """A job of the fourth slot runs to its end, and what ran before still does."""
    assert outcome(server.run(progress(random.getrandbits(60)), 3)) == "success"
    assert queue_ids(server)[0] == running


@pytest.mark.parametrize("slot", [None, *SLOTS])
def test_interrupting_idle_slots_leaves_no_flag(server: HostServer, slot: int | None) -> None:
    for _ in range(3):
        interrupt(server, slot=slot)
    interrupt(server, new_key(), slot)
    assert_all_slots_work(server)


# Moments at which an interrupt used to get lost.

REQUESTS: dict[str, Callable[[HostServer, str], None]] = {
    "id": lambda server, job_id: interrupt(server, job_id),
    "slot": lambda server, job_id: interrupt(server, slot=1),
    "all": lambda server, job_id: interrupt(server),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_interrupt_between_taking_and_starting_a_job(server: HostServer, tmp_path: Path, kind: str) -> None:
    start = tmp_path / "start"
    job_id = server.submit(hold(), 1, extra_data={"start_after": str(start)})["prompt_id"]
    await_running(server, job_id)
    REQUESTS[kind](server, job_id)
    start.touch()
    assert outcome(server.wait([job_id])[job_id]) == "interrupted"
    assert_all_slots_work(server)


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_interrupt_as_soon_as_the_job_shows_up(server: HostServer, kind: str) -> None:
    for _ in range(ROUNDS):
        job_id = server.submit(hold(), 1)["prompt_id"]
        await_running(server, job_id)
        REQUESTS[kind](server, job_id)
        assert outcome(server.wait([job_id])[job_id]) == "interrupted"
    assert_all_slots_work(server)


def await_running(server: HostServer, job_id: str) -> None:
    while job_id not in queue_ids(server)[0]:
        assert job_id not in server.request("GET", f"/history/{job_id}")[1]


def test_an_interrupt_survives_the_start_of_another_job(server: HostServer, client: WebSocketClient) -> None:
    for _ in range(ROUNDS):
        key = new_key()
        named = server.submit(meet_then_hold(key), 0, client.client_id)["prompt_id"]
        client.wait_for(is_executing("meet", named))
        interrupt(server, named)  # The job is in the meeting, where it does not look at its flag.
        other = server.submit(meet(key, 2), 1)["prompt_id"]
        entries = server.wait([named, other])
        assert outcome(entries[named]) == "interrupted"
        assert outcome(entries[other]) == "success"


def test_an_interrupt_and_then_the_next_job_of_the_same_slot(server: HostServer, client: WebSocketClient) -> None:
    for _ in range(ROUNDS):
        ended = start_held(server, client, 0)
        interrupt(server, ended)
        following = server.submit(progress(random.getrandbits(60)), 0)["prompt_id"]
        entries = server.wait([ended, following])
        assert [outcome(entries[job_id]) for job_id in (ended, following)] == ["interrupted", "success"]


def meet_then_hold(key: str) -> Workflow:
    return {
        "meet": node("CPTRendezvous", key=key, parties=2, timeout=120.0),
        "hold": node("CPTSleep", seconds=60.0, seed=["meet", 0]),
        "out": node("CPTOut", value=["hold", 0]),
    }


def is_executing(node_id: str, job_id: str) -> Callable[[JSON], bool]:
    def matches(event: JSON) -> bool:
        data: Any = event["data"]
        return event["type"] == "executing" and data.get("prompt_id") == job_id and data["node"] == node_id

    return matches


def test_ending_the_job_by_the_newer_hosts_route(server: HostServer) -> None:
    with held(server, 0, 1) as running:
        status, reply = server.request("POST", f"/api/jobs/{running[1]}/cancel")
        if status in (404, 405):
            pytest.skip("this host has no POST /api/jobs/{id}/cancel")
        assert (status, reply) == (200, {"cancelled": True})
        assert outcome(server.wait([running[1]])[running[1]]) == "interrupted"
        assert queue_ids(server)[0] == running[:1]


def test_the_client_learns_of_its_own_jobs_end_only(server: HostServer) -> None:
    with server.websocket() as first, server.websocket() as second:
        jobs = {first: start_held(server, first, 0), second: start_held(server, second, 1)}
        interrupt(server, jobs[first])
        end = first.wait_for_end(jobs[first])
        release(server, jobs[second])
        second.wait_for_end(jobs[second])
        told = {client: [e["data"]["prompt_id"] for e in client.of_type("execution_interrupted")] for client in jobs}
    assert end["type"] == "execution_interrupted"
    assert end["data"]["gpu_id"] == 0
    assert told == {client: [job_id] for client, job_id in jobs.items()}


# Many at random moments, while short jobs run on all slots.


def test_300_interrupts_by_id_at_random_moments(server: HostServer) -> None:
    with Storm(server, NUM_SLOTS, seed=1) as storm, ThreadPoolExecutor(NUM_SLOTS) as pool:
        list(pool.map(storm.interrupt_by_id, range(300)))
    assert storm.wrong_by_id() == []
    assert storm.count("interrupted") >= 100, "too few interrupts met a running job to mean anything"
    assert_all_slots_work(server)


def test_120_interrupts_by_header_at_random_moments(server: HostServer) -> None:
    with Storm(server, NUM_SLOTS, seed=2) as storm, ThreadPoolExecutor(NUM_SLOTS) as pool:
        list(pool.map(storm.interrupt_slot, range(120)))
    assert storm.wrong_by_scope() == []
    assert storm.count("interrupted") >= 60
    assert_all_slots_work(server)


def test_80_interrupts_of_everything_at_random_moments(server: HostServer) -> None:
    with Storm(server, NUM_SLOTS, seed=3) as storm:
        for number in range(80):
            storm.interrupt_all(number)
    assert storm.wrong_by_scope() == []
    assert storm.count("interrupted") >= 80
    assert_all_slots_work(server)
