"""Keeps loaded checkpoints in a module's global, and hands them to every job, as efficient loaders do."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import folder_paths
import nodes

loaded = {"ckpt": [], "lora": {}}


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def checkpoint(name):
    for entry in loaded["ckpt"]:
        if entry[0] == name:
            return entry[1:]
    path = folder_paths.get_full_path("checkpoints", name)
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)[:3]
    loaded["ckpt"].append([name, model, clip, vae])
    return model, clip, vae


class PackCachedLoader:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        names = (folder_paths.get_filename_list("checkpoints"),)
        loras = (folder_paths.get_filename_list("loras"),)
        return {"required": {"ckpt_name": names, "lora_name": loras, "strength": ("FLOAT", {"default": 1.0}), **keys}}

    def load(self, ckpt_name, lora_name, strength, key, parties):
        meet(key, "before", parties)
        model, clip, vae = checkpoint(ckpt_name)
        if lora_name not in loaded["lora"]:
            loaded["lora"][lora_name] = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", lora_name))
        lora = loaded["lora"][lora_name]
        model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
        meet(key, "loaded", parties)
        return model, clip, vae


NODE_CLASS_MAPPINGS = {"PackCachedLoader": PackCachedLoader}
