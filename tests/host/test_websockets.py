"""Each client hears of its own jobs, of all that happens to them, and of nobody else's, on whatever slot they run."""

from __future__ import annotations

import io
import json
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from tests.host.jobs import await_idle, held, interrupt, outcome, queue_ids, quick, release, start_held
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer, WebSocketClient
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

NUM_JOBS = 100
STEPS = 4
PLAIN_PREVIEW, PREVIEW_WITH_METADATA = 1, 4  # the host's BinaryEventTypes
JPEG = 1
JPEG_ERROR = 3
REDS = (0, 200)  # of the first and of the second client's previews


@dataclass
class Traffic:
    """What two clients, and one that submits nothing, heard while 100 jobs ran."""

    clients: list[WebSocketClient]
    listener: WebSocketClient
    owner: dict[str, int]
    number: dict[str, int]
    history: dict[str, JSON]

    def events(self, client: int) -> list[JSON]:
        return [event for event in self.clients[client].events if "prompt_id" in event["data"]]

    def events_of(self, job_id: str) -> list[JSON]:
        return [event for event in self.events(self.owner[job_id]) if event["data"]["prompt_id"] == job_id]

    def jobs_of(self, client: int) -> list[str]:
        return [job_id for job_id, owner in self.owner.items() if owner == client]

    def colour(self, job_id: str) -> tuple[int, int, int]:
        return colour(self.owner[job_id], self.number[job_id])


def colour(client: int, number: int) -> tuple[int, int, int]:
    """Red tells the client, green and blue the job, far enough apart for a JPEG."""
    return REDS[client], number % 10 * 25, number // 10 * 25


def traffic_job(client: int, number: int) -> Workflow:
    """Reports with previews, then from a thread of the node's own. Node names tell the job."""
    red, green, blue = colour(client, number)
    seed = red | green << 8 | blue << 16 | (number + 1) << 24
    return {
        f"work{number}": node("CPTProgress", steps=STEPS, ms=2, seed=seed),
        f"thread{number}": node("CPTThreadProgress", steps=STEPS, seed=seed),
        f"out{number}": node("CPTOut", value=[f"work{number}", 0]),
        f"last{number}": node("CPTOut", value=[f"thread{number}", 0]),
    }


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


@pytest.fixture(scope="module")
def traffic(server: HostServer) -> Iterator[Traffic]:
    with ExitStack() as connected:
        clients = [
            connected.enter_context(server.websocket()),
            connected.enter_context(server.websocket(supports_preview_metadata=True)),
        ]
        clients[1].wait_for(lambda event: event["type"] == "feature_flags")
        listener = connected.enter_context(server.websocket())
        owner, number = {}, {}
        with held(server, 0, 1):  # so that both slots then work through full queues
            for index in range(NUM_JOBS):
                client, slot = index % 2, index // 2 % 2  # each client uses both slots
                job_id = server.submit(traffic_job(client, index), slot, clients[client].client_id)["prompt_id"]
                owner[job_id], number[job_id] = client, index
        history = server.wait(owner)
        # The events of one client keep their order: after this job's last one, all have come.
        for index, client_socket in enumerate([*clients, listener]):
            last = server.submit(quick(10**6 + index), client_id=client_socket.client_id)["prompt_id"]
            client_socket.wait_for(lambda event, last=last: is_end_of_job(event, last))  # type: ignore[misc]
            owner[last], number[last] = index, -1
        jobs = {job_id: client for job_id, client in owner.items() if number[job_id] >= 0}
        yield Traffic(clients, listener, jobs, number, history)


def is_end_of_job(event: JSON, job_id: str) -> bool:
    data: Any = event["data"]
    return event["type"] == "executing" and data.get("prompt_id") == job_id and data["node"] is None


def test_the_jobs_ran_on_both_slots_for_both_clients(traffic: Traffic) -> None:
    ran = Counter((traffic.owner[job_id], entry["gpu_id"]) for job_id, entry in traffic.history.items())
    assert ran == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], NUM_JOBS // 4)
    assert {outcome(entry) for entry in traffic.history.values()} == {"success"}


