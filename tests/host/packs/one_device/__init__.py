"""Chooses the device once for the process and has the host's functions answer it, as packs for several GPUs do."""

from __future__ import annotations

import comfy.model_management as mm
import nodes
import torch

current_device = None
first_device = None


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def set_current_device(device):
    global current_device
    current_device = device


original_text_encoder_device = mm.text_encoder_device


def text_encoder_device():
    return original_text_encoder_device() if current_device is None else torch.device(current_device)


mm.text_encoder_device = text_encoder_device


def device_of_first_use(device):
    global first_device
    if first_device is None:
        first_device = device
    return first_device


class PackChoosesDevice:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"device": ("STRING", {}), **keys}}

    def choose(self, device, key, parties):
        meet(key, "before", parties)
        set_current_device(device)
        meet(key, "chosen", parties)
        seen = str(mm.text_encoder_device())
        meet(key, "seen", parties)
        set_current_device(None)
        return (seen,)


class PackFirstDevice(PackChoosesDevice):
    """Keeps the device of the first job that comes; the own one of each slot is asked for by name."""

    def choose(self, device, key, parties):
        meet(key, "before", parties)
        seen = device_of_first_use(device)
        meet(key, "seen", parties)
        return (seen,)


NODE_CLASS_MAPPINGS = {"PackChoosesDevice": PackChoosesDevice, "PackFirstDevice": PackFirstDevice}
