"""The nodes that divide batches, sounds and lists: into outputs, or each participant's own part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_parallel.core.fan_out import PARTICIPANT, PARTICIPANTS, bounds
from comfy_parallel.errors import NodeInputError
from comfy_parallel.nodes.parallel import fan_out, pulling
from comfy_parallel.nodes.parallel.job import participants_in
from comfy_parallel.nodes.parallel.kinds import (
    ANY,
    CATEGORY,
    HIDDEN,
    HIDDEN_PULLER,
    PEERS_HIDDEN,
    first,
    known_before,
    never_cached,
)
from comfy_parallel.slots.slot import current_slot

MOST_PARTS = 10
_leaving_out: set[str] = set()  # The ids of nodes that had less to give than there were participants.
_PER_ITEM = ("noise_mask", "batch_index")  # What a latent has for each of its items, or once for all.


def nodes() -> dict[str, type]:
    """Those that give each part at an output of its own, by the names that workflows use."""
    return {
        "ImageBatchDivider": _divider("ImageBatchDivider", "images", "IMAGE", "batch"),
        "AudioBatchDivider": _divider("AudioBatchDivider", "audio", "AUDIO", "audio"),
        "LatentBatchDivider": _divider("LatentBatchDivider", "latent", "LATENT", "batch"),
    }


def shares() -> dict[str, type]:
    """Those that give each participant its own part."""
    return {node.__name__: node for node in (ParallelDivider, DistributedListSplitter)}


def _divider(name: str, given: str, kind: str, part: str) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        count = {"default": 2, "min": 1, "max": MOST_PARTS, "tooltip": "How many parts; the outputs behind are empty."}
        return {"required": {given: (kind,), "divide_by": ("INT", count)}}

    def divide(self: Any, divide_by: int, **inputs: Any) -> tuple[Any, ...]:
        total = size(inputs[given])
        ends = [bounds(total, divide_by, index) for index in range(divide_by)]
        ends += [(total, total)] * (MOST_PARTS - divide_by)
        return tuple(cut(inputs[given], *end) for end in ends)

    fields = {
        "COMFY_PARALLEL": True,
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": (kind,) * MOST_PARTS,
        "RETURN_NAMES": tuple(f"{part}_{index + 1}" for index in range(MOST_PARTS)),
        "FUNCTION": "divide",
        "OUTPUT_NODE": True,
        "CATEGORY": CATEGORY,
        "DESCRIPTION": "Divides into parts that follow each other; the first ones are longer where it does not fit.",
        "divide": divide,
    }
    return type(name, (), fields)


class ParallelDivider:
    """Gives each participant its own part of images, masks, latents, a sound or a list."""

    COMFY_PARALLEL = True
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True,)
    RETURN_TYPES = (ANY,)
    RETURN_NAMES = ("part",)
    FUNCTION = "divide"
    CATEGORY = CATEGORY
    DESCRIPTION = "Each participant gets its own part of a batch, a sound or a list, in their order."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"value": (ANY,)}, "hidden": {**HIDDEN, "unique_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, /, **given: Any) -> float:  # noqa: N802 - the host's name
        """The first participant's part depends on how many there are, which its inputs do not tell.

        A node that has left somebody out always runs: it has to say so in each job.
        """
        return never_cached() if first(given, "unique_id", None) in _leaving_out else _count(given.get(PARTICIPANTS))

    def divide(self, value: Sequence[Any], unique_id: Any, **given: Any) -> tuple[list[Any]]:
        if len(value) != 1:
            return (list(value[slice(*_part(len(value), unique_id, given))]),)
        return ([cut(value[0], *_part(size(value[0]), unique_id, given))],)


class DistributedListSplitter(ParallelDivider):
    """The same for a list of images, under the name that older workflows have."""

    RETURN_TYPES = ("IMAGE",)  # type: ignore[assignment]
    RETURN_NAMES = ("images",)
    DESCRIPTION = "Each participant gets its own part of a list of images, in their order."

    VALIDATE_INPUTS = known_before(mode=None)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        hidden = {**HIDDEN, **HIDDEN_PULLER, **PEERS_HIDDEN, "unique_id": "UNIQUE_ID"}
        tip = "static: equal parts, one for each participant; dynamic: each slot that is free takes the next image."
        mode = (["static", "dynamic"], {"default": "static", "tooltip": tip})
        return {"required": {"images": ("IMAGE",)}, "optional": {"mode": mode}, "hidden": hidden}

    @classmethod
    def IS_CHANGED(cls, /, **given: Any) -> Any:  # noqa: N802 - the host's name
        return pulling.is_pulled(given) or super().IS_CHANGED(**given)

    def divide(self, unique_id: Any, images: Sequence[Any] = (), **given: Any) -> tuple[list[Any]]:  # type: ignore[override]
        if pulling.is_pulled({**given, "unique_id": unique_id}):
            return (pulling.item(unique_id, images, given),)
        return (list(images[slice(*_part(len(images), unique_id, given))]),)


def _part(total: int, unique_id: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Where this participant's part begins and ends. Who comes after the last thing has nothing to do."""
    participant, count, job = first(given, PARTICIPANT, 0), _count(given.get(PARTICIPANTS)), fan_out.current()
    if job is not None and count > max(total, 1):
        _leaving_out.add(unique_id[0])
        run = slot.run if (slot := current_slot()) is not None else None
        if job.leave_out(unique_id[0], range(max(total, 1), count)) and run is not None:
            run.interrupted = True  # It ends before the next node.
    return bounds(total, count, participant)


def _count(participants: Any) -> int:
    job = fan_out.current()
    return int(participants[0]) if participants else 1 if job is None else participants_in(job)


def size(value: Any) -> int:
    """How many things can be divided: images, masks, latents, or the samples of a sound.

    Raises:
        NodeInputError: when it is none of these.
    """
    if isinstance(value, dict) and "waveform" in value:
        return int(value["waveform"].shape[-1])
    if isinstance(value, dict) and "samples" in value:
        return int(value["samples"].shape[0])
    if hasattr(value, "shape") and len(value.shape) > 2:
        return int(value.shape[0])
    raise NodeInputError(f"a {type(value).__name__} cannot be divided; connect images, masks, latents or a sound")


def cut(value: Any, start: int, end: int) -> Any:
    """The part of it from `start` to `end`."""
    if not isinstance(value, dict):
        return value[start:end]
    if "waveform" in value:
        return {**value, "waveform": value["waveform"][..., start:end]}
    total = size(value)
    part = {key: value[key][start:end] for key in _PER_ITEM if key in value and len(value[key]) == total}
    return {**value, "samples": value["samples"][start:end], **part}
