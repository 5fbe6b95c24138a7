"""Slots on other machines take part in shared jobs as others do, as the job's own slot and as participants."""

from __future__ import annotations

import signal

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import eventually, interrupt, new_key, outcome, slots_shown
from tests.host.server import HostServer
from tests.host.test_fan_out import SEED, alone, pixels, shared
from tests.host.test_fan_out_processes import LIMIT_S, await_processes, previews, run, told, values
from tests.host.workflows import node

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

HERE, THERE = 0, 1


@pytest.fixture(scope="module")
def other(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots="cpu")


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer, other: HostServer) -> HostServer:
    made = make_module_server(slots="cpu", env={"COMFY_PARALLEL_REMOTE": other.url, "COMFY_PARALLEL_BREAKER": "off"})
    await_processes(made)
    return made


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_images_of_all_machines_are_the_same(server: HostServer, slot: int) -> None:
    server.request("POST", "/parallel/pause", {"gpu_ids": [THERE]})
    try:
        expected = alone(server, 2)
    finally:
        server.request("POST", "/parallel/resume", {"gpu_ids": [THERE]})
    assert pixels(server, run(server, shared(SEED), slot)) == expected


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_all_machines_take_part(server: HostServer, slot: int) -> None:
    with server.websocket(supports_preview_metadata=True) as client:
        client.wait_for(lambda event: event["type"] == "feature_flags")
        job_id = server.submit(told(100, seconds=2.0), slot, client.client_id)["prompt_id"]
        client.wait_for_end(job_id, LIMIT_S)
        entry = server.wait([job_id])[job_id]
        shares = {event["data"].get("participant") for event in client.of_type("progress")}
        named = {event["data"].get("prompt_id", job_id) for event in client.events}
    assert [seed for seed, _ in values(entry)] == [100, 101]
    assert len({process for _, process in values(entry)}) == 2
    assert shares == {None, 1}
    assert named == {job_id}


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_previews_of_all_reach_the_client_told_apart(server: HostServer, slot: int) -> None:
    assert previews(server, slot) == {(None, slot): 3, (1, 1 - slot): 3}


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_lists_and_parts_are_divided_among_them(server: HostServer, slot: int) -> None:
    workflow = {
        "batch": node("EmptyImage", width=8, height=8, batch_size=70, color=7),
        "start": node("ParallelListStart", value=["batch", 0]),
        "work": node("CPTSome", images=["start", 0], salt=new_key()),
        "end": node("ParallelCollector", value=["work", 0]),
        "save": node("SaveImage", images=["end", 0], filename_prefix="pulled"),
    }
    assert len(pixels(server, run(server, workflow, slot))) == 70
    workflow["start"]["class_type"] = "ParallelDivider"
    workflow["batch"]["inputs"]["batch_size"] = 1  # The other participant has nothing to do.
    assert len(pixels(server, run(server, workflow, slot))) == 1


def test_an_interrupt_ends_shares_there(server: HostServer, other: HostServer) -> None:
    job_id = server.submit(told(200, seconds=60.0), HERE)["prompt_id"]
    eventually(lambda: slots_shown(other)[0]["running_count"], "nothing runs there", LIMIT_S)
    interrupt(server, job_id)
    assert outcome(server.wait([job_id], LIMIT_S)[job_id]) == "interrupted"
    eventually(lambda: not slots_shown(other)[0]["running_count"], "a share still runs", LIMIT_S)


def test_a_machine_that_dies_during_its_share_costs_no_image(server: HostServer, other: HostServer) -> None:
    """`benchmarks/fan_out.py --remote --kills 100` does it a hundred times."""
    job_id = server.submit(told(300, seconds=1.0, count=5), HERE)["prompt_id"]
    eventually(lambda: slots_shown(other)[0]["running_count"], "no share runs there", LIMIT_S)
    other.stop(signal_number=signal.SIGKILL)
    assert [seed for seed, _ in values(server.wait([job_id], LIMIT_S)[job_id])] == [300, 301, 302, 303, 304]