@pytest.mark.parametrize("client", [0, 1])
def test_a_client_hears_of_its_own_jobs_only(traffic: Traffic, client: int) -> None:
    heard = {event["data"]["prompt_id"] for event in traffic.events(client)}
    others = set(traffic.jobs_of(1 - client))
    assert heard & others == set()
    assert heard >= set(traffic.jobs_of(client))


def test_a_client_without_jobs_hears_of_none(traffic: Traffic) -> None:
    heard = {event["data"]["prompt_id"] for event in traffic.listener.events if "prompt_id" in event["data"]}
    assert heard & set(traffic.owner) == set()
    assert traffic.listener.frames == []


def test_every_event_of_a_job_names_its_own_nodes(traffic: Traffic) -> None:
    for job_id, number in traffic.number.items():
        if number < 0:
            continue
        own = {f"{name}{number}" for name in ("work", "thread", "out", "last")}
        for event in traffic.events_of(job_id):
            data = event["data"]
            assert set(data.get("nodes", ())) <= own, event
            assert data.get("node") in {None, *own}, event
            if event["type"] == "progress_state":
                assert {state["prompt_id"] for state in data["nodes"].values()} == {job_id}


def test_every_job_tells_its_whole_course_in_order(traffic: Traffic) -> None:
    for job_id in traffic.owner:
        number = traffic.number[job_id]
        events = traffic.events_of(job_id)
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["execution_start", "execution_cached"]
        assert [kind for kind in kinds if kind.startswith("execution_")][2:] == ["execution_success"]
        running = [event["data"]["node"] for event in events if event["type"] == "executing"]
        assert set(running[:-1]) == {f"{name}{number}" for name in ("work", "thread", "out", "last")}
        assert running[-1] is None
        assert kinds[-1] == "executing"
        executed = {e["data"]["node"]: e["data"]["output"]["value"] for e in events if e["type"] == "executed"}
        assert executed[f"out{number}"] == [list(traffic.colour(job_id))]
        assert set(executed) == {f"out{number}", f"last{number}"}


@pytest.mark.parametrize("name", ["work", "thread"])
def test_every_job_reports_its_own_progress(traffic: Traffic, name: str) -> None:
    for job_id, number in traffic.number.items():
        if number < 0:
            continue
        reports = [e["data"] for e in traffic.events_of(job_id) if e["type"] == "progress"]
        values = [report["value"] for report in reports if report["node"] == f"{name}{number}"]
        assert values == sorted(set(values))
        assert values[-1] == STEPS  # Newer hosts leave some steps out, never the last one.
        states = [e["data"]["nodes"] for e in traffic.events_of(job_id) if e["type"] == "progress_state"]
        assert states[-1][f"{name}{number}"]["state"] == "finished"


def test_every_event_names_the_slot_that_ran_the_job(traffic: Traffic) -> None:
    for job_id, entry in traffic.history.items():
        assert {event["data"].get("gpu_id") for event in traffic.events_of(job_id)} == {entry["gpu_id"]}


def test_plain_previews_reach_their_client(traffic: Traffic) -> None:
    frames = traffic.clients[0].frames
    assert {struct.unpack_from(">II", frame) for frame in frames} == {(PLAIN_PREVIEW, JPEG)}
    seen = Counter(nearest_job(traffic, decoded(frame[8:])) for frame in frames)
    assert seen == progress_counts(traffic, 0)


def test_previews_with_metadata_reach_their_client_and_name_their_job(traffic: Traffic) -> None:
    frames = traffic.clients[1].frames
    assert {struct.unpack_from(">I", frame)[0] for frame in frames} == {PREVIEW_WITH_METADATA}
    seen: Counter[str] = Counter()
    for frame in frames:
        length = struct.unpack_from(">I", frame, 4)[0]
        metadata = json.loads(frame[8 : 8 + length])
        job_id = metadata["prompt_id"]
        assert nearest_job(traffic, decoded(frame[8 + length :])) == job_id
        assert metadata["node_id"] == f"work{traffic.number[job_id]}"
        assert metadata["image_type"] == "image/jpeg"
        seen[job_id] += 1
    assert seen == progress_counts(traffic, 1)


