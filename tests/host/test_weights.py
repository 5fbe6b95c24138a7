"""One copy of the weights in RAM for all slots: what it costs, that nobody writes to it, and files that change."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.host.conftest import MakeServer
from tests.host.jobs import message, outcome
from tests.host.models import cached_models
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.workflows import Workflow, node, txt2img, with_hook_lora, with_loras

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

SLOTS = 4
MIXED_JOBS = 500
RUN = 25
REPEATS = 10
WIDE = "wide.safetensors"
TEXTS = ("a lighthouse at dusk", "two foxes, snow")


def slots(count: int) -> str:
    return ",".join(["cpu"] * count)


def image_of(server: HostServer, workflow: Workflow, slot: int | None = None) -> str:
    entry = server.run(workflow, slot)
    assert outcome(entry) == "success", entry["status"]
    return images_of(server, [entry])[0]


def images_of(server: HostServer, entries: list[JSON]) -> list[str]:
    """A hash of each job's pixels."""
    for entry in entries:
        assert outcome(entry) == "success", entry["status"]
    names = [entry["outputs"]["save"]["images"][0]["filename"] for entry in entries]
    images = [Image.open(server.base_dir / "output" / name) for name in names]
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def run_on_all(server: HostServer, workflows: list[Workflow]) -> list[JSON]:
    ids = [server.submit(workflow)["prompt_id"] for workflow in workflows]
    entries = server.wait(ids, 500)
    return [entries[prompt_id] for prompt_id in ids]


def weights(server: HostServer) -> JSON:
    status, reply = server.request("GET", "/parallel/weights")
    assert status == 200
    found: JSON = reply
    return found


def file_of(server: HostServer, name: str) -> JSON:
    (found,) = [file for file in weights(server)["files"] if file["name"] == name]
    entry: JSON = found
    return entry


def digests(server: HostServer) -> dict[str, list[str]]:
    status, reply = server.request("GET", "/test/weights")
    assert status == 200
    return dict(reply)


# What it does.


def test_a_models_modules_are_as_stock_leaves_them(make_server: MakeServer) -> None:
    workflow = {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["ckpt", 0], lora_name="lora.safetensors", strength_model=1.0),
        "modules": node("CPTLoadedModules", model=["ckpt", 0], with_lora=["lora", 0]),
    }
    found = []
    for server in (make_server(slots=None), make_server(slots="cpu")):
        entry = server.run(workflow)
        assert outcome(entry) == "success", entry["status"]
        found.append(entry["outputs"]["modules"])
    stock, ours = found
    assert ours["modules"] == stock["modules"]
    assert ours["listed"] == stock["listed"]


# What it costs.


def pss_bytes(server: HostServer) -> int:
    """The smallest of some readings: a slot gives memory back just after its job's end was told."""
    readings = []
    for _ in range(10):
        readings.append(server.pss_bytes)
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


def pss_after(server: HostServer, count: int, names: tuple[str, ...]) -> int:
    """Proportional set size when each slot has run a job with each of these checkpoints."""
    for name in names:
        ids = [server.submit(txt2img(slot, ckpt=name, steps=1), slot)["prompt_id"] for slot in range(count)]
        assert {outcome(entry) for entry in server.wait(ids, 300).values()} == {"success"}
    return pss_bytes(server)


def test_four_slots_need_little_more_memory_than_one(make_wide_server: MakeServer) -> None:
    """With one model, and when a second and the first again have been used on all slots."""
    turns = [(WIDE,), ("a.safetensors", WIDE)]
    server = make_wide_server(slots=slots(1))
    with_one = [pss_after(server, 1, names) for names in turns]
    server.stop()
    server = make_wide_server(slots=slots(SLOTS))
    with_four = [pss_after(server, SLOTS, names) for names in turns]
    assert file_of(server, f"checkpoints/{WIDE}")["slots"] == list(range(SLOTS))
    told = f"{[size >> 20 for size in with_four]} MiB with {SLOTS} slots, {[size >> 20 for size in with_one]} with one"
    assert all(four < 1.10 * one for four, one in zip(with_four, with_one, strict=True)), told


