"""Tiles cover the picture once, and what is cut out for each can be sampled."""

from __future__ import annotations

import itertools

import pytest

from comfy_parallel.core.tiles import tiles


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("size", [(512, 512), (513, 700), (64, 64), (40, 1000), (1, 9)])
@pytest.mark.parametrize("padding", [0, 8, 32, 256])
def test_they_cover_the_picture_once(size: tuple[int, int], padding: int, uniform: bool) -> None:
    width, height = size
    found = tiles(width, height, 64, 128, padding, uniform=uniform)
    painted = [(x, y) for one in found for x in range(one.x, one.x_end) for y in range(one.y, one.y_end)]
    assert len(painted) == len(set(painted)) == width * height
    assert [(one.y, one.x) for one in found] == sorted((one.y, one.x) for one in found)
    for one in found:
        assert 0 <= one.left <= one.x < one.x_end <= one.right <= width
        assert 0 <= one.top <= one.y < one.y_end <= one.bottom <= height
        assert one.left in (max(one.x - padding, 0), width - (one.right - one.left))
        assert not any(side % 8 for side in one.sampled_size)


def test_uniform_tiles_have_one_size_and_others_end_with_their_padding() -> None:
    uniform, own = (tiles(200, 200, 64, 64, 16, uniform=uniform) for uniform in (True, False))
    assert {one.sampled_size for one in uniform} == {(96, 96)}
    assert own[0].sampled_size == (80, 80)
    assert all(a.x == b.x and a.y == b.y for a, b in itertools.zip_longest(uniform, own))
