"""Where the tiles of a picture lie: what each paints, and what is cut out around that for it to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

GRAIN = 8  # Latents have one value for so many pixels.


@dataclass(frozen=True, slots=True)
class Tile:
    """It paints from `x` to `x_end` and `y` to `y_end`, and is cut out from `left` to `right` and `top` to `bottom`."""

    x: int
    y: int
    x_end: int
    y_end: int
    left: int
    top: int
    right: int
    bottom: int

    @property
    def sampled_size(self) -> tuple[int, int]:
        """Width and height that can be sampled: what was cut out, stretched to a whole number of grains if need be."""
        return _whole(self.right - self.left), _whole(self.bottom - self.top)


def tiles(width: int, height: int, tile_width: int, tile_height: int, padding: int, *, uniform: bool) -> list[Tile]:
    """Row by row. `uniform`: all are cut out in one size, which those at the edges shift into the picture."""
    columns = _spans(width, tile_width, padding, uniform)
    rows = _spans(height, tile_height, padding, uniform)
    return [
        Tile(x, y, x_end, y_end, left, top, right, bottom)
        for y, y_end, top, bottom in rows
        for x, x_end, left, right in columns
    ]


def _spans(total: int, size: int, padding: int, uniform: bool) -> list[tuple[int, int, int, int]]:
    """Along one side: where each tile begins and ends to paint, and where it is cut out."""
    spans = []
    for start in range(0, total, size):
        end = min(start + size, total)
        low, high = max(start - padding, 0), min(end + padding, total)
        length = min(_whole(size + 2 * padding if uniform else high - low), total)
        low = min(max(start - padding, 0), total - length)
        spans.append((start, end, low, low + length))
    return spans


def _whole(length: int) -> int:
    return math.ceil(length / GRAIN) * GRAIN
