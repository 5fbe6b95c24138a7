"""Loading weight files before the first job asks for them: `COMFY_PARALLEL_PRELOAD`, `POST /parallel/preload`."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comfy_parallel.config import WEIGHT_DTYPES
from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest
from comfy_parallel.host import facts
from comfy_parallel.http.targets import chosen_slots
from comfy_parallel.isolation import kept_outputs
from comfy_parallel.slots.slot import slots

logger = logging.getLogger(__name__)

FilesOf = Callable[[str], list[str]]

# By folder: the host's node that loads such a file, and its input.
LOADERS = {
    "checkpoints": ("CheckpointLoaderSimple", "ckpt_name"),
    "clip_vision": ("CLIPVisionLoader", "clip_name"),
    "controlnet": ("ControlNetLoader", "control_net_name"),
    "diffusion_models": ("UNETLoader", "unet_name"),
    "style_models": ("StyleModelLoader", "style_model_name"),
    "text_encoders": ("CLIPLoader", "clip_name"),
    "upscale_models": ("UpscaleModelLoader", "model_name"),
    "vae": ("VAELoader", "vae_name"),
}
MAX_FILES = 100
_OTHER_INPUTS = {"UNETLoader": {"weight_dtype": "default"}, "CLIPLoader": {"type": "stable_diffusion"}}


def make_prompt(names: Iterable[str], files_of: FilesOf) -> dict[str, Any]:
    """A prompt of loader nodes for files written like `checkpoints/sd15.safetensors`, diffusion models also with the
    kind of number that their loader is to make of them: `diffusion_models/flux.safetensors=fp8_e4m3fn`.

    Args:
        files_of: the names in one of the host's model folders, as its loader nodes know them.

    Raises:
        BadRequest: naming the file that is not there, or that no node loads by itself; when there are too many.
    """
    prompt: dict[str, Any] = {}
    once = dict.fromkeys(names)
    if len(once) > MAX_FILES:
        raise BadRequest("invalid_request", f"files names {len(once)} files", f"send at most {MAX_FILES} at a time")
    for name in once:
        folder, file, dtype = _parts(name)
        if folder not in LOADERS:
            known = ", ".join(sorted(LOADERS))
            raise BadRequest(
                "unknown_file", f"{shown(name)}: no such folder to preload from", f"begin with one of: {known}"
            )
        if file not in files_of(folder):
            have = ", ".join(files_of(folder)[:20]) or "none"
            raise BadRequest("unknown_file", f"{shown(name)}: no such file", f"files in {folder}: {have}")
        node, field = LOADERS[folder]
        inputs = {field: file, **_OTHER_INPUTS.get(node, {})} | ({"weight_dtype": dtype} if dtype else {})
        prompt[str(len(prompt) + 1)] = {"class_type": node, "inputs": inputs}
    return prompt


def _parts(name: str) -> tuple[str, str, str | None]:
    """A name's folder, its file, and the kind of number after an equals sign."""
    folder, _, file = name.partition("/")
    path, equals, dtype = file.rpartition("=")
    if folder == "diffusion_models" and equals and dtype in WEIGHT_DTYPES:
        return folder, path, dtype
    return folder, file, None


def submit(server: Any, front: Any, prompt: dict[str, Any], gpu_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Queue the prompt on each of these slots, as jobs that leave what is cached there; returns their ids and slots.

    Raises:
        Draining: when one of them takes no new jobs; then nothing is queued.
    """
    with front.mutex:
        for gpu_id in gpu_ids:
            front.closing.check(gpu_id)
        return _submit(server, prompt, gpu_ids)


def _submit(server: Any, prompt: dict[str, Any], gpu_ids: Sequence[int]) -> list[dict[str, Any]]:
    jobs = []
    for gpu_id in gpu_ids:
        prompt_id = str(uuid.uuid4())
        number, server.number = server.number, server.number + 1
        extra_data = {"create_time": int(time.time() * 1000)}
        kept_outputs.keep_during(prompt_id)
        with scoped(Scope(target=gpu_id, is_kept=False)):
            server.prompt_queue.put(server.prompt_queue.host_item(number, prompt_id, prompt, extra_data, list(prompt)))
        jobs.append({"prompt_id": prompt_id, "gpu_id": gpu_id})
    return jobs


def check_request(data: dict[str, Any], target: int | str | None) -> tuple[list[str], list[int]]:
    """The files and slots that `POST /parallel/preload` means.

    Raises:
        BadRequest: when the body cannot be acted on.
    """
    files = data.get("files")
    if not isinstance(files, list) or not files or not all(isinstance(name, str) for name in files):
        example = '{"files": ["checkpoints/name.safetensors"]}'
        raise BadRequest("invalid_request", "files is no list of names", f"send for example {example}")
    chosen = chosen_slots(data, target)
    if data.get("gpu_ids") is None and target is None:
        chosen = [index for index in chosen if slots()[index].kind != "remote"]  # They have models of their own.
    return files, chosen


def submit_at_start(server: Any, front: Any, names: Sequence[str]) -> None:
    """Queue what `COMFY_PARALLEL_PRELOAD` names on every slot."""
    try:
        prompt = make_prompt(names, facts.weight_files)
    except BadRequest as error:
        logger.error("comfy_parallel: COMFY_PARALLEL_PRELOAD: %s; %s", error.message, error.details)
        return
    if prompt:
        submit(server, front, prompt, [slot.index for slot in slots() if slot.kind != "remote"])
