"""Writes one small random model that is shaped like SDXL, like Flux, or like a ControlNet for SD1.5.

usage: python tests/host/shapes.py HOST_DIR OUT_DIR {sdxl,flux,control}

Makes OUT_DIR/diffusion_models/{sdxl,flux}.safetensors or OUT_DIR/controlnet/control.safetensors. SDXL keeps its depth
and loses its width, Flux the other way round: so the host still takes them for what they are shaped like. Their text
encoders cannot be small; the test node CPTConditioning stands in for them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO_DIR = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO_DIR))

from tests.host.checkpoint import UNET_CONFIG, enter_host, half, randomise, write  # noqa: E402 - needs the path above

if TYPE_CHECKING:
    import torch

SDXL: dict[str, Any] = {
    **{name: value for name, value in UNET_CONFIG.items() if name != "num_heads"},
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
NEW_IN_FLUX: dict[str, Any] = {"txt_ids_dims": []}  # as ComfyUI 0.33 sets it for this Flux
SMALL_SDXL = {**SDXL, "channel_mult": [1, 1, 1]}
SMALL_FLUX = {**FLUX, "vec_in_dim": 64, "context_in_dim": 64, "depth": 1, "depth_single_blocks": 1}


def sdxl() -> torch.nn.Module:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model: torch.nn.Module = UNetModel(**SMALL_SDXL, operations=comfy.ops.disable_weight_init)
    return model


def flux() -> torch.nn.Module:
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    config = flux_config(SMALL_FLUX)
    model: torch.nn.Module = Flux(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return model


def flux_config(config: dict[str, Any]) -> dict[str, Any]:
    """With what this host's Flux needs besides."""
    from comfy.ldm.flux.model import FluxParams

    known = {field.name for field in fields(FluxParams)}
    return {**config, **{name: value for name, value in NEW_IN_FLUX.items() if name in known}}


def control() -> torch.nn.Module:
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {name: value for name, value in UNET_CONFIG.items() if name not in ("out_channels", "legacy")}
    model: torch.nn.Module = ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    return model


MAKERS = {"sdxl": sdxl, "flux": flux, "control": control}
FOLDERS = {"sdxl": "diffusion_models", "flux": "diffusion_models", "control": "controlnet"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("host_dir", type=Path, metavar="HOST_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("kind", choices=MAKERS)
    options = parser.parse_args()
    enter_host(options.host_dir.resolve())
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        weights = half(randomise(MAKERS[options.kind]()), "")
        write(weights, options.out_dir.resolve() / FOLDERS[options.kind] / f"{options.kind}.safetensors")


if __name__ == "__main__":
    main()
