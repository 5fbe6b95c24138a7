"""The node classes of workflows for several participants, by the names that workflows use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from comfy_parallel.core.fan_out import Classes
from comfy_parallel.nodes import originals
from comfy_parallel.nodes.parallel import branches, collectors, dividers, fan_out, pulling, sources, tiled

ORIGINAL = "ComfyUI-Distributed"


def nodes(
    known: Mapping[str, type], pack_folders: Iterable[Path], check_interrupt: Callable[[], None]
) -> dict[str, type]:
    """Our nodes; none beside the pack whose names these are. Jobs with a collector are shared out from then on."""
    if originals.installed(
        ORIGINAL, pack_folders, "distributed.py", instead_of="nodes for several slots", is_it=_is_original
    ):
        fan_out.use(Classes())
        return {}
    collecting = {**collectors.nodes(check_interrupt), **_upscalers(known)}
    giving = {**sources.nodes(), **dividers.shares(), **pulling.nodes()}
    others = {**sources.others(), **dividers.nodes(), branches.DistributedBranch.__name__: branches.DistributedBranch}
    made = {**collecting, **giving, **others, **tiled.parts()}
    ours = {name: made[name] if name not in known else known[name] for name in made}
    given = {**pulling.GIVEN, tiled.UPSCALE: tiled.GIVEN}
    fan_out.use(
        Classes(
            frozenset(name for name in collecting if name != collectors.REST and is_ours(ours[name])),
            frozenset(name for name in giving if is_ours(ours[name])),
            frozenset([branches.COLLECTOR_NAME]),
            {name: inputs for name, inputs in given.items() if name in ours and is_ours(ours[name])},
            frozenset([dividers.DistributedListSplitter.__name__]),
        )
    )
    return {name: node for name, node in made.items() if name not in known}


def _upscalers(known: Mapping[str, type]) -> dict[str, type]:
    """The upscaler, with the samplers that the host has; none where it has no sampler."""
    if "KSampler" not in known:
        return {}
    inputs = known["KSampler"].INPUT_TYPES()["required"]  # type: ignore[attr-defined]
    names = inputs["sampler_name"][0], inputs["scheduler"][0]
    return {tiled.UPSCALE: tiled.upscale(*names, collectors.rest_node)}


def is_ours(node: type) -> bool:
    """Whether a node class is one of these, and not another pack's of the same name."""
    return bool(getattr(node, "COMFY_PARALLEL", False))


def _is_original(folder: Path) -> bool:
    """By what its source registers: folders are named at will."""
    sources = (folder / "distributed.py", folder / "nodes" / "__init__.py")
    names = ("MultiGPUCollector", "DistributedCollector")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources if path.is_file()]
    return any(name in text for text in texts for name in names)
