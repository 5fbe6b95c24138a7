"""Writes a full-size model of random weights that ComfyUI's own loaders accept, about as fast as the disk takes it.

    python benchmarks/full_size.py COMFYUI_DIR MODELS_DIR {sd15,small,sdxl,flux}

sd15, small, sdxl: checkpoints/NAME.safetensors, with text encoders and VAE (2, 1.5 and 7 GB); small is SD1.5 with half
of its layers, 0.8 billion parameters in all. flux: 12 billion parameters in
diffusion_models/ and a VAE in vae/ (24 GB); no text encoder, the test node CPTConditioning stands in for it.
The models exist on torch's meta device only; their tensors are filled from one short run of random numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.checkpoint import UNET_CONFIG, WEIGHT_GAIN, WIDE, enter_host
from tests.host.models import cached_shapes
from tests.host.shapes import FLUX, SDXL, flux_config

if TYPE_CHECKING:
    import torch

StateDict = dict[str, "torch.Tensor"]

SD15: dict[str, Any] = {
    **UNET_CONFIG,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
VAE: dict[str, Any] = {
    "double_z": True,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SMALL: dict[str, Any] = {**SD15, **WIDE}
FILES = {
    "sd15": "checkpoints/sd15.safetensors",
    "small": "checkpoints/small.safetensors",
    "sdxl": "checkpoints/sdxl.safetensors",
    "flux": "diffusion_models/flux.safetensors",  # the larger one, written last
}
RUN_LENGTH = 1 << 22  # random numbers, repeated in larger tensors


def make(name: str, models_dir: Path) -> None:
    import comfy.supported_models as supported
    import torch

    if name == "flux":
        write(vae(16), models_dir / "vae" / "flux.safetensors", torch.bfloat16)
        write(flux(), models_dir / FILES[name], torch.bfloat16)
    else:
        configs = {"sd15": (supported.SD15, SD15), "small": (supported.SD15, SMALL), "sdxl": (supported.SDXL, SDXL)}
        kind, shape = configs[name]
        config = kind(dict(shape))
        write(checkpoint(config), models_dir / FILES[name], torch.float16)


def checkpoint(config: Any) -> StateDict:
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init)
    encoder = config.clip_target(state_dict={}).clip(device="meta", dtype=torch.float16, model_options={})
    return {
        **prefixed(unet.state_dict(), "model.diffusion_model."),
        **config.process_clip_state_dict_for_saving(encoder.state_dict()),
        **prefixed(vae(4), "first_stage_model."),
    }


def flux() -> StateDict:
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    model = Flux(**flux_config(FLUX), dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    weights: StateDict = model.state_dict()
    return weights


def vae(channels: int) -> StateDict:
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        weights: StateDict = AutoencoderKL(ddconfig={**VAE, "z_channels": channels}, embed_dim=channels).state_dict()
    return weights


def prefixed(weights: StateDict, prefix: str) -> StateDict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def write(weights: StateDict, path: Path, dtype: torch.dtype) -> None:
    """A safetensors file: the length of its header, the header (padded to 8 bytes, as the library does), the tensors'
    bytes in a row."""
    weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    kinds = {"float16": "F16", "bfloat16": "BF16"}
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        kind = kinds[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in weights.items():
            write_numbers(file, name, tensor, dtype)
    os.replace(partial, path)


def write_numbers(file: Any, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    import torch

    left = tensor.numel()
    if tensor.ndim > 1:
        run = random_run()[:left] * (WEIGHT_GAIN / math.sqrt(tensor[0].numel()))
    else:
        run = torch.full((min(left, RUN_LENGTH),), float(name.endswith(("weight", "scale"))))
    content = run.to(dtype).view(torch.uint8).numpy()
    while left > 0:
        file.write(content[: left * dtype.itemsize].data)
        left -= len(run)


@functools.cache
def random_run() -> torch.Tensor:
    import torch

    return torch.randn(RUN_LENGTH, generator=torch.Generator().manual_seed(1))


def start_making(comfyui: Path, models_dir: Path, names: Iterable[str]) -> list[subprocess.Popen[bytes]]:
    """Start making these models, all at once, in a models directory that servers may look at already.

    Those that are there already are kept.
    """
    for folder in ("checkpoints", "diffusion_models", "vae"):
        (models_dir / folder).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(comfyui), str(models_dir)]
    return [subprocess.Popen([*command, name]) for name in names if not (models_dir / FILES[name]).exists()]


@contextmanager
def being_made(
    comfyui: Path, models_dir: Path, names: Iterable[str], *, is_tiny: bool
) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """A models directory, and the processes that make those of these models which it lacks; they end with the body.

    Args:
        is_tiny: the tests' small models instead, which are made when the body begins.
    """
    if is_tiny:
        cache = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
        yield cached_shapes(comfyui, cache), []
        return
    makers = start_making(comfyui, models_dir, names)
    try:
        yield models_dir, makers
    finally:
        for maker in makers:
            maker.kill()
            maker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("name", choices=tuple(FILES))
    options = parser.parse_args()
    enter_host(options.comfyui.resolve())
    make(options.name, options.models_dir.resolve())


if __name__ == "__main__":
    main()
