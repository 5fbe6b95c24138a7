"""Writes a small random SD1.5 checkpoint and a LoRA for it, which the host's own loaders accept.

usage: python tests/host/checkpoint.py HOST_DIR OUT_DIR [--seed N] [--name NAME] [--wide]

Makes OUT_DIR/checkpoints/NAME.safetensors and OUT_DIR/loras/lora.safetensors. The text encoder has
its full size (the host builds no other), the UNet two levels, the VAE is a TAESD. --wide: the UNet
has SD1.5's four levels, 550 million parameters; no LoRA is made.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

StateDict = dict[str, "torch.Tensor"]

UNET_CONFIG: dict[str, Any] = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "adm_in_channels": None,
    "legacy": False,
}
WIDE = {
    "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
}
LATENT_SCALE = 0.18215  # SD1.5's: a TAESD works on latents of variance one
WEIGHT_GAIN = 0.6  # of 1/sqrt(fan in): larger lets the random UNet's output explode over 20 steps
IMAGE_CONTRAST = 5.0
LORA_RANK = 4
LORA_STRENGTH = 0.05
LORA_UNET_LAYERS = ("attn1.to_q", "attn2.to_k", "ff.net.2")
LORA_CLIP_LAYERS = {"q_proj": "self_attn_q_proj", "v_proj": "self_attn_v_proj"}


def enter_host(host_dir: Path) -> None:
    """Make the host importable, on its CPU: its modules read `sys.argv` when imported."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, str(host_dir))
    import comfy.options

    comfy.options.enable_args_parsing()


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter values that keep the activations' scale."""
    for name, parameter in module.named_parameters():
        data = parameter.data
        if data.ndim > 1:
            data.normal_(0, WEIGHT_GAIN / math.sqrt(data[0].numel()))
        elif data.ndim == 1:
            data.fill_(float(name.endswith("weight")))
    return module


def half(module: torch.nn.Module, prefix: str) -> StateDict:
    return {prefix + key: tensor.half() for key, tensor in module.state_dict().items()}


def unet_weights(config: Any) -> StateDict:
    import torch

    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "model.diffusion_model.", device=torch.device("cpu"))
    return half(randomise(model.diffusion_model), "model.diffusion_model.")


def text_encoder_weights(config: Any) -> StateDict:
    import torch

    target = config.clip_target(state_dict={})
    encoder = target.clip(device="cpu", dtype=torch.float32, model_options={})
    weights: StateDict = config.process_clip_state_dict_for_saving(half(randomise(encoder), ""))
    return weights


def vae_weights() -> StateDict:
    from comfy.taesd.taesd import TAESD

    vae: Any = randomise(TAESD())
    vae.vae_scale.data.fill_(LATENT_SCALE)
    vae.taesd_decoder[-1].weight.data.mul_(IMAGE_CONTRAST)
    vae.taesd_decoder[-1].bias.data.fill_(0.5)  # mid-grey: pixels are clamped to 0..1
    return half(vae, "first_stage_model.")


def lora_weights(checkpoint: StateDict) -> StateDict:
    """Low-rank pairs for a few attention and feed-forward layers of the UNet and text encoder."""
    lora: StateDict = {}
    for key, weight in checkpoint.items():
        name = lora_name(key)
        if name is not None:
            lora.update(lora_pair(name, weight))
    return lora


def lora_name(key: str) -> str | None:
    if not key.endswith(".weight"):
        return None
    layer = key.removesuffix(".weight")
    if layer.startswith("model.diffusion_model.") and layer.endswith(LORA_UNET_LAYERS):
        return "lora_unet_" + layer.removeprefix("model.diffusion_model.").replace(".", "_")
    if layer.startswith("cond_stage_model.") and layer.endswith(tuple(LORA_CLIP_LAYERS)):
        number = layer.split(".layers.")[1].split(".")[0]
        return f"lora_te_text_model_encoder_layers_{number}_{LORA_CLIP_LAYERS[layer.split('.')[-1]]}"
    return None


def lora_pair(name: str, weight: torch.Tensor) -> StateDict:
    import torch

    rows, columns = weight.shape
    return {
        f"{name}.lora_down.weight": torch.randn(LORA_RANK, columns).half(),
        f"{name}.lora_up.weight": (torch.randn(rows, LORA_RANK) * LORA_STRENGTH).half(),
        f"{name}.alpha": torch.tensor(float(LORA_RANK)),
    }


def write(weights: StateDict, path: Path) -> None:
    """Save under a temporary name first: an interrupted run must not leave a truncated file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, partial)
    os.replace(partial, path)


def make_models(host_dir: Path, out_dir: Path, *, seed: int, name: str, is_wide: bool) -> None:
    enter_host(host_dir)
    import comfy.supported_models
    import torch

    torch.manual_seed(seed)
    config = comfy.supported_models.SD15(UNET_CONFIG | (WIDE if is_wide else {}))
    with torch.no_grad():
        weights = {**unet_weights(config), **text_encoder_weights(config), **vae_weights()}
        write(weights, out_dir / "checkpoints" / f"{name}.safetensors")
        lora = out_dir / "loras" / "lora.safetensors"
        if not is_wide and not lora.exists():
            write(lora_weights(weights), lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("host_dir", type=Path, metavar="HOST_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="a", help="file name without ending (default: a)")
    parser.add_argument("--wide", action="store_true")
    options = parser.parse_args()
    out_dir = options.out_dir.resolve()
    make_models(options.host_dir.resolve(), out_dir, seed=options.seed, name=options.name, is_wide=options.wide)
    sys.stdout.write(f"{out_dir / 'checkpoints' / options.name}.safetensors\n")


if __name__ == "__main__":
    main()
