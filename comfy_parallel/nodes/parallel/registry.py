"""The node classes of workflows for several participants, by the names that workflows use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from comfy_parallel.nodes import originals
from comfy_parallel.nodes.parallel import branches, collectors, dividers, fan_out, sources

ORIGINAL = "ComfyUI-Distributed"


def nodes(
    known: Mapping[str, type], pack_folders: Iterable[Path], check_interrupt: Callable[[], None]
) -> dict[str, type]:
    """Our nodes; none beside the pack whose names these are. Jobs with a collector are shared out from then on."""
    if originals.installed(
        ORIGINAL, pack_folders, "distributed.py", instead_of="nodes for several slots", is_it=_is_original
    ):
        fan_out.use((), ())
        return {}
    collecting, giving = collectors.nodes(check_interrupt), {**sources.nodes(), **dividers.shares()}
    others = {**sources.others(), **dividers.nodes(), branches.DistributedBranch.__name__: branches.DistributedBranch}
    made = {**collecting, **giving, **others}
    ours = {name: made[name] if name not in known else known[name] for name in made}
    fan_out.use(
        [name for name in collecting if name != collectors.REST and is_ours(ours[name])],
        [name for name in giving if is_ours(ours[name])],
        [branches.COLLECTOR_NAME],
    )
    return {name: node for name, node in made.items() if name not in known}


def is_ours(node: type) -> bool:
    """Whether a node class is one of these, and not another pack's of the same name."""
    return bool(getattr(node, "COMFY_PARALLEL", False))


def _is_original(folder: Path) -> bool:
    """By what its source registers: folders are named at will."""
    sources = (folder / "distributed.py", folder / "nodes" / "__init__.py")
    names = ("MultiGPUCollector", "DistributedCollector")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources if path.is_file()]
    return any(name in text for text in texts for name in names)
