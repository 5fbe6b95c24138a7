"""Weight files that change or are broken while slots use them, the budget of RAM, and loading ahead."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host.conftest import MakeServer
from tests.host.held_weights import await_slots, file_of, image_of, slots, weights
from tests.host.jobs import message, new_key, outcome
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import txt2img, with_loras

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]


# Files that change, and files that are broken.


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HostServer:
    """A host with models of its own, to be changed."""
    base = tmp_path_factory.mktemp("changing")
    shutil.copytree(models_dir, base / "models")
    return make_module_server(base, slots=slots(2))


@pytest.fixture
def own(server: HostServer) -> Iterator[str]:
    """The name of a copy of the first checkpoint, for one test."""
    path = server.base_dir / "models" / "checkpoints" / f"{new_key()}.safetensors"
    shutil.copy(path.with_name("a.safetensors"), path)
    yield path.name
    path.unlink()


def path_of(server: HostServer, checkpoint: str) -> Path:
    return server.base_dir / "models" / "checkpoints" / checkpoint


def overwrite_in_place(path: Path, source: Path) -> None:
    subprocess.run(["sh", "-c", 'cat "$0" > "$1"', source, path], check=True)


def replace_by_rename(path: Path, source: Path) -> None:
    shutil.copy(source, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [overwrite_in_place, replace_by_rename])
def test_jobs_in_progress_finish_on_the_old_bytes_and_new_loads_read_the_new(
    server: HostServer, own: str, change: Any
) -> None:
    other, expected = (image_of(server, txt2img(1, ckpt=name, prefix=own), 0) for name in ("b.safetensors", own))
    with server.websocket() as client:
        running = server.submit(txt2img(2, ckpt=own, steps=30), 0, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "progress" and event["data"]["value"] >= 2)
        change(path_of(server, own), path_of(server, "b.safetensors"))
        assert outcome(server.wait([running])[running]) == "success"
    cached = image_of(server, txt2img(1, ckpt=own, prefix="cached"), 0)
    assert cached == expected, "this slot still has the old model"
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    await_slots(server, f"checkpoints/{own}", None)  # A job that is there first goes before the freeing.
    for slot in (0, 1):
        assert image_of(server, txt2img(1, ckpt=own, prefix="changed"), slot) == other


def test_copied_files_give_the_same_images(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_WEIGHTS": "copy"})
    assert image_of(server, txt2img(1), 0) == image_of(server, txt2img(1), 1)
    assert weights(server)["mode"] == "copy"
    file = file_of(server, "checkpoints/a.safetensors")
    assert (file["mapped_bytes"], file["copied_bytes"], file["slots"]) == (0, file["size_bytes"], [0, 1])


def test_a_file_cut_off_while_in_use_hurts_nobody_who_has_it(server: HostServer, own: str) -> None:
    path = path_of(server, own)
    expected = image_of(server, txt2img(1, ckpt=own), 0)
    subprocess.run(["sh", "-c", ': > "$0"', path], check=True)
    assert image_of(server, txt2img(1, ckpt=own, prefix="again"), 0) == expected
    entry = server.run(txt2img(1, ckpt=own), 1)
    assert outcome(entry) == "error"
    assert str(path) in message(entry, "execution_error")["exception_message"]
    assert image_of(server, txt2img(1, ckpt="b.safetensors", prefix=own), 1)


def test_a_lora_cut_off_while_in_use_hurts_nobody_who_has_it(server: HostServer, own: str) -> None:
    """No other test of this file uses the LoRA."""
    expected = image_of(server, with_loras(txt2img(1, ckpt=own), 1.0), 0)
    subprocess.run(["sh", "-c", ': > "$0"', server.base_dir / "models" / "loras" / "lora.safetensors"], check=True)
    other = image_of(server, with_loras(txt2img(1, ckpt=own), 0.5), 0)
    assert other != expected
    assert image_of(server, with_loras(txt2img(1, ckpt=own, prefix="again"), 1.0), 0) == expected


BROKEN_SIZES = {"empty": 0, "7_bytes": 7, "1000_bytes": 1000, "1000_bytes_short": -1000}


@pytest.fixture(scope="module")
def broken(server: HostServer) -> HostServer:
    """The host, with checkpoints that are cut off."""
    checkpoints = server.base_dir / "models" / "checkpoints"
    torch.save({"model.weight": torch.randn(1000, 100)}, checkpoints / "whole.ckpt")
    for whole in (checkpoints / "a.safetensors", checkpoints / "whole.ckpt"):
        for name, size in BROKEN_SIZES.items():
            (checkpoints / f"{name}{whole.suffix}").write_bytes(whole.read_bytes()[:size])
    return server


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", BROKEN_SIZES)
def test_a_broken_file_is_named_and_hurts_only_its_job(broken: HostServer, ending: str, name: str) -> None:
    for slot in (0, 1):
        entry = broken.run(txt2img(1, ckpt=f"{name}.{ending}"), slot)
        assert outcome(entry) == "error"
        path = broken.base_dir / "models" / "checkpoints" / f"{name}.{ending}"
        assert str(path) in message(entry, "execution_error")["exception_message"]
    assert image_of(broken, txt2img(1, steps=1), 0) == image_of(broken, txt2img(1, steps=1), 1)


def test_a_pickled_checkpoint_is_shared_too(server: HostServer, own: str) -> None:
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(path_of(server, own))}, path_of(server, "a.ckpt"))
    expected = image_of(server, txt2img(1, ckpt=own), 0)
    for slot in (0, 1):
        assert image_of(server, txt2img(1, ckpt="a.ckpt", prefix="pickled"), slot) == expected
    file = file_of(server, "checkpoints/a.ckpt")
    assert (file["slots"], file["mapped_bytes"]) == ([0, 1], 0)
    assert file["copied_bytes"] >= file["size_bytes"] // 2


def test_a_file_that_cannot_be_guarded_is_copied_and_said_so_once(server: HostServer, own: str) -> None:
    """No lease is to be had on a file that somebody has open for writing."""
    with path_of(server, own).open("r+b"):
        expected = image_of(server, txt2img(1, ckpt=own), 0)
        assert image_of(server, txt2img(1, ckpt=own, prefix="other"), 1) == expected
        file = file_of(server, f"checkpoints/{own}")
        assert (file["mapped_bytes"], file["copied_bytes"]) == (0, file["size_bytes"])
        assert server.log().count("weight files are copied into shared memory") == 1


def test_off_every_slot_has_its_own_copy(make_server: MakeServer) -> None:
    server = make_server(slots=slots(2), env={"COMFY_PARALLEL_WEIGHTS": "off"})
    assert image_of(server, txt2img(1), 0) == image_of(server, txt2img(1), 1)
    found = weights(server)
    told = {name: found[name] for name in ("mode", "ram", "slots", "files")}
    assert told == {"mode": "off", "ram": {"budget_bytes": 0, "used_bytes": 0}, "slots": [], "files": []}
    assert [process["pid"] for process in found["processes"]] == [server.pid]


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


def test_free_gives_the_weights_back(server: HostServer, own: str) -> None:
    for slot in (0, 1):
        image_of(server, txt2img(1, ckpt=own), slot)
    assert file_of(server, f"checkpoints/{own}")["slots"] == [0, 1]
    body = {"unload_models": True, "free_memory": True}
    server.request("POST", "/free", body, headers={"X-TARGET-GPU": "0"})
    await_slots(server, f"checkpoints/{own}", [1])
    server.request("POST", "/free", body)
    await_slots(server, f"checkpoints/{own}", None)
    assert weights(server)["ram"]["used_bytes"] == 0


def test_a_file_is_loaded_ahead_onto_the_slots_that_are_named(shared_server: ServerPool) -> None:
    server = shared_server(slots=slots(3))
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    await_slots(server, "checkpoints/b.safetensors", None)
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


@pytest.mark.parametrize("kind", BAD_PRELOADS)
def test_a_preload_that_cannot_be_is_refused(server: HostServer, kind: str) -> None:
    body, told = BAD_PRELOADS[kind]
    status, reply = server.request("POST", "/parallel/preload", body)
    assert status == 400
    assert told in reply["error"]["message"]
    assert reply["error"]["details"]
    assert server.request("GET", "/queue/all")[1]["total_pending"] == 0
