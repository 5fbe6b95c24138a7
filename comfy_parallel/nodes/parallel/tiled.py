"""Samples an upscaled picture tile by tile, whichever slot is free the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy_parallel.core.fan_out import COLLECTOR, MOST_PARTICIPANTS, OPENING, PARTICIPANT
from comfy_parallel.core.tiles import tiles
from comfy_parallel.nodes.parallel import fan_out
from comfy_parallel.nodes.parallel.job import Job, puller_plan
from comfy_parallel.nodes.parallel.kinds import (
    ANY,
    CATEGORY,
    COUNT,
    HIDDEN,
    HIDDEN_COLLECTOR,
    PEERS_HIDDEN,
    first,
    known_before,
    never_cached,
)
from comfy_parallel.nodes.parallel.painting import Piece, conditioning_of, cut_out, painted

UPSCALE, TILE, CONDITIONING, PAINT = (
    "UltimateSDUpscaleDistributed",
    "ParallelTile",
    "ParallelTileConditioning",
    "ParallelTilesPaint",
)
GIVEN = ("upscaled_image",)
_RAW = {"rawLink": True}
_SAMPLER = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
_DECODED_IN_TILES = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
_SIDE = {"default": 512, "min": 64, "max": 2048, "step": 8}
Rest = Callable[[str, int, list[Any]], dict[str, Any]]


def upscale(samplers: Sequence[str], schedulers: Sequence[str], rest: Rest) -> type:
    """The node. `rest(collector, outputs, after)` is the node that goes on gathering after another."""

    class UltimateSDUpscaleDistributed:
        COMFY_PARALLEL = True
        INPUT_IS_LIST = True
        OUTPUT_IS_LIST = (True,)
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "run"
        CATEGORY = CATEGORY
        DESCRIPTION = "Samples an upscaled picture tile by tile; each slot that is free takes the next tile."
        VALIDATE_INPUTS = known_before(participants=(0, MOST_PARTICIPANTS))

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            return {
                "required": {
                    "upscaled_image": ("IMAGE",),
                    "model": ("MODEL", _RAW),
                    "positive": ("CONDITIONING", _RAW),
                    "negative": ("CONDITIONING", _RAW),
                    "vae": ("VAE", _RAW),
                    "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True, **_RAW}),
                    "steps": ("INT", {"default": 20, "min": 1, "max": 10000, **_RAW}),
                    "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, **_RAW}),
                    "sampler_name": (list(samplers), _RAW),
                    "scheduler": (list(schedulers), _RAW),
                    "denoise": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, **_RAW}),
                    "tile_width": ("INT", _SIDE),
                    "tile_height": ("INT", _SIDE),
                    "padding": ("INT", {"default": 32, "min": 0, "max": 256}),
                    "mask_blur": ("INT", {"default": 8, "min": 0, "max": 256}),
                    "force_uniform_tiles": ("BOOLEAN", {"default": True}),
                    "tiled_decode": ("BOOLEAN", {"default": False}),
                },
                "optional": {
                    "dynamic_threshold": (
                        "INT",
                        {"default": 8, "min": 1, "max": 64, "tooltip": "Of a larger batch a slot takes whole images."},
                    ),
                    "participants": COUNT,
                },
                "hidden": {
                    **{name: spec for name, spec in {**HIDDEN, **PEERS_HIDDEN}.items() if name != "participants"},
                    **HIDDEN_COLLECTOR,
                    OPENING: ("STRING", {"default": ""}),
                    "unique_id": "UNIQUE_ID",
                },
            }

        def run(self, unique_id: Any, **given: Any) -> Any:
            job, own_id = fan_out.current(), unique_id[0]
            collector = first(given, COLLECTOR, own_id)
            if job is None or puller_plan(job, collector) is None:
                canvases, items = given["upscaled_image"], _items(given)
                flat = [piece for item in items for piece in item]
                work = [(piece, _taken(canvases, piece)) for piece in flat]
                graph, last = _graph(given, own_id, own_id, work)
                blur = given["mask_blur"][0]
                paint = {"tiles": last, "canvases": canvases, "pieces": flat, "blur": blur}
                graph[f"{own_id}.paint"] = _node(PAINT, own_id, **paint)
                return {"expand": graph, "result": ([f"{own_id}.paint", 0],)}
            participant = first(given, PARTICIPANT, 0)
            if not first(given, OPENING, ""):
                _open(job, collector, given)
            graph, last = _graph(given, own_id, collector, job.item(collector, participant))
            graph[f"{own_id}.given"] = _node(
                TILE, collector, before=last, **{COLLECTOR: collector, PARTICIPANT: participant}
            )
            after = [f"{own_id}.given", 0]
            if participant == 0:
                graph[f"{own_id}.rest"] = rest(collector, 1, after)
                after = [f"{own_id}.rest", 0]
            return {"expand": graph, "result": (after,)}

    return UltimateSDUpscaleDistributed


def _items(given: dict[str, Any]) -> list[list[Piece]]:
    """What is one share: a tile of all images of a batch, or all tiles of an image where there are many images."""
    items = []
    for number, canvas in enumerate(given["upscaled_image"]):
        count, height, width = canvas.shape[:3]
        sizes = (first(given, name, 512) for name in ("tile_width", "tile_height", "padding"))
        layout = tiles(width, height, *sizes, uniform=first(given, "force_uniform_tiles", True))
        if count > first(given, "dynamic_threshold", 8):
            items += [[Piece(number, one, one + 1, tile) for tile in layout] for one in range(count)]
        else:
            items += [[Piece(number, 0, count, tile)] for tile in layout]
    return items


def _taken(canvases: Sequence[Any], piece: Piece) -> Any:
    """What is sampled for a piece, and how large the whole is."""
    height, width = canvases[piece.canvas].shape[1:3]
    return cut_out(canvases[piece.canvas], piece), (width, height)


def _open(job: Job, collector: str, given: dict[str, Any]) -> None:
    canvases, items, blur = given["upscaled_image"], _items(given), given["mask_blur"][0]
    flat = [piece for item in items for piece in item]
    work = [[(piece, _taken(canvases, piece)) for piece in item] for item in items]

    def finish(shares: Sequence[Any]) -> Any:
        sampled = [image for ((images,),) in shares for image in images]
        return (painted(canvases, flat, sampled, blur),)

    job.finish[collector] = finish
    job.open(collector, work)


def _node(name: str, shown_as: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": name, "inputs": inputs, "override_display_id": shown_as}


def _graph(given: dict[str, Any], own_id: str, shown_as: str, work: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """The nodes that sample these pieces one after the other, and the link to the list of what they gave."""
    graph: dict[str, Any] = {}
    last = None
    raw = {name: given[name][0] for name in ("model", "positive", "negative", "vae", *_SAMPLER)}
    sampler = {name: raw[name] for name in ("model", *_SAMPLER)}
    is_tiled = first(given, "tiled_decode", False)
    decode: dict[str, Any] = dict(_DECODED_IN_TILES) if is_tiled else {}
    for number, (piece, (pixels, canvas_size)) in enumerate(work):
        at = f"{own_id}.{number}."
        for kind in ("positive", "negative"):
            place = {"conditioning": raw[kind], "piece": piece, "canvas_size": canvas_size}
            graph[at + kind] = _node(CONDITIONING, shown_as, **place)
        graph[f"{at}encode"] = _node("VAEEncode", shown_as, pixels=pixels, vae=raw["vae"])
        told = {kind: [at + kind, 0] for kind in ("positive", "negative")}
        graph[f"{at}sample"] = _node("KSampler", shown_as, **sampler, **told, latent_image=[f"{at}encode", 0])
        decoded = {**decode, "samples": [f"{at}sample", 0], "vae": raw["vae"]}
        graph[f"{at}decode"] = _node("VAEDecodeTiled" if is_tiled else "VAEDecode", shown_as, **decoded)
        before: dict[str, Any] = {} if last is None else {"before": last}
        graph[f"{at}tile"] = _node(TILE, shown_as, image=[f"{at}decode", 0], **before)
        last = [f"{at}tile", 0]
    return graph, last


class ParallelTile:
    """Adds a sampled tile to those before it; leaves all of them for the collector that it is told. Only the upscaler
    makes it."""

    RETURN_TYPES = (ANY,)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DEPRECATED = True  # Front ends leave it out of their menus.

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        hidden = {**HIDDEN, **HIDDEN_COLLECTOR}
        return {"required": {}, "optional": {"image": ("IMAGE",), "before": (ANY,)}, "hidden": hidden}

    @classmethod
    def IS_CHANGED(cls, /, **given: Any) -> float:  # noqa: N802 - the host's name
        return never_cached()

    def add(self, image: Any = None, before: Any = None, participant: int = 0, collector_id: str = "") -> Any:
        images = [*(before or ()), *([] if image is None else [image])]
        job = fan_out.current()
        if collector_id and job is not None:
            job.give(collector_id, participant, [[images]])
        return (images,)


class ParallelTileConditioning:
    """Cuts what a conditioning knows of places to a tile. Only the upscaler makes it."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "cut"
    CATEGORY = CATEGORY
    DEPRECATED = True  # Front ends leave it out of their menus.

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"conditioning": ("CONDITIONING",), "piece": (ANY,), "canvas_size": (ANY,)}}

    def cut(self, conditioning: Any, piece: Any, canvas_size: Any) -> tuple[Any]:
        return (conditioning_of(conditioning, piece, canvas_size),)


class ParallelTilesPaint:
    """Paints all tiles of pictures. Only the upscaler makes it."""

    RETURN_TYPES = (ANY,)  # the list of all
    FUNCTION = "paint"
    CATEGORY = CATEGORY
    DEPRECATED = True  # Front ends leave it out of their menus.

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": dict.fromkeys(("tiles", "canvases", "pieces", "blur"), (ANY,))}

    def paint(self, tiles: Any, canvases: Any, pieces: Any, blur: float) -> tuple[list[Any]]:
        return (painted(canvases, pieces, tiles, blur),)


def parts() -> dict[str, type]:
    """The nodes that it is made of while it runs."""
    return {TILE: ParallelTile, CONDITIONING: ParallelTileConditioning, PAINT: ParallelTilesPaint}
