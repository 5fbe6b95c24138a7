"""What only GPUs can show: devices, memory, CUDA random numbers, caches, running out of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.gpu.conftest import MakeGpuServer
from tests.host import jobs as small_jobs
from tests.host.server import POLL_S, HostServer, HostServerError
from tests.host.test_parity import Job, Run, differing, make_jobs, run_jobs
from tests.host.workflows import node, txt2img

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(500)]

PARITY_JOBS = 100


@pytest.fixture(scope="module")
def server(make_gpu_server: MakeGpuServer) -> HostServer:
    """One server with a slot on every GPU."""
    return make_gpu_server(slots="")


def queues(server: HostServer) -> list[dict[str, Any]]:
    status, reply = server.request("GET", "/queue/all")
    assert status == 200
    found: list[dict[str, Any]] = reply["queues"]
    return found


def shown(entry: dict[str, Any], name: str = "out") -> Any:
    assert entry["status"]["completed"], entry["status"]
    return entry["outputs"][name]["value"][0]


def show(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"work": node(class_type, **inputs), "out": node("CPTOut", value=["work", 0])}


def test_each_gpu_has_a_slot(server: HostServer, num_gpus: int) -> None:
    assert [queue["device"] for queue in queues(server)] == [f"cuda:{index}" for index in range(num_gpus)]
    for index in range(num_gpus):
        where = json.loads(shown(server.run(show("CPTWhere"), index)))
        assert (where["slot"], where["device"]) == (index, f"cuda:{index}")


def test_a_jobs_memory_is_on_its_own_gpu_only(make_gpu_server: MakeGpuServer, num_gpus: int) -> None:
    server = make_gpu_server(slots="")

    def vram() -> list[dict[str, int]]:
        return [queue["vram"] for queue in queues(server)]

    idle = [there["torch_allocated_bytes"] for there in vram()]  # since the warm-up
    for index in reversed(range(num_gpus)):
        free = vram()[index]["free_bytes"]
        server.run(txt2img(index, text=f"text {index}"), index)
        found = vram()
        assert free - found[index]["free_bytes"] > 100 << 20, "torch's memory, or that of a host with dynamic VRAM"
        allocated = [there["torch_allocated_bytes"] for there in found]
        assert allocated[index] > idle[index]
        assert allocated[:index] == idle[:index], found
        assert queues(server)[index]["models"]


def test_four_requests_load_four_gpus(server: HostServer, num_gpus: int) -> None:
    with_meeting = [small_jobs.meet("all gpus", num_gpus) for _ in range(num_gpus)]
    ids = [server.submit(workflow)["prompt_id"] for workflow in with_meeting]
    entries = server.wait(ids)
    assert all(entry["status"]["completed"] for entry in entries.values())
    assert sorted(entry["gpu_id"] for entry in entries.values()) == list(range(num_gpus))


def test_threads_of_a_node_compute_on_its_gpu(server: HostServer, num_gpus: int) -> None:
    for index in range(num_gpus):
        seen = json.loads(shown(server.run(show("CPTThreads"), index)))
        assert all(place == {"slot": index, "cuda_device": index} for place in seen.values()), seen


def test_cuda_random_numbers_are_those_of_a_lonely_job(
    make_gpu_server: MakeGpuServer, server: HostServer, num_gpus: int
) -> None:
    stock = make_gpu_server(slots=None)
    seeds = range(20 * num_gpus)
    alone = [shown(stock.run(show("CPTCudaRandom", seed=seed, rounds=100))) for seed in seeds]
    stock.stop()
    ids = [server.submit(show("CPTCudaRandom", seed=seed, rounds=100), seed % num_gpus)["prompt_id"] for seed in seeds]
    entries = server.wait(ids)
    assert [shown(entries[prompt_id]) for prompt_id in ids] == alone


@pytest.mark.parametrize("allocator", ["--cuda-malloc", "--disable-cuda-malloc"])
def test_emptying_the_cache_leaves_the_other_gpus_alone(make_gpu_server: MakeGpuServer, allocator: str) -> None:
    server = make_gpu_server(slots="cuda:0,cuda:1", args=[allocator])
    holding = {
        "fill": node("CPTCudaCache", mib=512),
        "hold": node("CPTSleep", seconds=300.0, seed=["fill", 0]),
        "out": node("CPTOut", value=["hold", 0]),
    }
    busy = server.submit(holding, 1)["prompt_id"]
    wait_until_cached(server)
    workflow = {
        "fill": node("CPTCudaCache", mib=256),
        "work": node("CPTEmptyCache", after=["fill", 0]),
        "out": node("CPTOut", value=["work", 0]),
    }
    seen = json.loads(shown(server.run(workflow, 0)))
    server.request("POST", "/interrupt", {"prompt_id": busy})
    assert seen["own"] == 0
    assert seen["before"][1] >= 512 << 20
    assert seen["after"][1] == seen["before"][1]
    if allocator == "--cuda-malloc":
        assert seen["after"][0] <= seen["before"][0] - (256 << 20)


def wait_until_cached(server: HostServer) -> None:
    def cached() -> int:
        vram = queues(server)[1]["vram"]
        return vram["torch_reserved_bytes"] - vram["torch_allocated_bytes"]

    while cached() < 512 << 20:
        time.sleep(POLL_S)


def test_out_of_memory_on_one_gpu_leaves_the_others_alone(server: HostServer, num_gpus: int) -> None:
    models_before = queues(server)[1]["models"]
    others = [server.submit(txt2img(70 + i, steps=30), 1)["prompt_id"] for i in range(2)]
    failed = server.run(show("CPTCudaOutOfMemory"), 0)
    assert failed["status"]["status_str"] == "error"
    assert all(entry["status"]["completed"] for entry in server.wait(others).values())
    assert server.run(txt2img(80), 0)["status"]["completed"]
    assert queues(server)[0]["metrics"]["jobs_out_of_memory"] == 1
    assert queues(server)[1]["metrics"]["jobs_out_of_memory"] == 0
    assert len(queues(server)[1]["models"]) >= len(models_before)


def test_visible_devices_and_the_hosts_own_flag_are_respected(make_gpu_server: MakeGpuServer) -> None:
    for options in (
        {"slots": "", "env": {"CUDA_VISIBLE_DEVICES": "1"}},
        {"slots": "", "args": ["--cuda-device", "1"]},
    ):
        server = make_gpu_server(**options)
        assert [queue["device"] for queue in queues(server)] == ["cuda:0"]
        assert server.run(txt2img(1))["status"]["completed"]
        used = used_memory_mib()
        server.stop()
        assert used[1] > used[0], used
    named = make_gpu_server(slots="cuda:1")
    assert json.loads(shown(named.run(show("CPTWhere"))))["device"] == "cuda:1"


def used_memory_mib() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.check_output(query, text=True).split()]


def test_a_device_that_is_not_there_ends_the_start(make_gpu_server: MakeGpuServer, num_gpus: int) -> None:
    with pytest.raises(HostServerError, match=rf"cuda:{num_gpus + 5} does not exist, {num_gpus} visible"):
        make_gpu_server(slots=f"cuda:0,cuda:{num_gpus + 5}")
    with pytest.raises(HostServerError, match="COMFY_NUM_GPUS=99: .* at most"):
        make_gpu_server(slots="", env={"COMFY_NUM_GPUS": "99"})


def test_a_device_that_cannot_be_initialised_ends_the_start(make_gpu_server: MakeGpuServer) -> None:
    hog = "import torch; d='cuda:1'; torch.zeros(1, device=d); b=[]\n" + (
        "for size in (2**30, 2**24, 2**21):\n"
        "    try:\n"
        "        while True: b.append(torch.empty(size, dtype=torch.uint8, device=d))\n"
        "    except torch.OutOfMemoryError: pass\n"
        "print('full', flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        with pytest.raises(HostServerError, match="cuda:1 cannot be initialised: .*Leave it out"):
            make_gpu_server(slots="cuda:0,cuda:1")
    finally:
        process.kill()
        process.wait()


# On a GPU, stock gives a few jobs slightly other pixels (up to 10 of 255) when they are the first after a model was
# loaded or switched; the same order gives the same bytes every time. On N slots other jobs come first, so a job may
# equal either of two stock runs, one in the order of submission and one in reverse, byte for byte.


def jobs_in_any_order(per_group: int) -> list[Job]:
    """Jobs whose images do not depend on what ran before.

    The schedules `normal` and `sgm_uniform` do, on a GPU: ComfyUI computes them where the model lies, which is in RAM
    for the first job after a load, and logarithms there differ in their last bits.
    """
    others = {"normal": "karras", "sgm_uniform": "simple"}
    jobs = make_jobs(per_group)
    schedulers = [job.options["scheduler"] for job in jobs]
    return [
        replace(job, options={**job.options, "scheduler": others.get(scheduler, scheduler)})
        for job, scheduler in zip(jobs, schedulers, strict=True)
    ]


def warmed_up(server: HostServer, num_slots: int) -> HostServer:
    for index in range(num_slots):
        server.run(txt2img(12345, text="warm up"), index)
    return server


def stock_in_order(make_gpu_server: MakeGpuServer, jobs: list[Job]) -> Run:
    """The jobs one by one on stock ComfyUI, on one GPU."""
    server = warmed_up(make_gpu_server(slots=None, link=False), 1)
    run = run_jobs(server, jobs)
    server.stop()
    return run


@pytest.fixture(scope="module")
def parity_jobs() -> list[Job]:
    return jobs_in_any_order(25)[:PARITY_JOBS]


@pytest.fixture(scope="module")
def stock_run(make_gpu_server: MakeGpuServer, parity_jobs: list[Job]) -> Run:
    return stock_in_order(make_gpu_server, parity_jobs)


def test_stock_on_one_gpu_gives_the_same_in_any_order(
    make_gpu_server: MakeGpuServer, parity_jobs: list[Job], stock_run: Run
) -> None:
    assert differing(parity_jobs, stock_run, stock_in_order(make_gpu_server, parity_jobs[::-1])) == []


@pytest.mark.parametrize("weights", ["map", "off"])
def test_images_are_those_of_stock_on_one_gpu(
    make_gpu_server: MakeGpuServer, num_gpus: int, parity_jobs: list[Job], stock_run: Run, weights: str
) -> None:
    server = warmed_up(make_gpu_server(slots="", env={"COMFY_PARALLEL_WEIGHTS": weights}), num_gpus)
    found = run_jobs(server, parity_jobs)
    server.stop()
    assert {entry["gpu_id"] for entry in found.entries.values()} == set(range(num_gpus))
    assert differing(parity_jobs, stock_run, found) == []


def test_a_slot_in_stocks_order_gives_stocks_images_with_every_schedule(
    make_gpu_server: MakeGpuServer, num_gpus: int
) -> None:
    jobs = make_jobs()[:50]
    server = warmed_up(make_gpu_server(slots=""), num_gpus)
    found = run_jobs(server, jobs, slot=num_gpus - 1)
    server.stop()
    assert differing(jobs, stock_in_order(make_gpu_server, jobs), found) == []


def test_a_slots_first_image_is_that_of_a_fresh_stock_server(make_gpu_server: MakeGpuServer, num_gpus: int) -> None:
    first = make_jobs()[1:2]
    stock = make_gpu_server(slots=None, link=False)
    expected = run_jobs(stock, first)
    stock.stop()
    server = make_gpu_server(slots="")
    for index in range(num_gpus):
        found = run_jobs(server, first, slot=index)
        assert differing(first, expected, found) == [], index
    server.stop()


@pytest.mark.parametrize("attempt", [1, 2])
def test_two_slots_on_one_gpu_give_the_same_images(
    make_gpu_server: MakeGpuServer, parity_jobs: list[Job], stock_run: Run, attempt: int
) -> None:
    jobs = parity_jobs[:50]
    server = make_gpu_server(slots="cuda:0", env={"COMFY_PARALLEL_SLOTS_PER_GPU": "2"})
    found = run_jobs(warmed_up(server, 2), jobs)
    server.stop()
    assert {entry["gpu_id"] for entry in found.entries.values()} == {0, 1}
    assert differing(jobs, stock_run, found) == []