def test_repeated_jobs_add_no_memory(make_server: MakeServer) -> None:
    """One reading may be some percent too high, while allocations are on their way back. What grows with each job is in
    all of the last ones."""
    server = make_server(slots=slots(2))
    names = ("a.safetensors", "b.safetensors")
    before = max(pss_after(server, 2, names) for _ in range(2))
    after = [pss_after(server, 2, names) for _ in range(REPEATS)]
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


def test_mixed_loras_on_four_slots_give_stocks_images(make_server: MakeServer) -> None:
    jobs = mixed_jobs(20)
    stock = make_server(slots=None, link=False)
    expected = images_of(stock, run_on_all(stock, jobs))
    stock.stop()
    assert len(set(expected)) == len(jobs)
    server = make_server(slots=slots(SLOTS))
    assert images_of(server, run_on_all(server, jobs)) == expected


def test_500_mixed_jobs_leave_the_shared_bytes_as_they_are(make_server: MakeServer) -> None:
    server = make_server(slots=slots(SLOTS))
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


def test_a_slots_job_that_is_interrupted_while_it_loads_leaves_the_others_alone(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2))
    expected = image_of(server, txt2img(1), 0)
    for _ in range(5):
        prompt_id = server.submit(txt2img(2, ckpt="b.safetensors"), 1)["prompt_id"]
        server.request("POST", "/interrupt", {"prompt_id": prompt_id})
        server.wait([prompt_id])
        server.request("POST", "/free", {"unload_models": True, "free_memory": True}, headers={"X-TARGET-GPU": "1"})
    assert image_of(server, txt2img(1, prefix="again"), 0) == expected
    assert image_of(server, txt2img(1, prefix="other"), 1) == expected


# Files that change, and files that are broken.


@pytest.fixture
def own_models(models_dir: Path, tmp_path: Path) -> Path:
    """A copy of the models, to be changed."""
    shutil.copytree(models_dir, tmp_path / "base" / "models")
    return tmp_path / "base" / "models"


@pytest.fixture
def changing(make_server: MakeServer, own_models: Path) -> HostServer:
    return make_server(own_models.parent, slots=slots(2))


def overwrite_in_place(path: Path, source: Path) -> None:
    subprocess.run(["sh", "-c", 'cat "$0" > "$1"', source, path], check=True)


def replace_by_rename(path: Path, source: Path) -> None:
    shutil.copy(source, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [overwrite_in_place, replace_by_rename])
def test_jobs_in_progress_finish_on_the_old_bytes_and_new_loads_read_the_new(
    changing: HostServer, own_models: Path, change: Any
) -> None:
    checkpoints = own_models / "checkpoints"
    other, expected = (image_of(changing, txt2img(1, ckpt=f"{name}.safetensors"), 0) for name in "ba")
    with changing.websocket() as client:
        running = changing.submit(txt2img(2, steps=30), 0, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "progress" and event["data"]["value"] >= 2)
        change(checkpoints / "a.safetensors", checkpoints / "b.safetensors")
        assert outcome(changing.wait([running])[running]) == "success"
    assert image_of(changing, txt2img(1, prefix="cached"), 0) == expected, "this slot still has the old model"
    changing.request("POST", "/free", {"unload_models": True, "free_memory": True})
    await_slots(changing, "checkpoints/a.safetensors", None)  # A job that is there first goes before the freeing.
    for slot in (0, 1):
        assert image_of(changing, txt2img(1, prefix="changed"), slot) == other


