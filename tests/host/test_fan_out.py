"""One workflow over all slots gives, in order, the images that each seed gives alone on stock ComfyUI."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest
from PIL import Image

from tests.host.jobs import await_idle, interrupt, message, new_key, outcome
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

SEED = 300


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu,cpu,cpu")


def shared(seed: int, *, batch: int = 1, collector: str = "DistributedCollector", **inputs: Any) -> Workflow:
    """A text-to-image job whose images come from all participants, each with its own seed."""
    workflow = txt2img(seed, batch=batch)
    workflow["seed"] = node("DistributedSeed", seed=seed)
    workflow["sampler"]["inputs"]["seed"] = ["seed", 0]
    workflow["all"] = node(collector, images=["decode", 0], **inputs)
    workflow["save"]["inputs"]["images"] = ["all", 0]
    return workflow


def pixels(server: HostServer, entry: JSON) -> list[str]:
    """A hash of each image that the job saved, in its order."""
    assert outcome(entry) == "success", entry["status"]
    names = [image["filename"] for image in entry["outputs"]["save"]["images"]]
    images = [Image.open(server.base_dir / "output" / name) for name in names]
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def run(server: HostServer, workflow: Workflow, slot: int | None = None) -> JSON:
    job_id = server.submit(workflow, slot)["prompt_id"]
    entry: JSON = server.wait([job_id], 300)[job_id]
    return entry


def alone(server: HostServer, count: int, batch: int = 1, seed: int = SEED) -> list[str]:
    """What each participant's seed gives as a job of its own."""
    entries = [run(server, txt2img(seed + participant, batch=batch)) for participant in range(count)]
    return [image for entry in entries for image in pixels(server, entry)]


def test_four_slots_give_stocks_images_in_order(server: HostServer, shared_server: ServerPool) -> None:
    expected = alone(shared_server(slots=None), 4, batch=2)
    assert len(set(expected)) == 8
    entry = run(server, shared(SEED, batch=2))
    assert pixels(server, entry) == expected
    assert pixels(server, run(server, shared(SEED, batch=2), slot=2)) == expected
    assert "participant 3" not in server.log()


def told(seed: int, *, how: str = "plain", bad: int = -1, parties: int = 1, **inputs: Any) -> Workflow:
    """A job that shows "seed@slot" of each participant, in order."""
    share = node("CPTShare", key=new_key(), how=how, seed=["seed", 0], bad=bad, parties=parties)
    return {
        "seed": node("DistributedSeed", seed=seed),
        "share": share,
        "all": node("ParallelCollector", value=["share", 0], **inputs),
        "out": node("CPTOut", value=["all", 0]),
    }


def values(entry: JSON) -> list[tuple[int, int]]:
    """The seeds and slots that a job shows."""
    assert outcome(entry) == "success", entry["status"]
    parts = [text.split("@") for text in entry["outputs"]["out"]["value"]]
    return [(int(seed), int(slot)) for seed, slot in parts]


def seeds(entry: JSON) -> list[int]:
    return [seed for seed, _ in values(entry)]


def total(server: HostServer, name: str) -> int:
    """What all slots together have counted."""
    return sum(queue["metrics"][name] for queue in server.request("GET", "/queue/all")[1]["queues"])


def test_all_slots_take_part_at_once_and_clients_see_one_job(server: HostServer) -> None:
    before = set(server.request("GET", "/history")[1])
    with server.websocket() as client:
        job_id = server.submit(told(10, parties=4), client_id=client.client_id)["prompt_id"]
        client.wait_for_end(job_id)
        entry = server.wait([job_id])[job_id]
        named = {event["data"].get("prompt_id", job_id) for event in client.events}
        shares = {event["data"].get("participant") for event in client.of_type("progress")}
        remaining = [event["data"]["status"]["exec_info"]["queue_remaining"] for event in client.of_type("status")]
    assert seeds(entry) == [10, 11, 12, 13]
    assert {slot for _, slot in values(entry)} == {0, 1, 2, 3}
    assert named == {job_id}
    assert shares == {None, 1, 2, 3}
    assert max(remaining) == 1
    await_idle(server)
    assert set(server.request("GET", "/history")[1]) - before == {job_id}


@pytest.mark.parametrize(
    ("inputs", "count"), [({"participants": 7}, 7), ({"participants": 1}, 1), ({}, 4)], ids=["more", "one", "all"]
)
def test_a_job_says_how_many_take_part(server: HostServer, inputs: JSON, count: int) -> None:
    assert seeds(run(server, told(20, **inputs))) == list(range(20, 20 + count))


