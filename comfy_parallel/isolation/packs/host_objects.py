"""Which names that jobs write to belong to objects of the host or a library, which have no value for each slot."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from comfy_parallel.isolation.packs.finding import ALONE, HOST_WRITE, PER_SLOT, SHARED, Finding
from comfy_parallel.isolation.packs.writes import is_settings

_UNKNOWN = object()


def with_objects(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings, once all modules are imported: attributes of objects let jobs run alone."""
    for found in findings:
        if found.kind == HOST_WRITE and found.treatment == PER_SLOT and _is_of_an_object(found.name):
            treatment = ALONE if found.classes else SHARED
            yield replace(found, treatment=treatment, reason="an attribute of an object that all slots share")
        else:
            yield found


def _is_of_an_object(name: str) -> bool:
    owner = _look_up(name.rpartition(".")[0])
    return owner is not _UNKNOWN and not isinstance(owner, ModuleType | type) and not is_settings(owner)


def _look_up(name: str) -> Any:
    """What a dotted name stands for now."""
    module, *attributes = _module_and_rest(name)
    found = sys.modules.get(module, _UNKNOWN)
    for attribute in attributes:
        found = getattr(found, attribute, _UNKNOWN)
    return found


def _module_and_rest(name: str) -> list[str]:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in sys.modules:
            return [".".join(parts[:end]), *parts[end:]]
    return parts
