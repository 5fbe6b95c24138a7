"""Find where a node pack names one GPU itself, whatever slot its job runs on."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from comfy_parallel.isolation.packs.finding import Clash

MAY_NAME = re.compile(rb"(cuda|xpu|hip):\d|\.cuda\(|set_device|torch\.device|cuda\.device|VISIBLE_DEVICES|ZE_AFFINITY")
_NUMBERED = re.compile(r"(?:cuda|xpu|hip):\d+")
_CALLS = {"torch.device", "torch.cuda.set_device", "torch.cuda.device", "torch.xpu.set_device"}
_VISIBLE = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
_CHOICES = {"INPUT_TYPES", "define_schema"}  # What a user may choose there is theirs.

_NAMED = (
    "jobs of every slot compute there, and on a machine without it they fail; ask its authors to use"
    " comfy.model_management.get_torch_device(), which is the slot's. Until then send such jobs to that device's slot"
    " (X-TARGET-GPU), or let them run alone (COMFY_PARALLEL_PACKS={pack}=alone)"
)
_AT_IMPORT = (
    "at import that is the first GPU, for the jobs of every slot; ask its authors to choose the device when a node"
    " runs, with comfy.model_management.get_torch_device()"
)
_HIDES = (
    "slots were made for the GPUs that were visible at start, so this has no effect or the wrong one; set it where"
    " ComfyUI is started"
)


def fixed_devices(pack: str, files: Iterable[tuple[str, ast.Module]]) -> Iterator[Clash]:
    """One finding for each device that the pack names, and where first; `pack` is its name, `files` are paths and what
    is in them."""
    found: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for path, tree in files:
        for what, consequence, line in _walk(tree, is_import=True):
            found[what, consequence.replace("{pack}", pack)].append((path, line))
    for (what, consequence), places in found.items():
        path, line = min(places)
        more = f", and in {len(places) - 1} more places" if len(places) > 1 else ""
        yield Clash(f"{what}{more}", consequence, path, line)


def _walk(node: ast.AST, *, is_import: bool) -> Iterator[tuple[str, str, int]]:
    """In code that runs, so neither in docstrings nor in what a user may choose."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        if getattr(node, "name", "") in _CHOICES:
            return
        is_import = False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    yield from _at(node, is_import=is_import)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, is_import=is_import)


def _at(node: ast.AST, *, is_import: bool) -> Iterator[tuple[str, str, int]]:
    match node:
        case ast.Constant(value=str(text)) if _NUMBERED.fullmatch(text):
            yield f"it names the device {text} itself", _NAMED, node.lineno
        case ast.Call(func=ast.Attribute(attr="cuda"), args=[], keywords=[]) if is_import:
            yield "it calls .cuda() when it is imported", _AT_IMPORT, node.lineno
        case ast.Call(func=ast.Attribute(attr="cuda"), args=[ast.Constant(value=int(number))]):
            yield f"it names the device cuda:{number} itself", _NAMED, node.lineno
        case ast.Call(func=called, args=[*_, ast.Constant(value=int(number))]) if _dotted(called) in _CALLS:
            yield f"it names the device cuda:{number} itself", _NAMED, node.lineno
        case ast.Subscript(value=owner, slice=ast.Constant(value=str(name)), ctx=ast.Store()) if name in _VISIBLE:
            if _dotted(owner).endswith("environ"):
                yield f"it sets {name}", _HIDES, node.lineno


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
