"""The node classes of workflows for several participants, by the names that workflows use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from comfy_parallel.nodes.parallel import branches, collectors, dividers, fan_out, sources

logger = logging.getLogger(__name__)

PEER = "ComfyUI-Distributed"


def nodes(
    known: Mapping[str, type], pack_folders: Iterable[Path], check_interrupt: Callable[[], None]
) -> dict[str, type]:
    """Our nodes; none beside the pack whose names these are. Jobs with a collector are shared out from then on."""
    peer = installed_peer(pack_folders)
    if peer is not None:
        logger.info("comfy_parallel: its nodes for several slots stay out, because %s is installed (%s)", PEER, peer)
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


def installed_peer(pack_folders: Iterable[Path]) -> Path | None:
    """The folder of the pack that these nodes are known from, where it is installed."""
    for folder in pack_folders:
        for path in sorted(folder.glob("*/distributed.py")):
            if not path.parent.name.endswith(".disabled") and _is_peer(path.parent):
                return path.parent
    return None


def _is_peer(folder: Path) -> bool:
    """By what its source registers: folders are named at will."""
    sources = (folder / "distributed.py", folder / "nodes" / "__init__.py")
    names = ("MultiGPUCollector", "DistributedCollector")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources if path.is_file()]
    return any(name in text for text in texts for name in names)
