"""One or more kinds of workflow per node pack, for benchmarks/packs.py: only names of nodes and their inputs.

A kind makes a job out of a number; jobs with different numbers differ in what the pack is asked to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.host.workflows import Workflow, node, txt2img, with_loras

IMAGES = 4  # pictures in the input folder: pack0.png, …
SAMPLER = {"steps": 2, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal"}
CONDS = {"positive": ["positive", 0], "negative": ["negative", 0]}
MODELS = {"model": ["ckpt", 0], **CONDS}


@dataclass(frozen=True)
class Kind:
    """A kind of workflow: `pack` is the name of the pack's folder."""

    pack: str
    name: str
    make: Callable[[int], Workflow]


def plain(n: int) -> Workflow:
    """No pack's node."""
    return txt2img(1000 + n, steps=2, prefix="plain")


def sampled(n: int, **changed: dict[str, object]) -> Workflow:
    """Text to image, with more or other nodes; a `latent` of one picture of 64x64."""
    return {**txt2img(n, steps=2, prefix="pack"), **changed}


def with_inputs(workflow: Workflow, name: str, **inputs: object) -> Workflow:
    """The same with other inputs of one node."""
    known = workflow[name]
    return {**workflow, name: {**known, "inputs": {**known["inputs"], **inputs}}}


def picture(n: int, output: int = 0, **nodes: dict[str, object]) -> Workflow:
    """A picture from the input folder, `image`, goes through these nodes; what the last one gives is saved."""
    last = list(nodes)[-1]
    source = {"image": node("LoadImage", image=f"pack{n % IMAGES}.png")}
    return {**source, **nodes, "save": node("SaveImage", images=[last, output], filename_prefix="pack")}


def sampled_by(n: int, class_type: str, **inputs: object) -> Workflow:
    """Text to image by a pack's own sampler."""
    sampler = node(
        class_type, **{**MODELS, **SAMPLER, "seed": n, "latent_image": ["latent", 0], "denoise": 1.0, **inputs}
    )
    return sampled(n, sampler=sampler)


def encoded_by(n: int, class_type: str, **inputs: object) -> Workflow:
    """Text to image with a pack's text encoder."""
    text = f"a (lighthouse:1.{n % 9 + 1}) at [dusk:dawn:0.5]"
    return sampled(n, positive=node(class_type, **{"text": text, "clip": ["ckpt", 1], **inputs}))


def seeded_by(n: int, output: int = 0, **nodes: dict[str, object]) -> Workflow:
    """Text to image whose seed comes out of these nodes."""
    return with_inputs(sampled(n, **nodes), "sampler", seed=[list(nodes)[-1], output])


def evolved(n: int) -> Workflow:
    settings = node(
        "ADE_AnimateDiffSamplingSettings",
        batch_offset=n % 3,
        noise_type="FreeNoise",
        seed_gen="auto1111",
        seed_offset=n,
        adapt_denoise_steps=False,
        custom_cfg=["cfg", 0],
    )
    context = node("ADE_StandardUniformContextOptions", context_length=2, context_stride=1, context_overlap=1)
    model = {"model": ["ckpt", 0], "context_options": ["context", 0], "sample_settings": ["settings", 0]}
    workflow = sampled(
        n,
        cfg=node("ADE_CustomCFGSimple", cfg=3.0 + n % 5),
        settings=settings,
        context=context,
        evolved=node("ADE_UseEvolvedSampling", beta_schedule="use existing", **model),
        latent=node("EmptyLatentImage", width=64, height=64, batch_size=3),
    )
    return with_inputs(workflow, "sampler", model=["evolved", 0])


def controlled(n: int) -> Workflow:
    apply = {**CONDS, "control_net": ["net", 0], "image": ["image", 0], "weights_override": ["weights", 0]}
    strength = {"strength": 0.5 + n % 5 / 10, "start_percent": 0.0, "end_percent": 1.0}
    workflow = sampled(
        n,
        image=node("LoadImage", image=f"pack{n % IMAGES}.png"),
        net=node("ACN_ControlNetLoaderAdvanced", cnet="control.safetensors"),
        weights=node("ACN_ScaledSoftControlNetWeights", base_multiplier=0.6 + n % 4 / 10),
        apply=node("ACN_AdvancedControlNetApply_v2", **apply, **strength),
    )
    return with_inputs(workflow, "sampler", positive=["apply", 0], negative=["apply", 1])


