"""What to rewrite in each file of a pack, from what was found in it."""

from __future__ import annotations

import ast
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from comfy_parallel.isolation.packs.finding import Finding
from comfy_parallel.isolation.packs.findings import Look
from comfy_parallel.isolation.packs.rewrite import Plan
from comfy_parallel.isolation.packs.sources import Pack, Thing
from comfy_parallel.slots.own_names import ACCESSOR


@dataclass
class PackPlan:
    """One pack: what was found, and for each file what to rewrite."""

    findings: list[Finding]
    files: dict[str, Plan] = field(default_factory=dict)


def plan_of(root: Path) -> PackPlan:
    """Look at a pack (a folder, or one file) and plan its rewriting."""
    pack = Pack(root)
    look = Look(pack)
    per_slot, shared, functions = look.per_slot(), look.shared(), look.kept_by_functions()
    found = sorted(look.findings(), key=lambda found: (found.file, found.line, found.name))
    return PackPlan(
        found,
        {
            path: _file_plan(pack, path, per_slot, shared.get(path, set()), functions.get(path, {}))
            for path in pack.files
        },
    )


def _file_plan(
    pack: Pack,
    path: str,
    per_slot: dict[str, set[str]],
    shared: set[str],
    functions: dict[str, tuple[int, set[str]]],
) -> Plan:
    attributes: dict[str, set[str]] = defaultdict(set)
    for name in per_slot.get(path, ()):
        owner, _, attribute = name.rpartition(".")
        if owner:
            attributes[owner].add(attribute)
    names = {name for name in per_slot.get(path, ()) if "." not in name}
    kept = {name: names for name, (_, names) in functions.items()}
    plan = Plan(names=names, attributes=attributes, shared=shared, functions=kept)
    imported: dict[str, tuple[str, str]] = {}
    accessors: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for node in pack.files[path].top_imports():
        source = pack.find(path, "." * node.level + (node.module or ""))
        for name, thing in _names(pack, path, node, source) if source else ():
            if thing.path != path and thing.name in per_slot.get(thing.path, ()):
                alias = _alias(thing.path)
                imported[name] = (alias, thing.name)
                accessors[(node.level, node.module or "")][ACCESSOR if thing.path == source else alias] = alias
    plan.imported, plan.accessors = imported, accessors
    plan.is_needed = bool(names or imported or kept or pack.files[path].writes_to_others)
    return plan


def _names(pack: Pack, path: str, node: ast.ImportFrom, source: str) -> list[tuple[str, Thing]]:
    names = [alias.asname or alias.name for alias in node.names if alias.name != "*"]
    if len(names) < len(node.names):
        file = pack.files[source]
        names += [name for name in (*file.values, *file.imports) if not name.startswith("_")]
    things = [(name, pack.look_up(path, name)) for name in names]
    return [(name, thing) for name, thing in things if thing is not None and thing.kind == "name"]


def _alias(path: str) -> str:
    """A name for a file's accessor that is the same in all files of the pack."""
    return f"{ACCESSOR[:-2]}_{zlib.crc32(path.encode()):08x}__"
