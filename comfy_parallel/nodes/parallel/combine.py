"""Puts what the participants gave together, in their order, by what it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def combined(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """All values of all participants: one batch where they fit together, else each by itself. Nothing is left out.

    Images, masks and latents of one size become one batch, sounds of one rate and shape follow each other.
    """
    values = [value for share in shares for value in share]
    if len(values) < 2:
        return values
    if all(value is None for value in values):  # an input that nothing is connected to
        return [None]
    for join in (_tensors, _latents, _sounds):
        joined = join(values)
        if joined is not None:
            return [joined]
    return values


def _tensors(values: Sequence[Any]) -> Any:
    """One batch of images or masks; those of other sizes stay apart, and empty batches add nothing."""
    import torch

    if not all(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in values):
        return None
    filled = [value for value in values if value.shape[0]] or list(values[:1])
    if len({(value.shape[1:], value.dtype) for value in filled}) > 1:
        return None
    return torch.cat([value.to(filled[0].device) for value in filled])


def _latents(values: Sequence[Any]) -> Any:
    """One batch of latents, with their masks and batch numbers where all have them."""
    if not all(isinstance(value, dict) and "samples" in value for value in values):
        return None
    samples = _tensors([value["samples"] for value in values])
    if samples is None or len({frozenset(value) for value in values}) > 1:
        return None
    together: dict[str, Any] = {**values[0], "samples": samples}
    if "noise_mask" in together:
        together["noise_mask"] = _masks(values)
        if together["noise_mask"] is None:
            return None
    if "batch_index" in together:
        together["batch_index"] = [index for value in values for index in value["batch_index"]]
    return together


def _masks(values: Sequence[Any]) -> Any:
    """The masks of latents, one for each latent: a single one counts for its whole batch."""
    masks = []
    for value in values:
        mask, count = value["noise_mask"], value["samples"].shape[0]
        masks.append(mask.expand(count, *mask.shape[1:]) if mask.shape[0] == 1 else mask)
    return _tensors(masks)


def _sounds(values: Sequence[Any]) -> Any:
    """One sound after the other, along time."""
    import torch

    if not all(isinstance(value, dict) and {"waveform", "sample_rate"} <= value.keys() for value in values):
        return None
    waves = [value["waveform"] for value in values]
    shapes = {(wave.shape[:-1], wave.dtype) for wave in waves}
    if len(shapes) > 1 or len({value["sample_rate"] for value in values}) > 1:
        return None
    return {**values[0], "waveform": torch.cat([wave.to(waves[0].device) for wave in waves], dim=-1)}
