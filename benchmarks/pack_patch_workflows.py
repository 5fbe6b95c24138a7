"""More kinds of workflow for benchmarks/packs.py: of packs that patch the model, expand, or make prompts."""

from __future__ import annotations

from pack_workflows import Kind, encoded_by, picture, sampled, seeded_by, with_inputs

from tests.host.workflows import Workflow, node

LARGE = node("EmptyLatentImage", width=128, height=128, batch_size=1)
TILED = ("MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion")
CROP = {
    **{"downscale_algorithm": "bilinear", "upscale_algorithm": "bicubic", "preresize": False, "mask_invert": False},
    **{"preresize_mode": "ensure minimum resolution", "preresize_min_width": 64, "preresize_min_height": 64},
    **{"preresize_max_width": 512, "preresize_max_height": 512, "mask_fill_holes": True, "mask_hipass_filter": 0.1},
    **{"extend_for_outpainting": False, "extend_up_factor": 1.0, "extend_down_factor": 1.0},
    **{"extend_left_factor": 1.0, "extend_right_factor": 1.0, "context_from_mask_extend_factor": 1.2},
    **{"output_resize_to_target_size": True, "output_target_width": 64, "output_target_height": 64},
    **{"output_padding": "0", "device_mode": "cpu (compatible)"},
}


def patched(n: int, class_type: str, latent: dict[str, object] | None = None, **inputs: object) -> Workflow:
    """Text to image by a model that a pack's node has patched; four steps, as caches need several."""
    patch = node(class_type, model=["ckpt", 0], **inputs)
    workflow = with_inputs(sampled(n, patch=patch), "sampler", model=["patch", 0], steps=4)
    return workflow if latent is None else {**workflow, "latent": latent}


def tiled(n: int) -> Workflow:
    sizes = {"tile_width": 64, "tile_height": 64 + 16 * (n % 2), "tile_overlap": 32, "tile_batch_size": 2}
    return patched(n, "TiledDiffusion", LARGE, method=TILED[n % 3], **sizes)


def tiled_decoding(n: int) -> Workflow:
    large = node("EmptyLatentImage", width=448, height=64, batch_size=1)
    decode = node(
        "VAEDecodeTiled_TiledDiffusion", samples=["sampler", 0], vae=["ckpt", 2], tile_size=384, fast=bool(n % 2)
    )
    return sampled(n, latent=large, decode=decode)


def block_cached(n: int) -> Workflow:
    window = {"start": 0.0, "end": 1.0, "max_consecutive_cache_hits": 1 + n % 2}
    inputs = {"object_to_patch": "diffusion_model", "residual_diff_threshold": 0.1 + n % 5 / 5, **window}
    return patched(n, "ApplyFBCacheOnModel", **inputs)


def negative_weights(n: int) -> Workflow:
    texts = {"positive": f"a harbour, (fog:-1.{n % 9})", "negative": "(blurry:1.2)"}
    encoders = {name: node("CLIPTextEncode", text=text, clip=["neg", 1]) for name, text in texts.items()}
    workflow = sampled(n, neg=node("CLIPNegPip", model=["ckpt", 0], clip=["ckpt", 1]), **encoders)
    return with_inputs(workflow, "sampler", model=["neg", 0])


def scheduled(n: int) -> Workflow:
    """The nodes expand into graphs."""
    text = f"a [harbour:castle:0.{n % 8 + 1}] in [fog|rain] <lora:lora:0.{n % 9 + 1}>"
    workflow = encoded_by(n, "PCLazyTextEncode", text=text)
    loader = node("PCLazyLoraLoader", model=["ckpt", 0], clip=["ckpt", 1], text=text, apply_hooks=True)
    workflow = with_inputs({**workflow, "loras": loader}, "positive", clip=["loras", 1])
    return with_inputs(workflow, "sampler", model=["loras", 0])


def cropped(n: int) -> Workflow:
    mask = node("SolidMask", value=1.0, width=16 + 8 * (n % 3), height=16)
    ground = node("SolidMask", value=0.0, width=64, height=64)
    placed = node("MaskComposite", destination=["ground", 0], source=["mask", 0], x=8, y=8 + n % 9, operation="add")
    crop = node(
        "InpaintCropImproved",
        image=["image", 0],
        mask=["placed", 0],
        mask_expand_pixels=n % 4,
        mask_blend_pixels=4,
        **CROP,
    )
    blur = node("ImageBlur", image=["crop", 1], blur_radius=2, sigma=1.0)
    stitch = node("InpaintStitchImproved", stitcher=["crop", 0], inpainted_image=["blur", 0])
    return picture(n, ground=ground, mask=mask, placed=placed, crop=crop, blur=blur, stitch=stitch)


def perturbed(n: int) -> Workflow:
    block = {"unet_block": "middle", "unet_block_id": 0, "sigma_start": -1.0, "sigma_end": -1.0}
    guided = {"scale": 2.0 + n % 4, "adaptive_scale": 0.0, "rescale": n % 3 / 4, "rescale_mode": "full"}
    return patched(n, "PerturbedAttention", **block, **guided)


def hyper_tiled(n: int) -> Workflow:
    sizes = {"tile_size": 32 + 32 * (n % 2), "swap_size": 2, "max_depth": n % 2, "scale_depth": False}
    return patched(n, "BlehHyperTile", LARGE, seed=n, interval=1, start_step=1000, end_step=0, **sizes)


def random_prompt(n: int) -> Workflow:
    text = "a {red|blue|green|black} {harbour|castle|lighthouse|forest} in {fog|rain|snow}, {2$$soft|warm|cold} light"
    return encoded_by(n, "CLIPTextEncode", text=["prompt", 0]) | {
        "prompt": node("DPRandomGenerator", text=text, seed=n + 1, autorefresh="No")
    }


def mixlab_number(n: int) -> Workflow:
    number = node("IntNumber", number=n + 5, min_value=0, max_value=10_000, step=1)
    return seeded_by(n, number=number)


MORE = (
    Kind("ComfyUI-TiledDiffusion", "tiled sampling", tiled),
    Kind("ComfyUI-TiledDiffusion", "tiled decoding", tiled_decoding),
    Kind("Comfy-WaveSpeed", "first-block cache", block_cached),
    Kind("ComfyUI-ppm", "negative weights", negative_weights),
    Kind("comfyui-prompt-control", "schedule, LoRA", scheduled),
    Kind("ComfyUI-Inpaint-CropAndStitch", "crop and stitch", cropped),
    Kind("sd-perturbed-attention", "guidance", perturbed),
    Kind("ComfyUI-bleh", "hypertile", hyper_tiled),
    Kind("comfyui-dynamicprompts", "random prompt", random_prompt),
    Kind("comfyui-mixlab-nodes", "number", mixlab_number),
    Kind(
        "ComfyUI_LayerStyle",
        "blur",
        lambda n: picture(n, blur=node("LayerFilter: GaussianBlurV2", image=["image", 0], blur=1.0 + n % 7)),
    ),
)
