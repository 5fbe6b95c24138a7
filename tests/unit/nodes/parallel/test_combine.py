"""What participants gave becomes one batch where it fits together, and nothing is left out where it does not."""

from __future__ import annotations

from typing import Any

import torch

from comfy_parallel.nodes.parallel.combine import combined


def images(value: float, count: int = 2, size: int = 4) -> Any:
    return torch.full((count, size, size, 3), value)


def test_images_of_one_size_are_one_batch_in_order() -> None:
    (batch,) = combined([[images(0)], [images(1), images(2, count=1)]])
    assert batch[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2]


def test_other_sizes_stay_apart() -> None:
    values = combined([[images(0)], [images(1, size=8)]])
    assert [tuple(value.shape) for value in values] == [(2, 4, 4, 3), (2, 8, 8, 3)]


def test_an_empty_batch_adds_nothing_whatever_its_size() -> None:
    (batch,) = combined([[images(0, count=0, size=64)], [images(1)]])
    assert tuple(batch.shape) == (2, 4, 4, 3)


def test_latents_keep_their_masks_and_numbers() -> None:
    first = {"samples": torch.zeros(2, 4, 8, 8), "noise_mask": torch.ones(1, 64, 64), "batch_index": [0, 1]}
    second = {"samples": torch.ones(1, 4, 8, 8), "noise_mask": torch.zeros(1, 64, 64), "batch_index": [7]}
    (batch,) = combined([[first], [second]])
    assert batch["samples"][:, 0, 0, 0].tolist() == [0, 0, 1]
    assert batch["noise_mask"][:, 0, 0].tolist() == [1, 1, 0]
    assert batch["batch_index"] == [0, 1, 7]
    assert len(combined([[first], [{"samples": torch.ones(1, 4, 8, 8)}]])) == 2


def test_sounds_follow_each_other() -> None:
    def sound(value: float, rate: int = 8000) -> Any:
        return {"waveform": torch.full((1, 2, 3), value), "sample_rate": rate}

    (joined,) = combined([[sound(0)], [sound(1)]])
    assert joined["waveform"][0, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert len(combined([[sound(0)], [sound(1, rate=16000)]])) == 2


def test_other_values_are_a_list() -> None:
    assert combined([["a"], ["b", "c"]]) == ["a", "b", "c"]
    assert combined([[None], [None]]) == [None]
    assert combined([[]]) == []
