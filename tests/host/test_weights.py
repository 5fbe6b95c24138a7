"""One copy of the weights in RAM for all slots: what it costs, and that nobody writes to it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.host.conftest import MakeServer
from tests.host.held_weights import digests, file_of, image_of, images_of, run_on_all, slots
from tests.host.jobs import outcome
from tests.host.models import cached_models
from tests.host.pool import ServerPool
from tests.host.server import POLL_S, HostServer
from tests.host.workflows import Workflow, node, txt2img, with_hook_lora, with_loras

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

SLOTS = 4
MIXED_JOBS = 200
RUN = 10  # jobs in a row that differ in the seed only: 20 changes of what is to be loaded
REPEATS = 10
WIDE = "wide.safetensors"
TEXTS = ("a lighthouse at dusk", "two foxes, snow")


@pytest.fixture(scope="module")
def two_slots(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=slots(2))


@pytest.fixture(scope="module")
def four_slots(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=slots(SLOTS))


# What it does.


def test_a_models_modules_are_as_stock_leaves_them(make_server: MakeServer, shared_server: ServerPool) -> None:
    workflow = {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["ckpt", 0], lora_name="lora.safetensors", strength_model=1.0),
        "modules": node("CPTLoadedModules", model=["ckpt", 0], with_lora=["lora", 0]),
    }
    found = []
    for server in (shared_server(slots=None), make_server(slots="cpu")):
        entry = server.run(workflow)
        assert outcome(entry) == "success", entry["status"]
        found.append(entry["outputs"]["modules"])
    stock, ours = found
    assert ours["modules"] == stock["modules"]
    assert ours["listed"] == stock["listed"]


# What it costs.


def used_bytes(server: HostServer) -> int:
    """The smallest of some readings: a slot gives memory back just after its job's end was told."""
    readings = []
    for _ in range(10):
        readings.append(server.used_bytes)
        time.sleep(POLL_S)
    return min(readings)


@pytest.fixture
def make_wide_server(make_server: MakeServer, host_dir: Path, cache_dir: Path, tmp_path: Path) -> MakeServer:
    """Hosts whose models are large beside what Python and torch take."""
    models = cached_models(host_dir, cache_dir, ("a", "b", "wide"))

    def make(**options: Any) -> HostServer:
        base = tmp_path / f"host{len(list(tmp_path.iterdir()))}"
        base.mkdir()
        (base / "models").symlink_to(models, target_is_directory=True)
        return make_server(base, **options)

    return make


def used_after(server: HostServer, count: int, names: tuple[str, ...]) -> int:
    """The memory that the host needs when each slot has run a job with each of these checkpoints."""
    for name in names:
        ids = [server.submit(txt2img(slot, ckpt=name, steps=1), slot)["prompt_id"] for slot in range(count)]
        assert {outcome(entry) for entry in server.wait(ids, 300).values()} == {"success"}
    return used_bytes(server)


def test_four_slots_need_little_more_memory_than_one(make_wide_server: MakeServer) -> None:
    """With one model, and when a second and the first again have been used on all slots."""
    turns = [(WIDE,), ("a.safetensors", WIDE)]
    server = make_wide_server(slots=slots(1))
    with_one = [used_after(server, 1, names) for names in turns]
    server.stop()
    server = make_wide_server(slots=slots(SLOTS))
    with_four = [used_after(server, SLOTS, names) for names in turns]
    assert file_of(server, f"checkpoints/{WIDE}")["slots"] == list(range(SLOTS))
    told = f"{[size >> 20 for size in with_four]} MiB with {SLOTS} slots, {[size >> 20 for size in with_one]} with one"
    assert all(four < 1.10 * one for four, one in zip(with_four, with_one, strict=True)), told


def test_repeated_jobs_add_no_memory(two_slots: HostServer) -> None:
    """One reading may be some percent too high, while allocations are on their way back. What grows with each job is in
    all of the last ones."""
    server = two_slots
    names = ("a.safetensors", "b.safetensors")
    before = max(used_after(server, 2, names) for _ in range(2))
    after = [used_after(server, 2, names) for _ in range(REPEATS)]
    assert min(after[-3:]) < 1.01 * before, f"{[size >> 20 for size in after]} MiB, {before >> 20} MiB before"


# That nobody writes to it.


def mixed_jobs(count: int, *, run: int = 1) -> list[Workflow]:
    """Two checkpoints; LoRAs stacked, changed and removed. `run` jobs in a row differ in the seed only."""
    choose = random.Random(7)
    jobs = []
    for number in range(count):
        if number % run == 0:
            ckpt, text = choose.choice(("a.safetensors", "b.safetensors")), choose.choice(TEXTS)
            kind, strengths = choose.randrange(4), (choose.choice((-0.5, 0.5, 1.0)), choose.choice((0.25, 0.75)))
        job = txt2img(number, ckpt=ckpt, steps=1, text=text)
        jobs.append(with_hook_lora(job, strengths[0]) if kind == 3 else with_loras(job, *strengths[:kind]))
    return jobs


def test_mixed_loras_on_four_slots_give_stocks_images(four_slots: HostServer, shared_server: ServerPool) -> None:
    jobs = mixed_jobs(20)
    stock, server = shared_server(slots=None), four_slots
    expected = images_of(stock, run_on_all(stock, jobs))
    assert len(set(expected)) == len(jobs)
    assert images_of(server, run_on_all(server, jobs)) == expected


def test_many_mixed_jobs_leave_the_shared_bytes_as_they_are(four_slots: HostServer) -> None:
    server = four_slots
    for slot in range(SLOTS):  # By now every conversion has been made.
        for name in "ab":
            image_of(server, txt2img(1, ckpt=f"{name}.safetensors", steps=1), slot)
    before = digests(server)
    assert sum(map(len, before.values())) > 2
    jobs = mixed_jobs(MIXED_JOBS, run=RUN)
    ids = [server.submit(job, number // RUN % SLOTS)["prompt_id"] for number, job in enumerate(jobs)]
    assert {outcome(entry) for entry in server.wait(ids, 500).values()} == {"success"}
    after = digests(server)
    assert {path: after[path] for path in before} == before


def test_a_slots_job_that_is_interrupted_while_it_loads_leaves_the_others_alone(two_slots: HostServer) -> None:
    server = two_slots
    expected = image_of(server, txt2img(1), 0)
    for _ in range(5):
        prompt_id = server.submit(txt2img(2, ckpt="b.safetensors"), 1)["prompt_id"]
        server.request("POST", "/interrupt", {"prompt_id": prompt_id})
        server.wait([prompt_id])
        server.request("POST", "/free", {"unload_models": True, "free_memory": True}, headers={"X-TARGET-GPU": "1"})
    assert image_of(server, txt2img(1, prefix="again"), 0) == expected
    assert image_of(server, txt2img(1, prefix="other"), 1) == expected
