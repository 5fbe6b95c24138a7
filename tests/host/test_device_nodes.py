"""Nodes that choose devices give the images of the plain loaders, wherever the weights live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.host.jobs import outcome, run_on_each
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.test_weights import images_of
from tests.host.workflows import Workflow, txt2img, with_hook_lora, with_loras

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

PLACEMENTS = ("cpu,*", "slot,25%;cpu,75%", "slot,40mb;cpu,*", "cpu,123456789b;slot,*", "cpu,0.001;slot,*")
KINDS: dict[str, Callable[[Workflow], Workflow]] = {
    "plain": lambda workflow: workflow,
    "loras": lambda workflow: with_loras(workflow, 1.0, 0.5),
    "hook": lambda workflow: with_hook_lora(workflow, 0.8),
}
CORE = ("UNETLoader", "VAELoader", "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader")
CORE += ("CLIPVisionLoader", "CheckpointLoaderSimple", "ControlNetLoader", "DiffusersLoader", "DiffControlNetLoader")


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def spread(workflow: Workflow, allocation: str, **inputs: Any) -> Workflow:
    node = workflow["ckpt"]
    node["class_type"] = "CheckpointLoaderSimpleDisTorch2MultiGPU"
    node["inputs"] |= {"expert_mode_allocations": allocation, **inputs}
    return workflow


def test_the_nodes_of_all_core_loaders_are_there(server: HostServer) -> None:
    known = server.request("GET", "/object_info")[1]
    names = {f"{name}{kind}" for name in CORE for kind in ("MultiGPU", "DisTorch2MultiGPU")}
    assert names | {"DeviceSelectorMultiGPU", "CheckpointLoaderAdvancedMultiGPU"} <= known.keys()
    assert known["UNETLoaderMultiGPU"]["input"]["optional"]["device"][0] == ["slot", "cpu"]
    assert known["UNETLoaderMultiGPU"]["input"]["required"].keys() == known["UNETLoader"]["input"]["required"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_placement_gives_the_plain_image(server: HostServer, kind: str) -> None:
    """Two slots with different placements at once."""
    (expected,) = images_of(server, run_on_each(server, [KINDS[kind](txt2img(5))]))
    for first, second in zip(PLACEMENTS, PLACEMENTS[1:] + PLACEMENTS[:1], strict=True):
        jobs = [spread(KINDS[kind](txt2img(5)), allocation) for allocation in (first, second)]
        assert images_of(server, run_on_each(server, jobs)) == [expected] * 2, (first, second)
    assert "loaded partially" in server.log_path.read_text(encoding="utf-8")  # What ComfyUI says of a part.


def test_the_plan_is_shown_and_is_exact(server: HostServer) -> None:
    (entry,) = run_on_each(server, [spread(txt2img(6), "cpu,50%;slot,50%")])
    lines = entry["outputs"]["ckpt"]["text"]
    assert lines[-1] == "cpu,50%;slot,50%#slot;4;cpu"
    away, total = (int(lines[-2].split()[index]) for index in (0, 2))
    assert 0.48 * total < away <= 0.5 * total


def test_a_loader_and_an_advanced_one_with_devices_give_the_plain_image(server: HostServer) -> None:
    chosen, parts = txt2img(7), txt2img(7)
    chosen["ckpt"]["class_type"] = "CheckpointLoaderSimpleMultiGPU"
    chosen["ckpt"]["inputs"]["device"] = "cpu"
    parts["ckpt"]["class_type"] = "CheckpointLoaderAdvancedMultiGPU"
    parts["ckpt"]["inputs"] |= {"unet_device": "slot", "clip_device": "cpu", "vae_device": "cpu"}
    entries = [run_on_each(server, [job])[0] for job in (txt2img(7), chosen, parts)]
    assert len(set(images_of(server, entries))) == 1


def test_each_part_of_a_checkpoint_lives_where_it_is_said(server: HostServer) -> None:
    plain, spread_parts = (with_loras(txt2img(9), 1.0) for _ in range(2))
    spread_parts["ckpt"]["class_type"] = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
    for part in ("unet", "clip"):
        inputs = {"compute_device": "slot", "virtual_vram_gb": 0.05, "donor_device": "cpu"}
        spread_parts["ckpt"]["inputs"] |= {f"{part}_{name}": value for name, value in inputs.items()}
    spread_parts["ckpt"]["inputs"]["vae_device"] = "cpu"
    entries = [run_on_each(server, [job])[0] for job in (plain, spread_parts)]
    assert len(set(images_of(server, entries))) == 1
    lines = entries[1]["outputs"]["ckpt"]["text"]
    away = [int(line.split()[0]) for line in lines if line.endswith("bytes leave slot")]
    asked = 0.05 * 2**30
    assert len(away) == 2
    assert all(0.98 * asked <= size <= asked for size in away), away


@pytest.mark.parametrize(("allocation", "problem"), [("cpu,1tb", "no unit"), ("cuda:9,1gb", "no device 'cuda:9' here")])
def test_a_bad_allocation_ends_the_job_with_a_sentence(server: HostServer, allocation: str, problem: str) -> None:
    (entry,) = run_on_each(server, [spread(txt2img(8), allocation)])
    assert outcome(entry) == "error"
    assert problem in str(entry["status"]["messages"])
