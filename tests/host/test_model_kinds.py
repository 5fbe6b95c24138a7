"""Model files of every kind that ComfyUI loads are shared by all slots, and give the images of stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_parallel.http.preload import LOADERS
from tests.host.conftest import MakeServer
from tests.host.jobs import outcome
from tests.host.models import cached_shapes
from tests.host.server import HostServer
from tests.host.test_weights import file_of, images_of, slots
from tests.host.workflows import Workflow, node, txt2img

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

FILES = {
    "checkpoints": "a.safetensors",
    "clip_vision": "vision.safetensors",
    "controlnet": "control.safetensors",
    "diffusion_models": "unet.safetensors",
    "loras": "lora.safetensors",
    "style_models": "style.safetensors",
    "text_encoders": "text.safetensors",
    "upscale_models": "upscale.pth",
    "vae": "vae.safetensors",
}
PRELOADED = [f"{folder}/{FILES[folder]}" for folder in sorted(LOADERS)]
IN_CHECKPOINT = {
    "diffusion_models": "model.diffusion_model.",
    "text_encoders": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}
UNUSED = ("checkpoints", "clip_vision", "style_models")  # by the images
VISION_WIDTH = 1024  # of the ViT-L, which ComfyUI takes it for
REDUX_WIDTH, REDUX_TEXT_WIDTH = 1152, 4096


@pytest.fixture(scope="module")
def kinds(host_dir: Path, cache_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with a file of each kind."""
    home = tmp_path_factory.mktemp("kinds")
    models = home / "models"
    for folder in FILES:
        (models / folder).mkdir(parents=True)
    for folder, source in (
        ("checkpoints", models_dir),
        ("controlnet", cached_shapes(host_dir, cache_dir)),
        ("loras", models_dir),
    ):
        (models / folder / FILES[folder]).symlink_to(source / folder / FILES[folder])
    whole = load_file(models_dir / "checkpoints" / FILES["checkpoints"])
    for folder, prefix in IN_CHECKPOINT.items():
        part = {name.removeprefix(prefix): weight for name, weight in whole.items() if name.startswith(prefix)}
        save_file(part, models / folder / FILES[folder])
    torch.manual_seed(1)
    save_file(vision_weights(), models / "clip_vision" / FILES["clip_vision"])
    save_file(style_weights(), models / "style_models" / FILES["style_models"])
    torch.save(upscale_weights(), models / "upscale_models" / FILES["upscale_models"])
    return home


def vision_weights() -> dict[str, Any]:
    """Some layers of a CLIP vision model. ComfyUI makes the others and leaves them empty."""
    weights = {"vision_model.embeddings.position_embedding.weight": torch.randn(257, VISION_WIDTH).half()}
    for number in (0, 22):
        layer = f"vision_model.encoder.layers.{number}"
        weights[f"{layer}.layer_norm1.weight"] = torch.ones(VISION_WIDTH).half()
        weights[f"{layer}.mlp.fc1.weight"] = torch.randn(4 * VISION_WIDTH, VISION_WIDTH).half()
    return weights


def style_weights() -> dict[str, Any]:
    """Of a Redux model."""
    inner = 3 * REDUX_TEXT_WIDTH
    return {
        "redux_up.weight": torch.randn(inner, REDUX_WIDTH).half(),
        "redux_up.bias": torch.zeros(inner).half(),
        "redux_down.weight": torch.randn(REDUX_TEXT_WIDTH, inner).half(),
        "redux_down.bias": torch.zeros(REDUX_TEXT_WIDTH).half(),
    }


def upscale_weights() -> dict[str, Any]:
    """Of a small ESRGAN, which makes images four times as large."""
    from spandrel.architectures.ESRGAN import ESRGAN

    weights: dict[str, Any] = ESRGAN(num_filters=16, num_blocks=2).state_dict()
    return weights