def video(n: int) -> Workflow:
    save = {"frame_rate": 8.0, "loop_count": 0, "pingpong": False, "save_output": True}
    combine = node("VHS_VideoCombine", images=["decode", 0], filename_prefix="pack", format="image/gif", **save)
    return sampled(n, latent=node("EmptyLatentImage", width=64, height=64, batch_size=2), save=combine)


def efficient(n: int) -> Workflow:
    """A loader that caches, a LoRA, and a sampler of the pack's."""
    loader = node(
        "Efficient Loader",
        ckpt_name="a.safetensors",
        vae_name="Baked VAE",
        clip_skip=-1,
        lora_name="lora.safetensors",
        lora_model_strength=0.2 + n % 7 / 10,
        lora_clip_strength=0.2 + n % 7 / 10,
        positive="a lighthouse",
        negative="blurry",
        token_normalization="none",
        weight_interpretation="comfy",
        empty_latent_width=64,
        empty_latent_height=64,
        batch_size=1,
    )
    models = {"model": ["ckpt", 0], "positive": ["ckpt", 1], "negative": ["ckpt", 2], "latent_image": ["ckpt", 3]}
    ending = {"seed": n, "denoise": 1.0, "preview_method": "none", "vae_decode": "true", "optional_vae": ["ckpt", 4]}
    sampler = node("KSampler (Efficient)", **SAMPLER, **models, **ending)
    save = node("SaveImage", images=["sampler", 5], filename_prefix="pack")
    return {"ckpt": loader, "sampler": sampler, "save": save}


def efficient_noise(n: int) -> Workflow:
    script = node("Noise Control Script", rng_source="cpu", cfg_denoiser=False, add_seed_noise=True, seed=n, weight=0.1)
    return with_inputs({**efficient(n), "script": script}, "sampler", script=["script", 0])


def upscaled(n: int) -> Workflow:
    tiles = {"tile_width": 64, "tile_height": 64, "mask_blur": 4, "tile_padding": 8, "mode_type": "Linear"}
    seams = {"seam_fix_mode": "None", "seam_fix_denoise": 1.0, "seam_fix_width": 64, "seam_fix_mask_blur": 8}
    rest = {"seam_fix_padding": 16, "force_uniform_tiles": True, "tiled_decode": False, "batch_size": 1}
    inputs = {**MODELS, **SAMPLER, "upscaled_image": ["image", 0], "vae": ["ckpt", 2], "seed": n, "denoise": 0.4}
    kept = {name: made for name, made in sampled(n).items() if name in ("ckpt", "positive", "negative")}
    upscale = node("UltimateSDUpscaleNoUpscale", **inputs, **tiles, **seams, **rest)
    return {**kept, **picture(n, upscale=upscale)}


def detailed(n: int) -> Workflow:
    sizes = {"guide_size": 64.0, "guide_size_for": True, "max_size": 128.0, "feather": 4, "cycle": 1, "wildcard": ""}
    inputs = {**MODELS, **SAMPLER, "clip": ["ckpt", 1], "vae": ["ckpt", 2], "seed": n, "denoise": 0.5}
    detail = node(
        "DetailerForEach",
        image=["image", 0],
        segs=["segs", 0],
        noise_mask=True,
        force_inpaint=True,
        **sizes,
        **inputs,
    )
    segs = {"combined": True, "crop_factor": 1.5, "bbox_fill": True, "drop_size": 4, "contour_fill": False}
    kept = {name: made for name, made in sampled(n).items() if name in ("ckpt", "positive", "negative")}
    mask = node("SolidMask", value=1.0, width=64, height=64)
    return {**kept, **picture(n, mask=mask, segs=node("MaskToSEGS", mask=["mask", 0], **segs), detail=detail)}


def piped(n: int) -> Workflow:
    pipe = node("ToBasicPipe", clip=["ckpt", 1], vae=["ckpt", 2], **MODELS)
    workflow = sampled(n, pipe=pipe, out=node("FromBasicPipe_v2", basic_pipe=["pipe", 0]))
    return with_inputs(workflow, "sampler", model=["out", 1], positive=["out", 4], negative=["out", 5])


def shared_loader(n: int) -> Workflow:
    loader = node("CheckpointLoaderSimpleShared //Inspire", ckpt_name="a.safetensors", key_opt="", mode="Auto")
    return with_loras({**sampled(n), "ckpt": loader}, 0.2 + n % 7 / 10)


def inspired(n: int) -> Workflow:
    noise = {"noise_mode": "CPU", "batch_seed_mode": "incremental", "variation_seed": n + 1}
    return sampled_by(n, "KSampler //Inspire", **noise, variation_strength=0.2)


