"""The nodes that divide batches, sounds and lists: into outputs, or each participant's own part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_parallel.core.fan_out import PARTICIPANT, PARTICIPANTS, bounds
from comfy_parallel.errors import NodeInputError
from comfy_parallel.nodes.parallel.kinds import ANY, CATEGORY, HIDDEN, PEERS_HIDDEN, first

MOST_PARTS = 10
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
        return {"required": {"value": (ANY,)}, "hidden": HIDDEN}

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> int:  # noqa: N802 - the host's name
        """The first participant's part depends on how many there are, which its inputs do not tell."""
        return _count(given.get("participants"))

    def divide(self, value: Sequence[Any], participant: Any = None, participants: Any = None) -> tuple[list[Any]]:
        index, count = (participant or [0])[0], _count(participants)
        if len(value) != 1:
            start, end = bounds(len(value), count, index)
            return (list(value[start:end]),)
        return ([cut(value[0], *bounds(size(value[0]), count, index))],)


class DistributedListSplitter(ParallelDivider):
    """The same for a list of images, under the name that older workflows have."""

    RETURN_TYPES = ("IMAGE",)  # type: ignore[assignment]
    RETURN_NAMES = ("images",)
    DESCRIPTION = "Each participant gets its own part of a list of images, in their order."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        mode = (["static", "dynamic"], {"default": "static", "tooltip": "Both divide the list into equal parts."})
        return {"required": {"images": ("IMAGE",)}, "optional": {"mode": mode}, "hidden": {**HIDDEN, **PEERS_HIDDEN}}

    def divide(self, images: Sequence[Any], **given: Any) -> tuple[list[Any]]:  # type: ignore[override]
        start, end = bounds(len(images), _count(given.get(PARTICIPANTS)), first(given, PARTICIPANT, 0))
        return (list(images[start:end]),)


def _count(participants: Any) -> int:
    from comfy_parallel.nodes.parallel import fan_out

    job = fan_out.current()
    return int(participants[0]) if participants else 1 if job is None else job.plan.participants


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
