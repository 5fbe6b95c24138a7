"""Tiles that are painted back as they were cut out change nothing; others end softly where the next one begins."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from comfy_parallel.core.tiles import tiles  # noqa: E402
from comfy_parallel.errors import NodeInputError  # noqa: E402
from comfy_parallel.nodes.parallel.painting import Piece, conditioning_of, cut_out, painted  # noqa: E402


def pieces(width: int, height: int, padding: int = 8, images: int = 1) -> list[Piece]:
    layout = tiles(width, height, 32, 32, padding, uniform=True)
    return [Piece(0, 0, images, tile) for tile in layout]


@pytest.mark.parametrize("blur", [0, 4])
@pytest.mark.parametrize("size", [(64, 96), (100, 50)])
def test_tiles_that_are_left_as_they_are_give_the_picture(size: tuple[int, int], blur: int) -> None:
    canvas = torch.rand(2, size[1], size[0], 3)
    found = pieces(*size, images=2)
    (after,) = painted([canvas], found, [cut_out(canvas, one) for one in found], blur)
    assert torch.allclose(after, canvas, atol=1e-6 if size == (64, 96) else 0.3)


def test_each_pixel_is_the_last_tiles_without_blur_and_the_canvas_stays() -> None:
    canvas = torch.zeros(1, 64, 64, 4)
    found = pieces(64, 64, padding=0)
    sampled = [torch.full((1, 32, 32, 3), float(number)) for number in range(1, 5)]
    (after,) = painted([canvas], found, sampled, 0)
    assert [after[0, y, x, 0].item() for y, x in ((0, 0), (0, 63), (63, 0), (63, 63))] == [1, 2, 3, 4]
    assert after[..., 3].abs().sum() == canvas.abs().sum() == 0


def test_a_seam_is_soft_and_the_pictures_edge_is_not() -> None:
    canvas = torch.zeros(1, 32, 64, 3)
    found = pieces(64, 32)
    (after,) = painted([canvas], found, [torch.ones(1, *reversed(one.tile.sampled_size), 3) for one in found], 2)
    row = after[0, 16, :, 0]
    assert row[0] == row[63] == 1
    assert 0.5 < row[31] < 1


def test_hints_are_cut_as_the_picture_is_and_places_are_refused() -> None:
    class Control:
        previous_controlnet = None

        def __init__(self, hint: Any) -> None:
            self.cond_hint_original = hint

        def copy(self) -> Control:
            return Control(self.cond_hint_original)

    piece = pieces(64, 64, padding=0)[3]
    hint = torch.rand(1, 3, 64, 64)
    ((_, options),) = conditioning_of([["text", {"control": Control(hint)}]], piece, (64, 64))
    assert torch.equal(options["control"].cond_hint_original, hint[:, :, 32:, 32:])
    assert conditioning_of([["text", {}]], piece, (64, 64)) == [["text", {}]]
    with pytest.raises(NodeInputError, match="area"):
        conditioning_of([["text", {"area": (1, 2, 3, 4)}]], piece, (64, 64))
