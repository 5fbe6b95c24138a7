"""Workflows in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

Workflow = dict[str, Any]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def txt2img(
    seed: int,
    *,
    ckpt: str = "a.safetensors",
    sampler: str = "euler",
    scheduler: str = "normal",
    steps: int = 4,
    width: int = 64,
    height: int = 64,
    batch: int = 1,
    text: str = "a lighthouse at dusk",
    prefix: str = "txt2img",
    lora: str | None = None,
) -> Workflow:
    """A text-to-image job: nodes ckpt, positive, negative, latent, sampler, decode, save."""
    workflow = sampling(
        seed, ckpt=ckpt, sampler=sampler, scheduler=scheduler, steps=steps, text=text, prefix=prefix, lora=lora
    )
    workflow["latent"] = node("EmptyLatentImage", width=width, height=height, batch_size=batch)
    return workflow


def img2img(
    seed: int,
    *,
    ckpt: str = "a.safetensors",
    sampler: str = "euler",
    scheduler: str = "normal",
    steps: int = 4,
    width: int = 64,
    height: int = 64,
    batch: int = 1,
    text: str = "a lighthouse at dusk",
    prefix: str = "img2img",
    lora: str | None = None,
    colour: int = 0x4080C0,
    denoise: float = 0.6,
) -> Workflow:
    """Like txt2img, from a plain coloured image that the VAE encodes."""
    workflow = sampling(
        seed, ckpt=ckpt, sampler=sampler, scheduler=scheduler, steps=steps, text=text, prefix=prefix, lora=lora
    )
    workflow["sampler"]["inputs"]["denoise"] = denoise
    workflow["image"] = node("EmptyImage", width=width, height=height, batch_size=batch, color=colour)
    workflow["latent"] = node("VAEEncode", pixels=["image", 0], vae=["ckpt", 2])
    return workflow


def sampling(
    seed: int,
    *,
    ckpt: str,
    sampler: str,
    scheduler: str,
    steps: int,
    text: str,
    prefix: str,
    lora: str | None,
) -> Workflow:
    """What both share: everything except the node `latent`."""
    models = "ckpt" if lora is None else "lora"
    workflow = {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name=ckpt),
        "positive": node("CLIPTextEncode", text=text, clip=[models, 1]),
        "negative": node("CLIPTextEncode", text="blurry", clip=[models, 1]),
        "sampler": node(
            "KSampler",
            model=[models, 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=7.0,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["ckpt", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }
    if lora is not None:
        workflow["lora"] = node(
            "LoraLoader",
            model=["ckpt", 0],
            clip=["ckpt", 1],
            lora_name=lora,
            strength_model=1.0,
            strength_clip=1.0,
        )
    return workflow


def with_loras(workflow: Workflow, *strengths: float, lora: str = "lora.safetensors") -> Workflow:
    """A job of this module without LoRA, with one stacked per strength."""
    model, clip = ["ckpt", 0], ["ckpt", 1]
    for number, strength in enumerate(strengths):
        name = f"lora{number}"
        options = {"lora_name": lora, "strength_model": strength, "strength_clip": strength}
        workflow[name] = node("LoraLoader", model=model, clip=clip, **options)
        model, clip = [name, 0], [name, 1]
    workflow["sampler"]["inputs"]["model"] = model
    workflow["positive"]["inputs"]["clip"] = workflow["negative"]["inputs"]["clip"] = clip
    return workflow


def with_hook_lora(workflow: Workflow, strength: float, lora: str = "lora.safetensors") -> Workflow:
    """The same, with a LoRA that the host writes into the weights for the positive conditioning only."""
    workflow["hook"] = node("CreateHookLora", lora_name=lora, strength_model=strength, strength_clip=strength)
    workflow["hooked"] = node(
        "ConditioningSetProperties", cond_NEW=["positive", 0], strength=1.0, set_cond_area="default", hooks=["hook", 0]
    )
    workflow["sampler"]["inputs"]["positive"] = ["hooked", 0]
    return workflow