def progress_counts(traffic: Traffic, client: int) -> dict[str, int]:
    """How many times each job of a client reported with a preview."""
    return {
        job_id: sum(
            event["type"] == "progress" and event["data"]["node"].startswith("work")
            for event in traffic.events_of(job_id)
        )
        for job_id in traffic.jobs_of(client)
    }


def decoded(image: bytes) -> tuple[int, ...]:
    with Image.open(io.BytesIO(image)) as picture:
        assert picture.format == "JPEG"
        colours = picture.convert("RGB").getcolors()
    assert colours is not None
    _, most_frequent = max(colours)
    assert isinstance(most_frequent, tuple)
    return most_frequent


def nearest_job(traffic: Traffic, seen: tuple[int, ...]) -> str:
    matches = [
        job_id
        for job_id in traffic.owner
        if all(abs(a - b) <= JPEG_ERROR for a, b in zip(seen, traffic.colour(job_id), strict=True))
    ]
    assert len(matches) == 1, f"preview of colour {seen} belongs to {matches}"
    return matches[0]


def test_queue_remaining_counts_all_slots(server: HostServer) -> None:
    await_idle(server)
    with server.websocket() as listener, held(server, 0, 1) as running:
        waiting = [server.submit(quick(number), slot)["prompt_id"] for number, slot in enumerate([0, 1, 1, None])]
        listener.wait_for(lambda event: remaining(event) == len(running) + len(waiting))
        release(server, running[1])
        server.wait(waiting[1:])
        listener.wait_for(lambda event: remaining(event) == 2)
        release(server, running[0])
        server.wait(waiting)
        with server.websocket() as late:
            assert remaining(late.wait_for(lambda event: event["type"] == "status")) == 0


def test_queue_remaining_of_a_slot_with_header_is_still_the_total(server: HostServer) -> None:
    with held(server, 0, 1):
        status, reply = server.request("GET", "/prompt", headers={"X-TARGET-GPU": "0"})
        assert (status, reply) == (200, {"exec_info": {"queue_remaining": 2}})


def remaining(event: JSON) -> int | None:
    count: int | None = event["data"].get("status", {}).get("exec_info", {}).get("queue_remaining")
    return count


@pytest.mark.parametrize("slot", [0, 1])
def test_reconnecting_tells_a_client_where_its_own_job_is(server: HostServer, slot: int) -> None:
    with server.websocket() as other, server.websocket() as gone:
        own = start_held(server, gone, slot)
        others = start_held(server, other, 1 - slot)
        gone.close()
        queue_ids(server)  # The host has noticed by now: it would drop a new connection with the same name.
        with server.websocket(gone.client_id) as back, server.websocket() as stranger:
            event = back.wait_for(lambda event: event["type"] == "executing")
            assert event["data"]["node"] == "hold"
            interrupt(server, own)
            assert back.wait_for_end(own)["data"]["gpu_id"] == slot
            release(server, others)
            other.wait_for_end(others)
            assert [e for e in stranger.events if e["type"] not in ("status", "feature_flags")] == []
            assert others not in [e["data"].get("prompt_id") for e in back.events]


def test_reconnecting_tells_a_client_of_all_its_running_jobs(server: HostServer) -> None:
    with server.websocket() as gone:
        own = [start_held(server, gone, slot, slot + 1) for slot in (0, 1)]
        gone.close()
        queue_ids(server)
        with server.websocket(gone.client_id) as back:
            back.wait_for(lambda event: event["type"] == "executing" and event["data"].get("gpu_id") == 1)
            back.wait_for(lambda event: event["type"] == "executing" and event["data"].get("gpu_id") != 1)
            told = [event["data"] for event in back.of_type("executing")]
            assert [data["node"] for data in told] == ["hold", "hold"]
            assert own[1] in [data.get("prompt_id") for data in told]
            release(server, *own)


def test_reconnecting_after_the_job_tells_nothing(server: HostServer) -> None:
    with server.websocket() as first:
        release(server, start_held(server, first, 1))
        first.close()
        queue_ids(server)
        with held(server, 0), server.websocket(first.client_id) as back:
            job_id = server.submit(quick(1), 1, back.client_id)["prompt_id"]
            back.wait_for_end(job_id)
            told = [e["data"].get("prompt_id") for e in back.events if e["type"] == "executing"]
            assert set(told) <= {job_id}
