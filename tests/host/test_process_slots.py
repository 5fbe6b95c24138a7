"""A slot in a process of its own does what a slot of the front does, to the byte and to the event."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host.comparing import comparable, is_status
from tests.host.conftest import MakeServer
from tests.host.held_weights import file_of, image_of, weights
from tests.host.jobs import (
    await_idle,
    eventually,
    held,
    hold,
    interrupt,
    message,
    outcome,
    progress,
    quick,
    release,
    shown,
    start_held,
)
from tests.host.kills import EXITS, Kills
from tests.host.server import JSON, TRUST_TEST_NODES, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.host

THREAD, PROCESS = 0, 1
UNSAFE_PACK = Path(__file__).with_name("packs") / "memoises"
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    env = {
        "COMFY_PARALLEL_WORKER_SILENT_S": "15",
        "COMFY_PARALLEL_WORKERS": "auto",
        EXITS: "1",
        "COMFY_PARALLEL_PACKS": f"{TRUST_TEST_NODES},{UNSAFE_PACK.name}=alone",
    }
    return make_module_server(slots="cpu=thread,cpu=process", env=env, packs=[UNSAFE_PACK])


def shown_slot(server: HostServer, slot: int = PROCESS) -> JSON:
    queue: JSON = server.request("GET", "/queue/all")[1]["queues"][slot]
    return queue


def worker_pid(server: HostServer, slot: int = PROCESS) -> int:
    """The process slot's, once that takes jobs; state and number are of one answer, because a kill may come between."""
    answers: list[JSON] = []

    def is_ready() -> bool:
        answers.append(shown_slot(server, slot)["worker"])
        return answers[-1]["state"] == "ready" and answers[-1]["pid"] is not None

    eventually(is_ready, "the process slot is not ready")
    pid: int = answers[-1]["pid"]
    return pid


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def on_both(server: HostServer, make: Callable[[], Workflow], **features: bool) -> list[list[Any]]:
    """All that a client receives of the same job, from each slot, without what tells times, ids and slots."""
    told = []
    for slot in (THREAD, PROCESS):
        with server.websocket(**features) as client:
            if features:
                client.wait_for(lambda event: event["type"] == "feature_flags")
            job_id = server.submit(make(), slot, client.client_id)["prompt_id"]
            client.wait_for_end(job_id, LIMIT_S)
            client.wait_for(is_last, LIMIT_S)
            told.append([comparable(one, job_id, slot) for one in client.messages if not is_status(one)])
            told[-1].append(comparable(server.wait([job_id])[job_id], job_id, slot))
    return told


def is_last(event: JSON) -> bool:
    """The host's worker says this when all else of a job has been told."""
    return event["type"] == "executing" and event["data"]["node"] is None


def test_it_says_what_it_is(server: HostServer) -> None:
    pid = worker_pid(server)
    assert [queue["kind"] for queue in server.request("GET", "/queue/all")[1]["queues"]] == ["thread", "process"]
    assert pid != server.pid
    assert is_there(pid)
    eventually(lambda: shown_slot(server)["vram"], "nothing is told of its device")
    assert shown_slot(server)["device_name"] == "cpu"
    assert shown_slot(server, THREAD)["worker"] is None


def test_its_images_are_the_same_and_so_is_all_that_is_told(server: HostServer) -> None:
    seed = random.getrandbits(60)
    before = set(server.output_files())
    thread, process = on_both(server, lambda: txt2img(seed, prefix="both"))
    first, second = sorted(set(server.output_files()) - before)
    assert first.read_bytes() == second.read_bytes()
    assert process == thread


JOBS: dict[str, Workflow] = {
    "values": quick(7),
    "error": {"fail": node("CPTFail", message="as nodes do"), "end": node("CPTOut", value=["fail", 0])},
    "images": {
        "image": node("EmptyImage", width=8, height=8, batch_size=2, color=7),
        "out": node("PreviewImage", images=["image", 0]),
    },
    "a thread": {"work": node("CPTThreadProgress", steps=3, seed=1), "out": node("CPTOut", value=["work", 0])},
}


@pytest.mark.parametrize("kind", JOBS)
def test_its_events_and_results_are_the_same(server: HostServer, kind: str) -> None:
    thread, process = on_both(server, lambda: JOBS[kind])
    assert process == thread


