"""Jobs that step models in every way we know of, and what graph stepping is to make of each.

Their results are latents: not rounded to pixels, they show every difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.host import workflows
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node

LORA = "lora.safetensors"
FIRST = "first of its kind"
Link = list[Any]


@dataclass(frozen=True)
class Case:
    """Jobs in the order in which a slot runs them.

    `eager` are the reasons for eager steps, apart from the first of a kind; `is_replayed` says that there are replays.
    """

    name: str
    jobs: tuple[Workflow, ...]
    eager: tuple[str, ...] = ()
    is_replayed: bool = True

    def __str__(self) -> str:
        return self.name


def sd15(seed: int, *, cfg: float = 7.0, kind: str = "txt2img", **options: Any) -> Workflow:
    """Nodes ckpt, positive, negative, latent, sampler, and perhaps lora."""
    workflow: Workflow = getattr(workflows, kind)(seed, **options)
    workflow["sampler"]["inputs"]["cfg"] = cfg
    return saved(workflow)


def saved(workflow: Workflow) -> Workflow:
    """With the latent as its only result."""
    workflow.pop("decode", None)
    workflow["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="latent")
    return workflow


def other_model(workflow: Workflow, class_type: str, **inputs: Any) -> Workflow:
    """Sample with the model that a node makes of the checkpoint's."""
    workflow["model"] = node(class_type, model=["ckpt", 0], **inputs)
    workflow["sampler"]["inputs"]["model"] = ["model", 0]
    return workflow


def controlled(seed: int, *, end: float = 1.0, **options: Any) -> Workflow:
    workflow = sd15(seed, **options)
    workflow["control"] = node("ControlNetLoader", control_net_name="control.safetensors")
    workflow["hint"] = node("EmptyImage", width=64, height=64, batch_size=1, color=seed * 1000)
    workflow["apply"] = node(
        "ControlNetApplyAdvanced",
        positive=["positive", 0],
        negative=["negative", 0],
        control_net=["control", 0],
        image=["hint", 0],
        strength=0.8,
        start_percent=0.0,
        end_percent=end,
    )
    workflow["sampler"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    return workflow


def with_second_text(workflow: Workflow, second: Link) -> Workflow:
    workflow["other"] = node("CLIPTextEncode", text="a red door", clip=["ckpt", 1])
    workflow["both"] = node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=second)
    workflow["sampler"]["inputs"]["positive"] = ["both", 0]
    return workflow


def area(seed: int) -> Workflow:
    workflow = with_second_text(sd15(seed, width=128), ["area", 0])
    place = {"width": 64, "height": 64, "x": 64, "y": 0, "strength": 1.0}
    workflow["area"] = node("ConditioningSetArea", conditioning=["other", 0], **place)
    return workflow


def mask(seed: int) -> Workflow:
    workflow = with_second_text(sd15(seed), ["masked", 0])
    workflow["mask"] = node("SolidMask", value=0.6, width=64, height=64)
    workflow["masked"] = node(
        "ConditioningSetMask", conditioning=["other", 0], mask=["mask", 0], strength=1.0, set_cond_area="default"
    )
    return workflow


