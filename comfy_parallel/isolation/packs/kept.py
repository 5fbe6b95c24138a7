"""What was found in packs, and code made from it, kept beside Python's own compiled files until a source changes.

A folder that cannot be written to, or a file that cannot be read, only costs the time to do it again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import marshal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any

from comfy_parallel.isolation.packs.finding import Finding
from comfy_parallel.isolation.packs.plans import PackPlan, plan_of
from comfy_parallel.isolation.packs.rewrite import Plan
from comfy_parallel.isolation.packs.sources import source_paths
from comfy_parallel.patching.kept import keep, state_of

logger = logging.getLogger(__name__)

_TAG = "comfyparallel"
_OWN_SOURCES = sorted(Path(__file__).parent.glob("*.py"))


def kept_plan(root: Path) -> PackPlan:
    """The plan of a pack, looked up or made."""
    folder, name = (root, "pack") if root.is_dir() else (root.parent, root.stem)
    place = folder / "__pycache__" / f"{name}.{sys.implementation.cache_tag}.{_TAG}.json"
    key = state_of([*source_paths(root), *_OWN_SOURCES])
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return _plan_from(kept)
    except (OSError, ValueError, KeyError, TypeError):
        logger.debug("%s is looked at anew", root)
    plan = plan_of(root)
    keep(place, json.dumps({"key": key, **_as_json(plan)}).encode())
    return plan


def kept_code(path: Path, plan: Plan, make: Callable[[], CodeType | None]) -> CodeType | None:
    """The rewritten code of a file; None where nothing was to be rewritten."""
    place = Path(importlib.util.cache_from_source(str(path), optimization=_TAG))
    text = state_of([path, *_OWN_SOURCES]) + json.dumps(_file_as_json(plan), sort_keys=True)
    key = hashlib.sha256(text.encode()).digest()
    try:
        content = place.read_bytes()
        if content[: len(key)] == key:
            code = marshal.loads(content[len(key) :])
            if code is None or isinstance(code, CodeType):
                return code
    except (OSError, ValueError, EOFError, TypeError):
        logger.debug("%s is rewritten anew", path)
    code = make()
    keep(place, key + marshal.dumps(code))
    return code


def _as_json(plan: PackPlan) -> dict[str, Any]:
    findings = [{**asdict(found), "classes": sorted(found.classes)} for found in plan.findings]
    return {"findings": findings, "files": {path: _file_as_json(one) for path, one in plan.files.items()}}


def _file_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "names": sorted(plan.names),
        "attributes": {owner: sorted(names) for owner, names in plan.attributes.items()},
        "imported": {name: list(where) for name, where in plan.imported.items()},
        "accessors": [[level, module, dict(names)] for (level, module), names in plan.accessors.items()],
        "shared": sorted(plan.shared),
        "functions": {name: sorted(kept) for name, kept in sorted(plan.functions.items())},
        "is_needed": plan.is_needed,
    }


def _plan_from(kept: dict[str, Any]) -> PackPlan:
    findings = [Finding(**{**found, "classes": frozenset(found["classes"])}) for found in kept["findings"]]
    return PackPlan(findings, {path: _file_plan_from(one) for path, one in kept["files"].items()})


def _file_plan_from(kept: dict[str, Any]) -> Plan:
    return Plan(
        names=set(kept["names"]),
        attributes={owner: set(names) for owner, names in kept["attributes"].items()},
        imported={name: (alias, there) for name, (alias, there) in kept["imported"].items()},
        accessors={(level, module): names for level, module, names in kept["accessors"]},
        shared=set(kept["shared"]),
        functions={name: set(names) for name, names in kept["functions"].items()},
        is_needed=kept["is_needed"],
    )