@pytest.mark.parametrize(
    ("collector", "name"),
    [
        ("ParallelCollector", "participants"),
        ("DistributedCollector", "load_balance"),
        ("DistributedCollector", "enabled_worker_ids"),
        ("DistributedBranchCollector", "num_branches"),
    ],
)
def test_what_settles_the_shares_cannot_be_connected(server: HostServer, collector: str, name: str) -> None:
    """It would be known too late; it is refused instead of ignored."""
    workflow = shared(SEED, collector=collector, **{name: ["number", 0]}) | {"number": node("CPTConstInt", value=2)}
    if collector != "DistributedCollector":
        workflow["all"]["inputs"] |= {"value": ["decode", 0], "branch_1": ["decode", 0], "num_branches": 2}
        workflow["all"]["inputs"][name] = ["number", 0]
    status, reply = server.request("POST", "/prompt", {"prompt": workflow})
    assert status == 400
    told = json.dumps(reply["node_errors"]["all"]["errors"])
    assert f"{name} is connected, but must be known before the job runs" in told


def test_a_job_names_the_slots_that_take_part(server: HostServer) -> None:
    workflow = {
        "seed": node("DistributedSeed", seed=1),
        "share": node("CPTShare", key=new_key(), how="plain", seed=["seed", 0], bad=-1, parties=2),
        "all": node("ParallelCollector", value=["share", 0]),
        "out": node("CPTOut", value=["all", 0]),
    }
    job_id = server.submit(workflow, 1, extra_data={"participants": [1, 3]})["prompt_id"]
    entry = server.wait([job_id], 300)[job_id]
    assert outcome(entry) == "success", entry["status"]
    assert [text.rpartition("@")[2] for text in entry["outputs"]["out"]["value"]] == ["1", "3"]
    for bad in ([], [9], 0, 65, "all"):
        assert server.request("POST", "/prompt", {"prompt": workflow, "extra_data": {"participants": bad}})[0] == 400


def test_a_job_that_is_to_be_balanced_stays_whole(server: HostServer) -> None:
    assert len(pixels(server, run(server, shared(SEED, load_balance=True)))) == 1


@pytest.mark.parametrize("how", ["fail once", "kill once"])
def test_a_share_that_is_lost_is_computed_again(server: HostServer, how: str) -> None:
    start = len(server.log())
    entry = run(server, told(30, how=how, bad=32, parties=4))
    assert seeds(entry) == [30, 31, 32, 33]
    lines = [line for line in server.log()[start:].splitlines() if "at the share of participant 2 of job" in line]
    assert len(lines) == 1


def test_a_share_that_two_slots_failed_at_is_computed_by_a_third(server: HostServer) -> None:
    start = len(server.log())
    entry = run(server, told(30, how="fail twice", bad=32, parties=4), slot=0)
    assert seeds(entry) == [30, 31, 32, 33]
    lines = [line for line in server.log()[start:].splitlines() if "at the share of participant 2 of job" in line]
    assert len({line.partition(" failed at")[0] for line in lines}) == len(lines) == 2


def test_a_share_that_fails_everywhere_fails_the_job_with_the_reason(server: HostServer) -> None:
    entry = run(server, told(40, how="fail", bad=43, parties=4))
    assert outcome(entry) == "error"
    assert "failed by test" in message(entry, "execution_error")["exception_message"]
    await_idle(server)
    assert seeds(run(server, told(44, parties=4))) == [44, 45, 46, 47]


@pytest.mark.parametrize("whom", ["the job", "a slot"])
def test_an_interrupt_ends_the_job_and_its_shares(server: HostServer, whom: str) -> None:
    with server.websocket() as client:
        job_id = server.submit(told(50, how="hold", bad=52, parties=4), 0, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "executing" and event["data"].get("node") == "all")
        slot = None if whom == "the job" else held_slot(server)
        interrupt(server, job_id if whom == "the job" else None, slot)
        entry = server.wait([job_id])[job_id]
    assert outcome(entry) == "interrupted"
    await_all_slots(server)


def held_slot(server: HostServer) -> int:
    """The slot that runs a share when the others are done."""

    def busy() -> list[int]:
        queues = server.request("GET", "/queue/all")[1]["queues"]
        return [queue["gpu_id"] for queue in queues if queue["running_count"] and queue["gpu_id"] != 0]

    deadline = time.monotonic() + 60
    while len(found := busy()) != 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found[0]


def await_all_slots(server: HostServer) -> None:
    deadline = time.monotonic() + 60
    while any(queue["running_count"] for queue in server.request("GET", "/queue/all")[1]["queues"]):
        assert time.monotonic() < deadline, "a share still runs"
        time.sleep(0.02)


def test_slots_that_take_no_jobs_hold_up_nobody(server: HostServer) -> None:
    server.request("POST", "/parallel/pause", {"gpu_ids": [1, 2, 3]})
    try:
        assert values(run(server, told(60))) == [(60, 0), (61, 0), (62, 0), (63, 0)]
        assert pixels(server, run(server, shared(SEED))) == alone(server, 4)
    finally:
        server.request("POST", "/parallel/resume", {"gpu_ids": [1, 2, 3]})