def stacked(n: int) -> Workflow:
    loras = {f"lora_0{i}": "lora.safetensors" if i == 1 else "None" for i in range(1, 5)}
    strengths = {f"strength_0{i}": 0.2 + n % 7 / 10 for i in range(1, 5)}
    stack = node("Lora Loader Stack (rgthree)", model=["ckpt", 0], clip=["ckpt", 1], **loras, **strengths)
    workflow = with_inputs(sampled(n, stack=stack), "sampler", model=["stack", 0])
    return with_inputs(workflow, "positive", clip=["stack", 1])


def loaded_kj(n: int) -> Workflow:
    options = {"patch_cublaslinear": False, "sage_attention": "disabled", "enable_fp16_accumulation": False}
    dtypes = {"weight_dtype": "default", "compute_dtype": "default"}
    return sampled(n, ckpt=node("CheckpointLoaderKJ", ckpt_name="a.safetensors", **dtypes, **options))


def matched_kj(n: int) -> Workflow:
    other = node("LoadImage", image=f"pack{(n + 1) % IMAGES}.png")
    match = node(
        "ColorMatch", image_ref=["other", 0], image_target=["image", 0], method="mkl", strength=0.5 + n % 5 / 10
    )
    return picture(n, other=other, match=match)


def varied(n: int) -> Workflow:
    sampler = {**MODELS, **SAMPLER, "latent_image": ["latent", 0], "main_seed": n, "denoise": 1.0}
    noise = {"variation_strength": 0.3, "variation_seed": n + 5}
    return sampled(n, sampler=node("KSamplerVariationsWithNoise+", **sampler, **noise))


def combed(n: int) -> Workflow:
    applied = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "lora_stack": ["stack", 0]}
    rows = [("On", "lora.safetensors"), ("Off", "None"), ("Off", "None")]
    stack: dict[str, object] = {}
    for number, (switch, name) in enumerate(rows, 1):
        stack |= {f"switch_{number}": switch, f"lora_name_{number}": name}
        stack |= {f"model_weight_{number}": 0.2 + n % 7 / 10, f"clip_weight_{number}": 0.5}
    workflow = sampled(n, stack=node("CR LoRA Stack", **stack), apply=node("CR Apply LoRA Stack", **applied))
    return with_inputs(workflow, "sampler", model=["apply", 0])


def easy(n: int) -> Workflow:
    texts = {"positive": "a lighthouse", "negative": "blurry"}
    loader = node(
        "easy comfyLoader",
        ckpt_name="a.safetensors",
        vae_name="Baked VAE",
        clip_skip=-2,
        lora_name="lora.safetensors",
        lora_model_strength=0.2 + n % 7 / 10,
        lora_clip_strength=0.5,
        resolution="width x height (custom)",
        empty_latent_width=64,
        empty_latent_height=64,
        batch_size=1,
        **texts,
    )
    ending = {"denoise": 1.0, "image_output": "Hide", "link_id": 0, "save_prefix": "pack", "seed": n}
    sampler = node("easy fullkSampler", pipe=["ckpt", 0], **SAMPLER, **ending)
    return {
        "ckpt": loader,
        "sampler": sampler,
        "save": node("SaveImage", images=["sampler", 1], filename_prefix="pack"),
    }


def settings_smz(n: int) -> Workflow:
    limit = {"Prompt word wrap length limit": 20, "enable_emphasis": True, "Use CFGDenoiser": False}
    numbers = {"ENSD": n, "eta": 1.0, "s_churn": 0.0, "s_tmin": 0.0, "s_tmax": 0.0, "s_noise": 1.0, "NGMS": 0.0}
    more = {"skip_early_cond": 0.0, "sgm_noise_multiplier": True, "upcast_sampling": True, "NGMS all steps": False}
    rest = {"pad_cond_uncond": False, "batch_cond_uncond": True, "Use previous prompt editing timelines": True}
    settings = node("smZ Settings", **{"*": ["ckpt", 0], "RNG": "cpu", **limit, **numbers, **more, **rest})
    return with_inputs(encoded_smz(n) | {"settings": settings}, "sampler", model=["settings", 0])


def encoded_smz(n: int) -> Workflow:
    sizes = {
        "ascore": 6.0,
        "width": 64,
        "height": 64,
        "crop_w": 0,
        "crop_h": 0,
        "target_width": 64,
        "target_height": 64,
    }
    flags = {"mean_normalization": True, "multi_conditioning": True, "use_old_emphasis_implementation": False}
    return encoded_by(n, "smZ CLIPTextEncode", parser="A1111", with_SDXL=False, text_g="", text_l="", **sizes, **flags)