@pytest.mark.parametrize("features", [{}, {"supports_preview_metadata": True}], ids=["plain", "with metadata"])
def test_previews_come_as_the_client_takes_them(server: HostServer, features: dict[str, bool]) -> None:
    seed = random.getrandbits(60)
    thread, process = on_both(server, lambda: progress(seed), **features)
    assert [type(one) for one in thread].count(bytes) == 3
    assert process == thread


def test_a_node_that_ends_its_worker_is_told_the_same(server: HostServer) -> None:
    thread, process = on_both(server, lambda: {"kill": node("CPTKill"), "end": node("CPTOut", value=["kill", 0])})
    assert process == thread
    assert outcome(server.run(quick(1), PROCESS)) == "success"


def test_previews_are_found_under_the_fronts_address(server: HostServer) -> None:
    image = node("EmptyImage", width=8, height=8, batch_size=1, color=random.getrandbits(24))
    entry = server.run({"image": image, "out": node("PreviewImage", images=["image", 0])}, PROCESS)
    told = entry["outputs"]["out"]["images"][0]
    assert told["type"] == "temp"
    status, body = server.request("GET", f"/view?type=temp&filename={told['filename']}&subfolder={told['subfolder']}")
    assert (status, body[:4]) == (200, b"\x89PNG")


def test_it_keeps_what_it_has_computed_until_it_is_told_to_free_it(server: HostServer) -> None:
    workflow = progress(random.getrandbits(60))

    def cached() -> list[str]:
        nodes: list[str] = message(server.run(workflow, PROCESS), "execution_cached")["nodes"]
        return sorted(nodes)

    assert cached() == []
    assert cached() == ["out", "work"]
    status, _ = server.request("POST", "/free", {"free_memory": True}, headers={"X-TARGET-GPU": str(PROCESS)})
    assert status == 200
    eventually(lambda: cached() == [], "its cache was not freed")


def test_interrupts_reach_the_job_that_they_name(server: HostServer) -> None:
    with held(server, THREAD, PROCESS) as (kept, named):
        interrupt(server, named)
        entry = server.wait([named])[named]
        assert outcome(entry) == "interrupted"
        assert entry["gpu_id"] == PROCESS
        assert kept not in server.request("GET", "/history")[1]
    assert outcome(server.run(progress(random.getrandbits(60)), PROCESS)) == "success"


def test_interrupts_at_once_are_not_lost(server: HostServer) -> None:
    for _ in range(10):
        job_id = server.submit(hold(random.getrandbits(60)), PROCESS)["prompt_id"]
        while job_id not in [item[1] for item in server.request("GET", "/queue")[1]["queue_running"]]:
            assert job_id not in server.request("GET", f"/history/{job_id}")[1]
        interrupt(server, job_id)
        assert outcome(server.wait([job_id])[job_id]) == "interrupted"


def test_both_save_under_one_name_and_overwrite_nothing(server: HostServer) -> None:
    def save(colour: int) -> Workflow:
        image = node("EmptyImage", width=8, height=8, batch_size=3, color=colour)
        return {"image": image, "save": node("SaveImage", images=["image", 0], filename_prefix="one/name")}

    before = set(server.output_files())
    ids = [server.submit(save(colour), colour % 2)["prompt_id"] for colour in range(20)]
    entries = server.wait(ids)
    names = [image["filename"] for entry in entries.values() for image in entry["outputs"]["save"]["images"]]
    assert len(set(names)) == 60
    assert len(set(server.output_files()) - before) == 60


# Which kind takes what, with COMFY_PARALLEL_WORKERS=auto.


def test_what_is_unsafe_in_threads_runs_in_the_process_beside_other_jobs(server: HostServer) -> None:
    before = kinds(server)
    with held(server, THREAD):
        memo = node("PackMemoises", strength=1.5, key="", parties=1)
        entry = server.run({"memo": memo, "out": node("CPTOut", value=["memo", 0])})
    assert (outcome(entry), entry["gpu_id"]) == ("success", PROCESS)
    assert kinds(server)["to_processes"]["unsafe"] == before["to_processes"]["unsafe"] + 1


def test_other_jobs_go_to_the_thread_while_that_is_idle(server: HostServer) -> None:
    before = kinds(server)
    for number in range(3):
        await_idle(server)
        assert server.run(quick(1000 + number))["gpu_id"] == THREAD
    with held(server, THREAD):
        assert server.run(quick(1003))["gpu_id"] == PROCESS
    assert kinds(server)["to_threads"] >= before["to_threads"] + 4