def test_copied_files_give_the_same_images(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_WEIGHTS": "copy"})
    assert image_of(server, txt2img(1), 0) == image_of(server, txt2img(1), 1)
    assert weights(server)["mode"] == "copy"
    file = file_of(server, "checkpoints/a.safetensors")
    assert (file["mapped_bytes"], file["copied_bytes"], file["slots"]) == (0, file["size_bytes"], [0, 1])


def test_a_file_cut_off_while_in_use_hurts_nobody_who_has_it(changing: HostServer, own_models: Path) -> None:
    path = own_models / "checkpoints" / "a.safetensors"
    expected = image_of(changing, txt2img(1), 0)
    subprocess.run(["sh", "-c", ': > "$0"', path], check=True)
    assert image_of(changing, txt2img(1, prefix="again"), 0) == expected
    entry = changing.run(txt2img(1), 1)
    assert outcome(entry) == "error"
    assert str(path) in message(entry, "execution_error")["exception_message"]
    assert image_of(changing, txt2img(1, ckpt="b.safetensors"), 1)


def test_a_lora_cut_off_while_in_use_hurts_nobody_who_has_it(changing: HostServer, own_models: Path) -> None:
    expected = image_of(changing, with_loras(txt2img(1), 1.0), 0)
    subprocess.run(["sh", "-c", ': > "$0"', own_models / "loras" / "lora.safetensors"], check=True)
    other = image_of(changing, with_loras(txt2img(1), 0.5), 0)
    assert other != expected
    assert image_of(changing, with_loras(txt2img(1, prefix="again"), 1.0), 0) == expected


BROKEN_SIZES = {"empty": 0, "7_bytes": 7, "1000_bytes": 1000, "1000_bytes_short": -1000}


@pytest.fixture(scope="module")
def broken(make_module_server: MakeServer, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HostServer:
    """A host with checkpoints that are cut off."""
    base = tmp_path_factory.mktemp("broken")
    checkpoints = base / "models" / "checkpoints"
    shutil.copytree(models_dir, base / "models")
    torch.save({"model.weight": torch.randn(1000, 100)}, checkpoints / "a.ckpt")
    for whole in (checkpoints / "a.safetensors", checkpoints / "a.ckpt"):
        for name, size in BROKEN_SIZES.items():
            (checkpoints / f"{name}{whole.suffix}").write_bytes(whole.read_bytes()[:size])
    return make_module_server(base, slots=slots(2))


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", BROKEN_SIZES)
def test_a_broken_file_is_named_and_hurts_only_its_job(broken: HostServer, ending: str, name: str) -> None:
    for slot in (0, 1):
        entry = broken.run(txt2img(1, ckpt=f"{name}.{ending}"), slot)
        assert outcome(entry) == "error"
        path = broken.base_dir / "models" / "checkpoints" / f"{name}.{ending}"
        assert str(path) in message(entry, "execution_error")["exception_message"]
    assert image_of(broken, txt2img(1, steps=1), 0) == image_of(broken, txt2img(1, steps=1), 1)


def test_a_pickled_checkpoint_is_shared_too(make_server: MakeServer, own_models: Path) -> None:
    from safetensors.torch import load_file

    torch.save(
        {"state_dict": load_file(own_models / "checkpoints" / "a.safetensors")}, own_models / "checkpoints" / "a.ckpt"
    )
    server = make_server(own_models.parent, slots=slots(2))
    expected = image_of(server, txt2img(1), 0)
    for slot in (0, 1):
        assert image_of(server, txt2img(1, ckpt="a.ckpt", prefix="pickled"), slot) == expected
    file = file_of(server, "checkpoints/a.ckpt")
    assert (file["slots"], file["mapped_bytes"]) == ([0, 1], 0)
    assert file["copied_bytes"] >= file["size_bytes"] // 2


def test_a_file_that_cannot_be_guarded_is_copied_and_said_so_once(make_server: MakeServer, own_models: Path) -> None:
    """No lease is to be had on a file that somebody has open for writing."""
    path = own_models / "checkpoints" / "a.safetensors"
    with path.open("r+b"):
        server = make_server(own_models.parent, slots=slots(2))
        expected = image_of(server, txt2img(1), 0)
        assert image_of(server, txt2img(1, prefix="other"), 1) == expected
        file = file_of(server, "checkpoints/a.safetensors")
        assert (file["mapped_bytes"], file["copied_bytes"]) == (0, file["size_bytes"])
        assert server.log().count("weight files are copied into shared memory") == 1


def test_off_every_slot_has_its_own_copy(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_WEIGHTS": "off"})
    assert image_of(server, txt2img(1), 0) == image_of(server, txt2img(1), 1)
    assert weights(server) == {"mode": "off", "ram": {"budget_bytes": 0, "used_bytes": 0}, "slots": [], "files": []}


# Budget, giving back, loading ahead.


def test_beyond_the_budget_the_least_recently_used_file_goes(make_server: MakeServer) -> None:
    budget = int(0.5 * (1 << 30))  # room for one checkpoint
    server = make_server(slots=slots(1), env={"COMFY_PARALLEL_RAM_GB": "0.5"})
    for name in "abab":
        image_of(server, txt2img(1, ckpt=f"{name}.safetensors", steps=1))
        ram = weights(server)["ram"]
        assert ram["budget_bytes"] == budget
        assert 0 < ram["used_bytes"] < 2 * budget, "the last model is dropped after the next is loaded"
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    image_of(server, txt2img(1, steps=1, prefix="again"))
    assert weights(server)["ram"]["used_bytes"] < budget


def test_free_gives_the_weights_back(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2))
    for slot in (0, 1):
        image_of(server, txt2img(1), slot)
    assert file_of(server, "checkpoints/a.safetensors")["slots"] == [0, 1]
    body = {"unload_models": True, "free_memory": True}
    server.request("POST", "/free", body, headers={"X-TARGET-GPU": "0"})
    await_slots(server, "checkpoints/a.safetensors", [1])
    server.request("POST", "/free", body)
    await_slots(server, "checkpoints/a.safetensors", None)
    assert weights(server)["ram"]["used_bytes"] == 0


def await_slots(server: HostServer, name: str, expected: list[int] | None) -> None:
    seen: Any = "nothing"
    for _ in range(400):
        seen = {file["name"]: file["slots"] for file in weights(server)["files"]}.get(name)
        if seen == expected:
            return
        time.sleep(POLL_S)
    raise AssertionError(f"{name} is held by slots {seen}, not {expected}")


def test_a_file_is_loaded_ahead_onto_the_slots_that_are_named(make_server: MakeServer) -> None:
    server = make_server(slots=slots(3))
    status, reply = server.request(
        "POST", "/parallel/preload", {"files": ["checkpoints/b.safetensors"], "gpu_ids": [0, 2]}
    )
    assert status == 200
    assert [job["gpu_id"] for job in reply["jobs"]] == [0, 2]
    entries = server.wait([job["prompt_id"] for job in reply["jobs"]])
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert file_of(server, "checkpoints/b.safetensors")["slots"] == [0, 2]
    cached = server.run(txt2img(1, ckpt="b.safetensors"), 2)
    assert "ckpt" in message(cached, "execution_cached")["nodes"]


def test_files_named_at_start_are_loaded_on_every_slot(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_PRELOAD": "checkpoints/a.safetensors"})
    await_slots(server, "checkpoints/a.safetensors", [0, 1])


def test_a_name_at_start_that_is_not_there_is_told(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_PRELOAD": "checkpoints/none.safetensors"})
    assert (
        "COMFY_PARALLEL_PRELOAD: 'checkpoints/none.safetensors': no such file; files in checkpoints: " in server.log()
    )
    assert image_of(server, txt2img(1))


BAD_PRELOADS: dict[str, tuple[Any, str]] = {
    "no object": ([], "the request body is a list"),
    "no files": ({}, "files is no list of names"),
    "empty": ({"files": []}, "files is no list of names"),
    "a string": ({"files": "checkpoints/a.safetensors"}, "files is no list of names"),
    "a number": ({"files": [1]}, "files is no list of names"),
    "no folder": ({"files": ["a.safetensors"]}, "'a.safetensors': no such folder to preload from"),
    "other folder": ({"files": ["loras/lora.safetensors"]}, "no such folder to preload from"),
    "no such file": ({"files": ["checkpoints/c.safetensors"]}, "'checkpoints/c.safetensors': no such file"),
    "outside": ({"files": ["checkpoints/../loras/lora.safetensors"]}, "no such file"),
    "no such slot": ({"files": ["checkpoints/a.safetensors"], "gpu_ids": [2]}, "gpu_ids is no list of slots"),
    "a slot's name": ({"files": ["checkpoints/a.safetensors"], "gpu_ids": ["0"]}, "gpu_ids is no list of slots"),
}


@pytest.fixture(scope="module")
def two_slots(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=slots(2))


@pytest.mark.parametrize("kind", BAD_PRELOADS)
def test_a_preload_that_cannot_be_is_refused(two_slots: HostServer, kind: str) -> None:
    body, told = BAD_PRELOADS[kind]
    status, reply = two_slots.request("POST", "/parallel/preload", body)
    assert status == 400
    assert told in reply["error"]["message"]
    assert reply["error"]["details"]
    assert two_slots.request("GET", "/queue/all")[1]["total_pending"] == 0