def filled(n: int) -> Workflow:
    mask = node("SolidMask", value=1.0, width=32, height=32)
    whole = node("SolidMask", value=0.0, width=64, height=64)
    both = {"destination": ["whole", 0], "source": ["part", 0], "x": 8 + n % 16, "y": 8, "operation": "add"}
    grow = node("INPAINT_ExpandMask", mask=["mask", 0], grow=4, blur=3, blur_type="gaussian")
    fill = node("INPAINT_MaskedFill", image=["image", 0], mask=["grow", 0], fill="telea", falloff=0)
    return picture(n, part=mask, whole=whole, mask=node("MaskComposite", **both), grow=grow, fill=fill)


def tiled(n: int) -> Workflow:
    layout = node("ETN_TileLayout", image=["image", 0], min_tile_size=64, padding=8, blending=8, multiple=8)
    return picture(
        n, layout=layout, tile=node("ETN_ExtractImageTile", image=["image", 0], layout=["layout", 0], index=0)
    )


def adjusted(n: int) -> Workflow:
    values = {"brightness": n % 5 / 10, "contrast": 1.2, "saturation": 0.8, "sharpness": 1.5, "blur": 1}
    rest = {"gaussian_blur": 0.5, "edge_enhance": 0.2, "detail_enhance": "true"}
    return picture(n, out=node("Image Filter Adjustments", image=["image", 0], **values, **rest))


def of_was(n: int) -> Workflow:
    seed = node("Seed", seed=n)
    return {**sampled_by(n, "KSampler (WAS)", seed=["number", 0]), "number": seed}


def resized(n: int) -> Workflow:
    sizes = {"smaller_side": 0, "larger_side": 0, "scale_factor": 1.5, "pad_feathering": 4}
    how = {"action": "resize only", "resize_mode": "any", "side_ratio": "4:3", "crop_pad_position": 0.5}
    return picture(n, out=node("ImageResize", pixels=["image", 0], **sizes, **how))


def bordered(n: int) -> Workflow:
    sides = {f"{side}_thickness": n % 7 for side in ("top", "bottom", "left", "right")}
    colours = {"border_color": "red", "outline_thickness": 1, "outline_color": "white"}
    return on(n, "CR Image Border", **sides, **colours)


def switched(n: int) -> Workflow:
    other = node("LoadImage", image=f"pack{(n + 1) % IMAGES}.png")
    switch = node("Switch image [Crystools]", on_true=["image", 0], on_false=["other", 0], boolean=n % 2 == 0)
    return picture(n, other=other, out=switch)


def chosen(n: int) -> Workflow:
    first, second = node("Int-🔬", value=n), node("Int-🔬", value=n + 7)
    compare = node("Compare-🔬", a=["one", 0], b=["two", 0], comparison="a < b")
    choice = node("If ANY return A else B-🔬", ANY=["compare", 0], IF_TRUE=["one", 0], IF_FALSE=["two", 0])
    return seeded_by(n, one=first, two=second, compare=compare, choice=choice)


def on(n: int, class_type: str, **inputs: object) -> Workflow:
    """A picture goes through one node."""
    return picture(n, out=node(class_type, **{"image": ["image", 0], **inputs}))


def _corrected(n: int) -> Workflow:
    values = {"gamma": 1.1, "contrast": 1.2, "exposure": 0.1, "offset": 0.0, "hue": n % 10 / 10, "saturation": 0.9}
    return on(n, "Color Correct (mtb)", clamp=True, value=1.0, **values)