def with_every_kind(seed: int) -> Workflow:
    """A job whose models come from files of their own."""
    workflow = txt2img(seed, prefix="kinds", lora=FILES["loras"])
    del workflow["ckpt"]
    workflow |= {
        "unet": node("UNETLoader", unet_name=FILES["diffusion_models"], weight_dtype="default"),
        "text": node("CLIPLoader", clip_name=FILES["text_encoders"], type="stable_diffusion"),
        "vae": node("VAELoader", vae_name=FILES["vae"]),
        "control": node("ControlNetLoader", control_net_name=FILES["controlnet"]),
        "hint": node("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0),
        "controlled": node(
            "ControlNetApply", conditioning=["positive", 0], control_net=["control", 0], image=["hint", 0], strength=0.5
        ),
        "upscaler": node("UpscaleModelLoader", model_name=FILES["upscale_models"]),
        "larger": node("ImageUpscaleWithModel", upscale_model=["upscaler", 0], image=["decode", 0]),
    }
    workflow["lora"]["inputs"] |= {"model": ["unet", 0], "clip": ["text", 0]}
    workflow["sampler"]["inputs"]["positive"] = ["controlled", 0]
    workflow["decode"]["inputs"]["vae"] = ["vae", 0]
    workflow["save"]["inputs"]["images"] = ["larger", 0]
    return workflow


def preload(server: HostServer, slot: int) -> int:
    """Load a file of each kind that can be loaded by itself. Returns the host's memory after that, in bytes."""
    body = {"files": PRELOADED, "gpu_ids": [slot]}
    status, reply = server.request("POST", "/parallel/preload", body)
    assert status == 200
    (entry,) = server.wait([job["prompt_id"] for job in reply["jobs"]]).values()
    assert outcome(entry) == "success", entry["status"]
    return server.used_bytes


def test_another_slot_takes_little_memory_for_files_of_every_kind(make_server: MakeServer, kinds: Path) -> None:
    server = make_server(kinds, slots=slots(3))
    _, second, third = (preload(server, slot) for slot in range(3))
    files = {name: file_of(server, name) for name in PRELOADED}
    assert {name: file["slots"] for name, file in files.items()} == dict.fromkeys(PRELOADED, [0, 1, 2])
    shared = {name: file["mapped_bytes"] + file["copied_bytes"] for name, file in files.items()}
    assert all(shared.values()), shared
    total = sum(file["size_bytes"] for file in files.values())
    assert third - second < total / 10, "modules and tokenizers are each slot's own"


def test_models_from_files_of_their_own_give_stocks_images_on_all_slots(make_server: MakeServer, kinds: Path) -> None:
    seeds = range(4)
    stock = make_server(kinds, slots=None)
    expected = images_of(stock, [stock.run(with_every_kind(seed)) for seed in seeds])
    stock.stop()
    assert len(set(expected)) == len(expected)
    server = make_server(kinds, slots=slots(2))
    ids = [server.submit(with_every_kind(seed), slot)["prompt_id"] for seed in seeds for slot in (0, 1)]
    entries = server.wait(ids)
    assert images_of(server, [entries[prompt_id] for prompt_id in ids]) == [one for one in expected for _ in (0, 1)]
    files = [f"{folder}/{file}" for folder, file in FILES.items() if folder not in UNUSED]
    assert {name: file_of(server, name)["slots"] for name in files} == dict.fromkeys(files, [0, 1])
    placed = [
        server.submit(elsewhere(with_every_kind(seed), "cpu,60%;slot,40%"), slot) for slot, seed in enumerate((0, 1))
    ]
    done = server.wait([reply["prompt_id"] for reply in placed])
    assert images_of(server, [done[reply["prompt_id"]] for reply in placed]) == expected[:2]


def elsewhere(workflow: Workflow, allocation: str) -> Workflow:
    """The same with most of each model's weights on a donor."""
    for name in ("unet", "text", "vae", "control"):
        workflow[name]["class_type"] += "DisTorch2MultiGPU"
        workflow[name]["inputs"]["expert_mode_allocations"] = allocation
    return workflow
