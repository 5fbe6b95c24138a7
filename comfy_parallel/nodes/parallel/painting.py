"""Cuts tiles out of pictures and paints them back; pictures are (batch, height, width, channels), 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_parallel.core.tiles import Tile
from comfy_parallel.errors import NodeInputError

_UNCUT = ("area", "mask", "gligen", "concat_latent_image")  # of a conditioning: places that a tile does not have


@dataclass(frozen=True, slots=True)
class Piece:
    """A tile of the images `first` to `last` (excluded) of a canvas."""

    canvas: int
    first: int
    last: int
    tile: Tile


def cut_out(canvas: Any, piece: Piece) -> Any:
    """The part of the canvas that is sampled, without transparency, in a size that can be."""
    tile = piece.tile
    part = canvas[piece.first : piece.last, tile.top : tile.bottom, tile.left : tile.right, :3]
    return resized(part, *tile.sampled_size).contiguous()


def painted(canvases: Sequence[Any], pieces: Sequence[Piece], sampled: Sequence[Any], blur: float) -> list[Any]:
    """The canvases with these pieces on them, one after the other, in their order.

    `blur`: how softly a piece ends where another begins: the standard deviation in pixels.
    """
    done = [canvas.clone() for canvas in canvases]
    for piece, image in zip(pieces, sampled, strict=True):
        tile, canvas = piece.tile, done[piece.canvas]
        height, width = canvas.shape[1:3]
        part = canvas[piece.first : piece.last, tile.top : tile.bottom, tile.left : tile.right, :3]
        image = resized(image[..., :3], tile.right - tile.left, tile.bottom - tile.top).to(part)
        across = _weight(tile.x, tile.x_end, tile.left, tile.right, width, blur)
        down = _weight(tile.y, tile.y_end, tile.top, tile.bottom, height, blur)
        weight = (down[:, None] * across[None, :])[None, :, :, None].to(part)
        part.copy_(part * (1 - weight) + image * weight)
    return done


def _weight(start: int, end: int, low: int, high: int, total: int, blur: float) -> Any:
    """How much of the tile is seen along one side, for each pixel from `low` to `high`. The picture's own edges are
    not soft."""
    import torch

    at = torch.arange(low, high, dtype=torch.float64) + 0.5
    if not blur:
        return ((at > start) & (at < end)).double()

    def step(edge: int) -> Any:
        return 0.5 * (1 + torch.erf((at - edge) / (blur * math.sqrt(2))))

    begin = torch.ones_like(at) if start == 0 else step(start)
    return begin - (torch.zeros_like(at) if end == total else step(end))


def resized(images: Any, width: int, height: int) -> Any:
    """The images in this size; the same ones when they have it."""
    import torch

    if images.shape[1:3] == (height, width):
        return images
    moved = images.movedim(-1, 1)
    moved = torch.nn.functional.interpolate(moved, (height, width), mode="bicubic", antialias=True)
    return moved.movedim(1, -1).clamp(0, 1)


def conditioning_of(conditioning: Any, piece: Piece, canvas_size: tuple[int, int]) -> Any:
    """What a tile is sampled for: the hints of control nets are cut as the picture is (`canvas_size`: width, height).

    Raises:
        NodeInputError: when the conditioning names places in the picture.
    """
    cut = []
    for embedding, options in conditioning:
        found = [name for name in _UNCUT if options.get(name) is not None]
        if found:
            raise NodeInputError(f"a conditioning with {found[0]} cannot be cut into tiles; connect one without")
        if options.get("control") is not None:
            options = {**options, "control": _control_of(options["control"], piece, canvas_size)}
        cut.append([embedding, options])
    return cut


def _control_of(control: Any, piece: Piece, canvas_size: tuple[int, int]) -> Any:
    tile, own = piece.tile, control.copy()
    hint = getattr(own, "cond_hint_original", None)
    if hint is not None:  # (batch, channels, height, width)
        whole = resized(hint.movedim(1, -1), *canvas_size)
        own.cond_hint_original = whole[:, tile.top : tile.bottom, tile.left : tile.right].movedim(-1, 1)
    if getattr(own, "previous_controlnet", None) is not None:
        own.previous_controlnet = _control_of(own.previous_controlnet, piece, canvas_size)
    return own