def inpainting(seed: int) -> Workflow:
    workflow = sd15(seed, kind="img2img")
    workflow["mask"] = node("SolidMask", value=0.7, width=64, height=64)
    workflow["inpaint"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
    workflow["sampler"]["inputs"]["latent_image"] = ["inpaint", 0]
    return workflow


def hires_fix(seed: int) -> Workflow:
    workflow = sd15(seed)
    size = {"width": 128, "height": 96, "crop": "disabled"}
    workflow["larger"] = node("LatentUpscale", samples=["sampler", 0], upscale_method="bilinear", **size)
    again = {**workflow["sampler"]["inputs"], "latent_image": ["larger", 0], "denoise": 0.6}
    workflow["again"] = node("KSampler", **again)
    workflow["save"]["inputs"]["samples"] = ["again", 0]
    return workflow


def hooked(seed: int) -> Workflow:
    """A LoRA on the second text only, whose weights come and go within each step."""
    workflow = with_second_text(sd15(seed), ["hooked", 0])
    workflow["hook"] = node("CreateHookLora", lora_name=LORA, strength_model=1.0, strength_clip=0.0)
    workflow["hooked"] = node(
        "ConditioningSetProperties", cond_NEW=["other", 0], strength=1.0, set_cond_area="default", hooks=["hook", 0]
    )
    return workflow


def sdxl(seed: int, *, batch: int = 1, cfg: float = 7.0) -> Workflow:
    sizes = {"tokens": 77, "width": 2048, "pooled": 1280}
    return saved(
        {
            "unet": node("UNETLoader", unet_name="sdxl.safetensors", weight_dtype="default"),
            "positive": node("CPTConditioning", seed=seed, **sizes),
            "negative": node("CPTConditioning", seed=0, **sizes),
            "latent": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
            "sampler": node(
                "KSampler",
                model=["unet", 0],
                positive=["positive", 0],
                negative=["negative", 0],
                latent_image=["latent", 0],
                seed=seed,
                steps=4,
                cfg=cfg,
                sampler_name="euler_ancestral",
                scheduler="normal",
                denoise=1.0,
            ),
        }
    )


def flux(seed: int, *, batch: int = 1) -> Workflow:
    return saved(
        {
            "unet": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
            "text": node("CPTConditioning", seed=seed, tokens=16, width=64, pooled=64),
            "positive": node("FluxGuidance", conditioning=["text", 0], guidance=2.0 + seed % 3),
            "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=batch),
            "shift": node("ModelSamplingFlux", model=["unet", 0], max_shift=1.15, base_shift=0.5, width=64, height=64),
            "guider": node("BasicGuider", model=["shift", 0], conditioning=["positive", 0]),
            "noise": node("RandomNoise", noise_seed=seed),
            "select": node("KSamplerSelect", sampler_name="euler"),
            "sigmas": node("BasicScheduler", model=["shift", 0], scheduler="simple", steps=4, denoise=1.0),
            "sampler": node(
                "SamplerCustomAdvanced",
                noise=["noise", 0],
                guider=["guider", 0],
                sampler=["select", 0],
                sigmas=["sigmas", 0],
                latent_image=["latent", 0],
            ),
        }
    )


def lora(seed: int, strength: float) -> Workflow:
    workflow = sd15(seed, lora=LORA)
    workflow["lora"]["inputs"]["strength_model"] = strength
    return workflow


def cases() -> Iterator[Case]:
    """In an order in which each case finds the models of the one before."""
    yield Case("txt2img", (sd15(1), sd15(2, text="two foxes in the snow"), sd15(3, steps=6)))
    yield Case("img2img", (sd15(4, kind="img2img"), sd15(5, kind="img2img", colour=0x802010)))
    yield Case("batch 1-4", tuple(sd15(10 + batch, batch=batch) for batch in (1, 2, 3, 4)))
    yield Case("CFG 1 and 7", (sd15(15, cfg=1.0), sd15(16), sd15(17, cfg=1.0)))
    samplers = ("heun", "dpmpp_2s_ancestral", "dpm_2", "dpmpp_sde", "uni_pc", "lcm")
    yield Case("several calls per step", tuple(sd15(20 + i, sampler=name) for i, name in enumerate(samplers)))
    yield Case("area", (area(30), area(31)))
    yield Case("mask", (mask(32), mask(33)))
    yield Case("inpainting", (inpainting(34), inpainting(35)))
    yield Case("hires fix", (hires_fix(36), hires_fix(37)))
    yield Case("ControlNet", (controlled(40), controlled(41), sd15(42), controlled(43, end=0.5, batch=2)))
    yield Case("LoRA on, off, changed", (sd15(50), lora(51, 1.0), lora(52, 0.4), sd15(53), lora(54, 1.0)))
    yield Case("LoRA hook", (hooked(55), hooked(56), sd15(57)))
    yield Case(
        "other schedules",
        (
            other_model(sd15(60), "ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
            other_model(sd15(58, sampler="lcm"), "ModelSamplingDiscrete", sampling="lcm", zsnr=False),
        ),
    )
    yield Case("RescaleCFG", (other_model(sd15(61), "RescaleCFG", multiplier=0.6),))
    yield Case("wrapped step", (other_model(sd15(62), "CPTMeddle", way="nothing"), sd15(63)))
    yield Case(
        "setting changed between steps",
        (other_model(sd15(64, steps=8), "CPTMeddle", way="setting"), sd15(65)),
        eager=("a model that keeps changing",),
    )
    yield Case(
        "forward replaced between steps",
        (sd15(66, batch=2), other_model(sd15(67, batch=2), "CPTMeddle", way="forward"), sd15(68, batch=2)),
        eager=("a model whose modules a node has changed",),
    )
    yield Case(
        "sampling of a node pack, and the host's again",
        (other_model(sd15(69), "CPTMeddle", way="sampling"), sd15(72)),
        eager=("runs code of comfy_parallel_test_nodes",),
    )
    yield Case(
        "PerturbedAttentionGuidance",
        (other_model(sd15(70), "PerturbedAttentionGuidance", scale=3.0),),
        eager=("a function in transformer_options.patches_replace",),
    )
    yield Case(
        "FreeU_V2",
        (other_model(sd15(71), "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),),
        eager=("a function in transformer_options.patches",),
        is_replayed=False,
    )
    yield Case("other checkpoint and back", (sd15(80, ckpt="b.safetensors"), sd15(81), sd15(82, ckpt="b.safetensors")))
    yield Case("SDXL", (sdxl(90), sdxl(91), sdxl(92, batch=2), sdxl(93, cfg=1.0)))
    yield Case("Flux", (flux(94), flux(95), flux(96, batch=2)))
    yield Case("models in turns", (sd15(97), flux(98), sdxl(99), sd15(100), flux(101)))


def latents(server: HostServer, entry: JSON) -> bytes:
    """What a job of these saved."""
    from safetensors.numpy import load_file

    assert entry["status"]["completed"], entry["status"]
    (saved_file,) = entry["outputs"]["save"]["latents"]
    tensor = load_file(Path(server.base_dir) / "output" / saved_file["subfolder"] / saved_file["filename"])
    content: bytes = tensor["latent_tensor"].tobytes()
    return content


def run_case(server: HostServer, case: Case, slot: int) -> list[bytes]:
    """Each job's latents."""
    ids = [server.submit(workflow, slot)["prompt_id"] for workflow in case.jobs]
    entries = server.wait(ids, 300)
    return [latents(server, entries[job_id]) for job_id in ids]


@dataclass(frozen=True)
class Steps:
    """What a slot's graph stepping has done since an earlier look."""

    captures: int
    replays: int
    eager: dict[str, int]

    @classmethod
    def of(cls, server: HostServer, slot: int) -> Steps:
        status, reply = server.request("GET", "/queue/all")
        assert status == 200, reply
        seen = reply["queues"][slot]["graphs"]
        return cls(seen["captures"], seen["replays"], seen["eager"])

    def since(self, earlier: Steps) -> Steps:
        eager = {reason: count - earlier.eager.get(reason, 0) for reason, count in self.eager.items()}
        return Steps(
            self.captures - earlier.captures,
            self.replays - earlier.replays,
            {reason: count for reason, count in eager.items() if count},
        )

    def unlike(self, case: Case) -> str:
        """How this differs from what the case says; empty when it does not."""
        reasons = set(self.eager) - {FIRST}
        if reasons == set(case.eager) and bool(self.replays) == case.is_replayed:
            return ""
        return f"{case}: {self.replays} replays, {self.captures} captures, eager: {self.eager}"