def kinds(server: HostServer) -> JSON:
    found: JSON = server.request("GET", "/queue/all")[1]["kinds"]
    return found


# Weights.


def shared_memories(pid: int) -> set[str]:
    """The numbers of the memories with weights that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:comfy_parallel" in line}


def test_what_is_converted_of_a_model_lies_in_the_memory_of_both(server: HostServer) -> None:
    images = [image_of(server, txt2img(1), slot) for slot in (THREAD, PROCESS)]
    assert images[0] == images[1]
    assert shared_memories(server.pid) & shared_memories(worker_pid(server))
    eventually(lambda: file_of(server, "checkpoints/a.safetensors")["slots"] == [THREAD, PROCESS], "it is not told")


def test_each_process_tells_its_memory(server: HostServer) -> None:
    told = weights(server)
    assert [one["gpu_ids"] for one in told["processes"]] == [[THREAD], [PROCESS]]
    assert [one["pid"] for one in told["processes"]] == [server.pid, worker_pid(server)]
    assert told["pss_bytes"] == sum(one["pss_bytes"] for one in told["processes"]) > 100 << 20
    assert [one["gpu_id"] for one in told["slots"]] == [THREAD, PROCESS]


# Ends.


def test_a_job_whose_process_ends_runs_again_and_the_other_slot_notices_nothing(server: HostServer) -> None:
    pid = worker_pid(server)
    with server.websocket() as client:
        kept = start_held(server, client, THREAD)
        lost = start_held(server, client, PROCESS, seed=5)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: worker_pid(server) != pid, "no other process was started")
        assert shown_slot(server)["worker"]["restarts"] == 1
        assert "SIGKILL" in shown_slot(server)["worker"]["last_end"]
        assert lost not in server.request("GET", "/history")[1]
        eventually(lambda: shown_slot(server)["running"] == [lost], "the job did not start again")
        entries = release(server, kept, lost)
    assert [outcome(entry) for entry in entries.values()] == ["interrupted"] * 2


def test_a_job_that_ends_its_process_twice_fails_with_the_reason(server: HostServer) -> None:
    entry = server.run({"end": node("CPTEndProcess"), "out": node("CPTOut", value=["end", 0])}, PROCESS)
    error = message(entry, "execution_error")
    assert error["exception_type"] == "JobLost"
    assert "SIGKILL" in error["exception_message"]
    assert shown(server.run(quick(3), PROCESS)) == 3


def test_processes_killed_under_load_lose_and_double_nothing(server: HostServer) -> None:
    with Kills(server, seed=3) as kills:
        for way in ("-9", "-11", "exit 137"):
            kills.kill_one(way)
    assert (kills.lost, kills.doubled, kills.failed) == ([], [], [])
    assert list(kills.ends) == ["SIGKILL", "SIGSEGV", "ended with status 137"]


def test_a_stopped_process_is_ended_and_its_job_runs_again(server: HostServer) -> None:
    pid = worker_pid(server)
    with server.websocket() as client:
        job_id = start_held(server, client, PROCESS, seed=6)
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: worker_pid(server) != pid, "the stopped process was not replaced")
        assert "said nothing" in shown_slot(server)["worker"]["last_end"]
        eventually(lambda: shown_slot(server)["running"] == [job_id], "the job did not start again")
        assert outcome(release(server, job_id)[job_id]) == "interrupted"


def test_a_device_that_is_lost_costs_a_process_and_its_job_only(server: HostServer) -> None:
    pid = worker_pid(server)
    lose = {"lose": node("CPTLosesDevice", way="asserts"), "out": node("CPTOut", value=["lose", 0])}
    lost = server.submit(lose, PROCESS)["prompt_id"]
    following = server.submit(quick(77), PROCESS)["prompt_id"]
    beside = server.submit(progress(78, steps=20, ms=10), THREAD)["prompt_id"]
    entries = server.wait([lost, following, beside])
    assert "device-side assert triggered" in message(entries[lost], "execution_error")["exception_message"]
    assert shown(entries[following]) == 77
    assert outcome(entries[beside]) == "success"
    assert worker_pid(server) != pid
    assert "is started again: its device is lost" in server.log()
    assert "attempts" not in entries[following]


def test_nothing_of_it_is_left_when_the_front_is_killed(server: HostServer) -> None:
    """The last test of this file, for it ends the server."""
    pid = worker_pid(server)
    server.stop(signal_number=signal.SIGKILL)
    eventually(lambda: not is_there(pid), "the process outlived its front")
