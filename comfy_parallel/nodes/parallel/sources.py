"""The nodes that give each participant its own seed or value, and two that the original has beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from comfy_parallel.core.shown import shown
from comfy_parallel.errors import NodeInputError
from comfy_parallel.nodes.parallel.kinds import ANY, CATEGORY, HIDDEN, PEERS_HIDDEN

_KINDS: dict[str, Callable[[Any], Any]] = {
    "INT": lambda value: int(float(value)),
    "FLOAT": float,
    "STRING": str,
    "COMBO": str,
}


class DistributedSeed:
    """Gives the first participant the seed, the next one the seed + 1, and so on."""

    COMFY_PARALLEL = True
    RETURN_TYPES = ("INT",)
    RETURN_NAMES: tuple[str, ...] = ("seed",)
    FUNCTION = "distribute"
    CATEGORY = CATEGORY
    DESCRIPTION = "The first participant gets this seed, the next one the seed + 1, and so on."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        seed = ("INT", {"default": 1125899906842, "min": 0, "max": 1125899906842624, "control_after_generate": True})
        return {"required": {"seed": seed}, "hidden": {**HIDDEN, **PEERS_HIDDEN}}

    def distribute(self, seed: int, participant: int = 0, **hidden: Any) -> tuple[int, ...]:
        return (seed + participant,)


class MultiGPUDistributor(DistributedSeed):
    """The same under its oldest name, with a batch size that every participant gets."""

    RETURN_TYPES = ("INT", "INT")  # type: ignore[assignment]
    RETURN_NAMES = ("seed", "batch_size")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        seed = ("INT", {"default": 0, "min": -(2**31), "max": 2**31 - 1})
        size = ("INT", {"default": 1, "min": 1, "max": 4096})
        return {"required": {"seed": seed, "batch_size": size}, "hidden": {**HIDDEN, **PEERS_HIDDEN}}

    def distribute(self, seed: int, participant: int = 0, batch_size: int = 1, **hidden: Any) -> tuple[int, ...]:
        return (seed + participant, batch_size)


class DistributedValue:
    """Gives each participant a value of its own where there is one, and the others the same."""

    COMFY_PARALLEL = True
    RETURN_TYPES = (ANY,)
    RETURN_NAMES = ("value",)
    FUNCTION = "distribute"
    CATEGORY = CATEGORY
    DESCRIPTION = "The first participant gets the default value, the others theirs where worker_values has one."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        values = ("STRING", {"default": "{}", "tooltip": '{"1": "a", "2": "b", "_type": "INT"}: 1 is the second one.'})
        required = {"default_value": ("STRING", {"default": ""}), "worker_values": values}
        return {"required": required, "hidden": {**HIDDEN, **PEERS_HIDDEN}}

    def distribute(self, default_value: Any, worker_values: Any, participant: int = 0, **hidden: Any) -> tuple[Any]:
        values = _values(worker_values)
        own = values.get(str(participant)) if participant else None
        return (_of_kind(default_value if own in (None, "") else own, values.get("_type", _kind(default_value))),)


def _values(text: Any) -> Mapping[str, Any]:
    try:
        values = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise NodeInputError(f"worker_values is no JSON ({error}): {shown(text)}") from error
    if not isinstance(values, dict):
        raise NodeInputError(f'worker_values is {shown(text)}; write an object like {{"1": "a", "2": "b"}}')
    return values


def _kind(value: Any) -> str:
    """What a value is where nothing says what it is to be."""
    return {int: "INT", float: "FLOAT"}.get(type(value), "STRING")


def _of_kind(value: Any, kind: Any) -> Any:
    if kind not in _KINDS:
        raise NodeInputError(f"worker_values: _type is {shown(kind)}; write one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise NodeInputError(f"{shown(value)} is no {kind}; correct the value or its _type") from error


class DistributedModelName:
    """Shows a value as text, and passes that on."""

    COMFY_PARALLEL = True
    RETURN_TYPES = (ANY,)
    RETURN_NAMES = ("output",)
    FUNCTION = "show"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY
    DESCRIPTION = "Shows the name of a model, or any other value, as text, and passes the text on."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"text": ("STRING", {"default": ""})}}

    def show(self, text: Any) -> dict[str, Any]:
        told = [_as_text(value) for value in text] if isinstance(text, list) else [_as_text(text)]
        return {"ui": {"text": told}, "result": (told[0] if len(told) == 1 else told,)}


def _as_text(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, indent=4, default=str)
    return str(value)


class DistributedEmptyImage:
    """A batch without images, of a size."""

    COMFY_PARALLEL = True
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "create"
    CATEGORY = CATEGORY
    DESCRIPTION = "A batch of no images: what stands for a participant that adds none."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        size = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"height": size, "width": size, "channels": ("INT", {"default": 3, "min": 1, "max": 4})}}

    def create(self, height: int, width: int, channels: int) -> tuple[Any]:
        import torch

        return (torch.zeros((0, height, width, channels)),)


def nodes() -> dict[str, type]:
    """Those that give each participant its own, and that a share has to know its participant for."""
    return {node.__name__: node for node in (DistributedSeed, MultiGPUDistributor, DistributedValue)}


def others() -> dict[str, type]:
    """Those that are the same for all."""
    return {node.__name__: node for node in (DistributedModelName, DistributedEmptyImage)}