def test_shares_are_counted_but_not_as_jobs(server: HostServer) -> None:
    before = total(server, "jobs_succeeded"), total(server, "shares")
    assert seeds(run(server, told(90, parties=4))) == [90, 91, 92, 93]
    await_all_slots(server)
    assert (total(server, "jobs_succeeded"), total(server, "shares")) == (before[0] + 1, before[1] + 3)


def test_a_job_that_is_cached_asks_nobody(server: HostServer) -> None:
    workflow = told(70)
    run(server, workflow, slot=0)
    await_all_slots(server)
    before = total(server, "jobs_succeeded"), total(server, "shares")
    assert outcome(run(server, workflow, slot=0)) == "success"
    await_all_slots(server)
    assert (total(server, "jobs_succeeded"), total(server, "shares")) == (before[0] + 1, before[1])


def test_a_slot_that_has_a_share_cached_gives_it_all_the_same(server: HostServer) -> None:
    workflow = told(80, parties=4)
    assert [slot for _, slot in values(run(server, workflow, slot=0))][1:] != [0, 0, 0]
    workflow["all"]["inputs"]["participants"] = 5  # It collects again, from one more.
    assert seeds(run(server, workflow, slot=0)) == [80, 81, 82, 83, 84]


def test_many_shared_jobs_at_once_all_end(server: HostServer) -> None:
    """Each slot gets jobs that all others are to take part in."""
    jobs = {server.submit(told(1000 + 10 * index), index % 4)["prompt_id"]: 1000 + 10 * index for index in range(40)}
    entries = server.wait(list(jobs), 300)
    for job_id, first in jobs.items():
        assert seeds(entries[job_id]) == [first, first + 1, first + 2, first + 3]


@pytest.mark.parametrize("count", [10, 3, 1])
@pytest.mark.parametrize("paused", [[], [1, 2, 3]], ids=["all slots", "one slot"])
def test_each_participant_takes_its_part_of_a_batch(server: HostServer, count: int, paused: list[int]) -> None:
    """Who has no part of it computes nothing: the nodes in between cannot do without an image."""
    workflow = {
        "images": node("EmptyImage", width=8, height=8, batch_size=count, color=0x102030),
        "part": node("ParallelDivider", value=["images", 0]),
        "some": node("CPTSome", images=["part", 0], salt=new_key()),
        "all": node("DistributedCollector", images=["some", 0]),
        "save": node("SaveImage", images=["all", 0], filename_prefix="parts"),
    }
    if paused:
        server.request("POST", "/parallel/pause", {"gpu_ids": paused})
    try:
        assert len(pixels(server, run(server, workflow, slot=0))) == count
        workflow["some"]["inputs"]["salt"] = new_key()  # What is above it is cached now.
        assert len(pixels(server, run(server, workflow, slot=0))) == count
    finally:
        server.request("POST", "/parallel/resume", {})


@pytest.mark.parametrize("parties", [3, 1], ids=["at once", "in turn"])
def test_each_participant_computes_its_branch(server: HostServer, parties: int) -> None:
    key = new_key()
    workflow = {"branch": node("DistributedBranch", input="x", num_branches=3)}
    inputs: dict[str, Any] = {}
    for index in range(3):
        workflow[f"share{index}"] = node("CPTShare", key=key, how="plain", seed=index, bad=-1, parties=parties)
        inputs[f"branch_{index + 1}"] = [f"share{index}", 0]
    workflow["all"] = node("DistributedBranchCollector", num_branches=3, **inputs)
    for index in range(3):
        workflow[f"out{index}"] = node("CPTOut", value=["all", index])
    entry = run(server, workflow)
    assert outcome(entry) == "success", entry["status"]
    found = [entry["outputs"][f"out{index}"]["value"] for index in range(3)]
    assert [[text.partition("@")[0] for text in one] for one in found] == [["0"], ["1"], ["2"]]
    if parties == 3:
        assert len({one[0].partition("@")[2] for one in found}) == 3


@pytest.mark.parametrize("count", [5, 2])
def test_each_participant_takes_its_part_of_a_list(server: HostServer, count: int) -> None:
    """Images of different sizes stay a list."""
    workflow = {f"image{size}": node("EmptyImage", width=size, height=8, batch_size=1, color=0) for size in (8, 16)}
    workflow |= {
        "list": node("CPTList", first=["image8", 0], second=["image16", 0], count=count),
        "part": node("DistributedListSplitter", images=["list", 0], mode="static"),
        "some": node("CPTSome", images=["part", 0], salt=new_key()),
        "all": node("DistributedListCollector", images=["some", 0]),
        "save": node("SaveImage", images=["all", 0], filename_prefix="list"),
    }
    entry = run(server, workflow)
    assert outcome(entry) == "success", entry["status"]
    names = [image["filename"] for image in entry["outputs"]["save"]["images"]]
    assert [Image.open(server.base_dir / "output" / name).width for name in names] == [8, 16, 8, 16, 8][:count]
