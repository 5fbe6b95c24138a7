"""Slots in processes take part in shared jobs as others do, as the job's own slot and as participants."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
from collections import Counter

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import eventually, interrupt, new_key, outcome, slots_shown
from tests.host.server import JSON, HostServer
from tests.host.test_fan_out import SEED, alone, pixels, shared
from tests.host.workflows import Workflow, node

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

LIMIT_S = 180.0
SLOTS = "cpu,cpu=process"


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    made = make_module_server(slots=SLOTS)
    await_processes(made)
    return made


def await_processes(server: HostServer) -> None:
    def are_ready() -> bool:
        return all(one["worker"] is None or one["worker"]["state"] == "ready" for one in slots_shown(server))

    eventually(are_ready, "the processes are not ready", LIMIT_S)


def told(seed: int, *, seconds: float = 0.0, count: int = 2) -> Workflow:
    """Shows "seed@process" of each participant in order, after this time."""
    return {
        "seed": node("DistributedSeed", seed=seed),
        "work": node("CPTSlow", value=["seed", 0], seconds=seconds, salt=new_key()),
        "all": node("ParallelCollector", value=["work", 0], participants=count),
        "out": node("CPTOut", value=["all", 0]),
    }


def values(entry: JSON) -> list[tuple[int, int]]:
    assert outcome(entry) == "success", entry["status"]
    parts = [text.split("@") for text in entry["outputs"]["out"]["value"]]
    return [(int(seed), int(slot)) for seed, slot in parts]


def run(server: HostServer, workflow: Workflow, slot: int | None = None) -> JSON:
    job_id = server.submit(workflow, slot)["prompt_id"]
    entry: JSON = server.wait([job_id], LIMIT_S)[job_id]
    return entry


def check_same_images(server: HostServer, slot: int) -> None:
    """Two participants, of which the second is slot 1, give what the first slot gives alone."""
    server.request("POST", "/parallel/pause", {"gpu_ids": [1]})
    try:
        expected = alone(server, 2)
    finally:
        server.request("POST", "/parallel/resume", {"gpu_ids": [1]})
    assert pixels(server, run(server, shared(SEED), slot)) == expected


def check_all_take_part(server: HostServer, slot: int, *, seconds: float) -> None:
    with server.websocket(supports_preview_metadata=True) as client:
        client.wait_for(lambda event: event["type"] == "feature_flags")
        job_id = server.submit(told(100, seconds=seconds), slot, client.client_id)["prompt_id"]
        client.wait_for_end(job_id, LIMIT_S)
        entry = server.wait([job_id])[job_id]
        shares = {event["data"].get("participant") for event in client.of_type("progress")}
        named = {event["data"].get("prompt_id", job_id) for event in client.events}
    assert [seed for seed, _ in values(entry)] == [100, 101]
    assert len({process for _, process in values(entry)}) == 2
    assert shares == {None, 1}
    assert named == {job_id}


def check_lists_and_parts(server: HostServer, slot: int, *, images: int) -> None:
    workflow = {
        "batch": node("EmptyImage", width=8, height=8, batch_size=images, color=7),
        "start": node("ParallelListStart", value=["batch", 0]),
        "work": node("CPTSome", images=["start", 0], salt=new_key()),
        "end": node("ParallelCollector", value=["work", 0]),
        "save": node("SaveImage", images=["end", 0], filename_prefix="pulled"),
    }
    assert len(pixels(server, run(server, workflow, slot))) == images
    workflow["start"]["class_type"] = "ParallelDivider"
    workflow["batch"]["inputs"]["batch_size"] = 1  # The other participant has nothing to do.
    assert len(pixels(server, run(server, workflow, slot))) == 1


@pytest.mark.parametrize("slot", [0, 1], ids=["a thread's job", "a process's job"])
def test_images_of_threads_and_processes_are_the_same(server: HostServer, slot: int) -> None:
    check_same_images(server, slot)


@pytest.mark.parametrize("slot", [0, 1], ids=["a thread's job", "a process's job"])
def test_all_slots_take_part(server: HostServer, slot: int) -> None:
    check_all_take_part(server, slot, seconds=1.0)


@pytest.mark.parametrize("slot", [0, 1], ids=["a thread's job", "a process's job"])
def test_previews_of_all_reach_the_client_told_apart(server: HostServer, slot: int) -> None:
    assert previews(server, slot) == {(None, slot): 3, (1, 1 - slot): 3}


def previews(server: HostServer, slot: int) -> Counter[tuple[int | None, int]]:
    """How many previews a client gets of each participant, by the slot that has computed its share."""
    workflow = {
        "seed": node("DistributedSeed", seed=random.getrandbits(20)),
        "work": node("CPTProgress", steps=3, ms=700, seed=["seed", 0]),
        "all": node("ParallelCollector", value=["work", 0], participants=2),
        "save": node("SaveImage", images=["all", 0], filename_prefix="previewed"),
    }
    with server.websocket(supports_preview_metadata=True) as client:
        client.wait_for(lambda event: event["type"] == "feature_flags")
        job_id = server.submit(workflow, slot, client.client_id)["prompt_id"]
        client.wait_for_end(job_id, LIMIT_S)
        told = [facts(frame) for frame in client.frames]
    assert {one["prompt_id"] for one in told} == {job_id}
    return Counter((one.get("participant"), one.get("gpu_id", slot)) for one in told)


def facts(frame: bytes) -> JSON:
    """What a preview with metadata says of itself."""
    kind, length = struct.unpack_from(">II", frame)
    assert kind == 4
    told: JSON = json.loads(frame[8 : 8 + length])
    return told


@pytest.mark.parametrize("slot", [0, 1], ids=["a thread's job", "a process's job"])
def test_lists_and_parts_are_divided_among_them(server: HostServer, slot: int) -> None:
    check_lists_and_parts(server, slot, images=5)


def test_an_interrupt_of_a_processs_job_ends_its_shares(server: HostServer) -> None:
    job_id = server.submit(told(200, seconds=60.0), 1)["prompt_id"]
    eventually(lambda: sum(one["running_count"] for one in slots_shown(server)) == 2, "not all slots run", LIMIT_S)
    interrupt(server, job_id)
    assert outcome(server.wait([job_id], LIMIT_S)[job_id]) == "interrupted"
    eventually(lambda: not any(one["running_count"] for one in slots_shown(server)), "a share still runs", LIMIT_S)


def test_a_participant_that_is_killed_costs_no_image(server: HostServer) -> None:
    """`benchmarks/fan_out.py --kills 100` does it a hundred times, and with jobs of processes."""
    job_id = server.submit(told(300, seconds=1.0, count=5), 0)["prompt_id"]
    eventually(lambda: slots_shown(server)[1]["running_count"], "no share runs", LIMIT_S)
    os.kill(slots_shown(server)[1]["worker"]["pid"], signal.SIGKILL)
    assert [seed for seed, _ in values(server.wait([job_id], LIMIT_S)[job_id])] == [300, 301, 302, 303, 304]
