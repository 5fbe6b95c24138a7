"""Swaps functions and a class attribute of the host and of torch for a job, and puts them back, as samplers do."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import nodes
import torch


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def in_turn(key, role, parties, swap, put_back, work):
    """The second swaps when the first has swapped, and puts back when the first has put back."""
    if role == "first":
        original = swap()
        meet(key, "first swapped", parties)
        meet(key, "both swapped", parties)
    else:
        meet(key, "first swapped", parties)
        original = swap()
        meet(key, "both swapped", parties)
    try:
        return work()
    finally:
        meet(key, "both done", parties)
        if role == "second":
            meet(key, "first put back", parties)
        put_back(original)
        if role == "first":
            meet(key, "first put back", parties)


SAMPLER = {
    **nodes.KSampler.INPUT_TYPES()["required"],
    "gain": ("FLOAT", {"default": 1.0}),
    "key": ("STRING", {"default": ""}),
    "role": (["first", "second"], {}),
    "parties": ("INT", {"default": 1}),
}


class PackSwapsFunction:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": SAMPLER}

    def sample(self, gain, key, role, parties, **options):
        def swap():
            original = comfy.samplers.sampling_function
            comfy.samplers.sampling_function = lambda *args, **kwargs: original(*args, **kwargs) * gain
            return original

        def put_back(original):
            comfy.samplers.sampling_function = original

        return in_turn(key, role, parties, swap, put_back, lambda: nodes.common_ksampler(**sampler_options(options)))


class PackSwapsMethod(PackSwapsFunction):
    def sample(self, gain, key, role, parties, **options):
        def swap():
            original = torch.nn.GroupNorm.forward
            torch.nn.GroupNorm.forward = lambda self, input: original(self, input) * gain
            return original

        def put_back(original):
            torch.nn.GroupNorm.forward = original

        return in_turn(key, role, parties, swap, put_back, lambda: nodes.common_ksampler(**sampler_options(options)))


class PackLeavesNoise(PackSwapsFunction):
    """Never puts its function back."""

    def sample(self, gain, key, role, parties, **options):
        original = getattr(comfy.sample.prepare_noise, "original", comfy.sample.prepare_noise)

        def swap():
            def prepare_noise(*args, **kwargs):
                return original(*args, **kwargs) * gain

            prepare_noise.original = original
            comfy.sample.prepare_noise = prepare_noise

        def put_back(_original):
            pass

        return in_turn(key, role, parties, swap, put_back, lambda: nodes.common_ksampler(**sampler_options(options)))


class PackPutsNoiseBack:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("BOOLEAN",)
    FUNCTION = "put_back"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def put_back(self):
        comfy.sample.prepare_noise = getattr(comfy.sample.prepare_noise, "original", comfy.sample.prepare_noise)
        return (True,)


def sampler_options(options):
    return {{"latent_image": "latent"}.get(name, name): value for name, value in options.items()}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (PackSwapsFunction, PackSwapsMethod, PackLeavesNoise, PackPutsNoiseBack)}