KINDS = (
    Kind("ComfyUI-AnimateDiff-Evolved", "evolved sampling", evolved),
    Kind("ComfyUI-Advanced-ControlNet", "ControlNet with weights", controlled),
    Kind("ComfyUI-VideoHelperSuite", "gif", video),
    Kind("ComfyUI_UltimateSDUpscale", "tiles", upscaled),
    Kind("ComfyUI-Impact-Pack", "detailer", detailed),
    Kind("ComfyUI-Impact-Pack", "pipe", piped),
    Kind("ComfyUI-Inspire-Pack", "KSampler", inspired),
    Kind("ComfyUI-Inspire-Pack", "shared loader, LoRA", shared_loader),
    Kind("rgthree-comfy", "LoRA stack", stacked),
    Kind("ComfyUI-KJNodes", "loader", loaded_kj),
    Kind("ComfyUI-KJNodes", "colour match", matched_kj),
    Kind("ComfyUI_essentials", "variations", varied),
    Kind("ComfyUI_essentials", "sharpening", lambda n: on(n, "ImageCASharpening+", amount=n % 10 / 10)),
    Kind(
        "ComfyUI_IPAdapter_plus",
        "noise",
        lambda n: on(n, "PrepImageForClipVision", interpolation="LANCZOS", crop_position="top", sharpening=n % 10 / 10),
    ),
    Kind(
        "ComfyUI_ADV_CLIP_emb",
        "weights as A1111",
        lambda n: encoded_by(
            n, "BNK_CLIPTextEncodeAdvanced", token_normalization="mean", weight_interpretation="A1111"
        ),
    ),
    Kind(
        "ComfyUI-Custom-Scripts",
        "loader",
        lambda n: sampled(n, ckpt=node("CheckpointLoader|pysssss", ckpt_name="a.safetensors")),
    ),
    Kind("was-node-suite-comfyui", "KSampler", of_was),
    Kind("was-node-suite-comfyui", "adjustments", adjusted),
    Kind("ComfyUI_smZNodes", "text as A1111", encoded_smz),
    Kind(
        "ComfyUI-MultiGPU",
        "loader",
        lambda n: sampled(n, ckpt=node("CheckpointLoaderSimpleMultiGPU", ckpt_name="a.safetensors", device="cpu")),
    ),
    Kind(
        "cg-image-filter",
        "numbers",
        lambda n: seeded_by(
            n, text=node("Simple String", string=str(n)), number=node("String to Int", string=["text", 0], default=0)
        ),
    ),
    Kind(
        "cg-use-everywhere",
        "text",
        lambda n: {
            **encoded_by(n, "CLIPTextEncode", text=["text", 0]),
            "text": node("Simple String", string=f"lighthouse {n}"),
        },
    ),
    Kind("ComfyUI_Comfyroll_CustomNodes", "LoRA stack", combed),
    Kind("ComfyUI_Comfyroll_CustomNodes", "border", bordered),
    Kind("ComfyUI-Easy-Use", "loader and sampler", easy),
    Kind("ComfyUI-Crystools", "switch", switched),
    Kind("comfy_mtb", "blur", lambda n: on(n, "Blur (mtb)", sigmaX=1.0 + n % 5, sigmaY=2.0)),
    Kind("comfy_mtb", "colours", _corrected),
    Kind(
        "Derfuu_ComfyUI_ModdedNodes",
        "scale",
        lambda n: on(
            n, "DF_Image_scale_by_ratio", upscale_by=1.0 + n % 5 / 10, upscale_method="bicubic", crop="disabled"
        ),
    ),
    Kind(
        "comfyui-various",
        "resize",
        lambda n: on(n, "JWImageResize", height=48 + n % 9, width=80, interpolation_mode="bicubic"),
    ),
    Kind("comfyui-inpaint-nodes", "fill", filled),
    Kind("comfyui-tooling-nodes", "tiles", tiled),
    Kind("comfyui-art-venture", "Fooocus KSampler", lambda n: sampled_by(n, "Fooocus_KSampler", sharpness=2.0 + n % 4)),
    Kind("ComfyLiterals", "number", lambda n: seeded_by(n, number=node("Int", Number=str(n)))),
    Kind("ComfyMath", "sum", lambda n: seeded_by(n, number=node("CM_IntBinaryOperation", op="Add", a=n, b=3))),
    Kind("mikey_nodes", "border", lambda n: on(n, "ImageBorder", border_width=2 + n % 9, border_color="red")),
    Kind("image-resize-comfyui", "resize", resized),
    Kind("ComfyUI-post-processing-nodes", "glow", lambda n: on(n, "Glow", intensity=0.5 + n % 5 / 10, blur_radius=5)),
    Kind("comfy-image-saver", "number", lambda n: seeded_by(n, number=node("Int Literal", int=n))),
    Kind("ComfyUI-Logic", "choice", chosen),
    Kind(
        "comfyui_controlnet_aux",
        "canny",
        lambda n: on(n, "CannyEdgePreprocessor", low_threshold=60 + n % 40, high_threshold=200, resolution=64),
    ),
    Kind(
        "comfyui_controlnet_aux",
        "scribble",
        lambda n: on(n, "Scribble_XDoG_Preprocessor", threshold=20 + n % 30, resolution=64),
    ),
    Kind("efficiency-nodes-comfyui", "loader and sampler", efficient),
    Kind("efficiency-nodes-comfyui", "noise control", efficient_noise),
    Kind("ComfyUI_smZNodes", "settings", settings_smz),
)
