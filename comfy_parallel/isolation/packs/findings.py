"""Find what a node pack changes for the whole process while jobs run, and say how it is treated."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from comfy_parallel.isolation.packs import made
from comfy_parallel.isolation.packs.callers import Callers
from comfy_parallel.isolation.packs.finding import (
    ALONE,
    CLASS_STATE,
    DEVICE,
    FUNCTION_STATE,
    IN_TURN,
    MODULE_STATE,
    PER_SLOT,
    SEEDING,
    SHARED,
    SWITCH,
    Finding,
)
from comfy_parallel.isolation.packs.functions import caching, keeping
from comfy_parallel.isolation.packs.objects import makes_generator, set_by_methods
from comfy_parallel.isolation.packs.outside import SWITCHES, outside_treatment
from comfy_parallel.isolation.packs.sources import Pack, Thing
from comfy_parallel.isolation.packs.table import OVERRIDES
from comfy_parallel.isolation.packs.uses import MODULE, STATE, Change, Unit, units

_REGISTERED = {
    *("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__all__"),
    *("RETURN_TYPES", "RETURN_NAMES", "OUTPUT_IS_LIST", "INPUT_IS_LIST", "FUNCTION", "CATEGORY"),
}
_DEVICE_MAKERS = {
    *("get_torch_device", "unet_offload_device", "text_encoder_device", "vae_device", "intermediate_device"),
    *("get_device", "current_device", "device"),
}


def findings(pack_dir: Path) -> list[Finding]:
    """What a pack (a folder, or one file) changes for the whole process while jobs run, by file and line."""
    return sorted(Look(Pack(pack_dir)).findings(), key=lambda found: (found.file, found.line, found.name))


class Look:
    """One look at a pack."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._units = list(units(pack))
        self._callers = Callers(pack, self._units)

    def findings(self) -> Iterator[Finding]:
        """In no order."""
        for found in chain(
            self._state(), self._functions(), self._host_writes(), self._switches(), self._seeds(), self._devices()
        ):
            if found.treatment in (ALONE, IN_TURN) and not found.classes:
                yield replace(found, treatment=SHARED, reason="no node's code leads here")
            else:
                yield found

    def per_slot(self) -> dict[str, set[str]]:
        """For each file, the names that every slot gets its own of: `name`, `Class.name`."""
        return self._treated(PER_SLOT)

    def shared(self) -> dict[str, set[str]]:
        """For each file, the names that must stay one."""
        found = self._treated(SHARED)
        for treatment in (ALONE, IN_TURN):
            for path, names in self._treated(treatment).items():
                found[path] |= names
        return found

    @functools.cached_property
    def _own(self) -> list[Finding]:
        return [*self._state(), *self._devices()]

    def _treated(self, treatment: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for finding in self._own:
            if finding.treatment == treatment and finding.kind in (MODULE_STATE, CLASS_STATE, DEVICE):
                found[finding.defined_in or finding.file].add(finding.name)
        return found

    def _state(self) -> Iterator[Finding]:
        for thing, changes in self._changes.items():
            if thing.name.rpartition(".")[2] not in _REGISTERED and self._is_state(thing, changes):
                yield self._judge(thing, changes)

    @functools.cached_property
    def _changes(self) -> dict[Thing, list[tuple[Unit, Change]]]:
        changes: dict[Thing, list[tuple[Unit, Change]]] = defaultdict(list)
        for unit, change in self._job_changes():
            if change.thing.kind in STATE and (change.how != "call" or self._is_foreign(change.thing)):
                changes[change.thing].append((unit, change))
        assumed = [(thing, use) for thing, use in chain(self._assumed(), self._let_go()) if thing not in changes]
        for thing, use in assumed:
            changes[thing].append(use)
        waiting = list(changes)
        while waiting:
            thing = waiting.pop()
            held = (one for one in self._held.get(thing, ()) if made.may_change(self.pack, one, self._value(one)))
            for other in sorted((*self._holders.get(thing, ()), *held), key=str):  # A copy of one has one of the other.
                if other not in changes:
                    changes[other] = self._uses(other)
                    waiting.append(other)
        return changes

    @functools.cached_property
    def _holders(self) -> dict[Thing, set[Thing]]:
        """For each thing, those that have held it since the import."""
        return made.holders(self.pack)

    @functools.cached_property
    def _held(self) -> dict[Thing, set[Thing]]:
        """The other way round."""
        held: dict[Thing, set[Thing]] = defaultdict(set)
        for thing, holders in self._holders.items():
            for holder in holders:
                held[holder].add(thing)
        return held

    def _uses(self, thing: Thing) -> list[tuple[Unit, Change]]:
        line = getattr(self._value(thing), "lineno", 0)
        change = Change(thing, "mutate", thing.path, line)
        users = [(unit, change) for unit in self._job_units() if thing in unit.touches]
        return users or [(unit, change) for unit in self._units if unit.path == thing.path and unit.name == MODULE]

    def _job_units(self) -> Iterator[Unit]:
        """The functions and methods that a job may run."""
        for unit in self._units:
            if unit.name != "<module>" and self._callers.is_of_job((unit.path, unit.name)):
                yield unit

    def _job_changes(self) -> Iterator[tuple[Unit, Change]]:
        return ((unit, change) for unit in self._job_units() for change in unit.changes)

    def _assumed(self) -> Iterator[tuple[Thing, tuple[Unit, Change]]]:
        """Empty containers that only functions can fill, and objects whose own methods change them."""
        filled = {change.thing for unit in self._units if unit.name == "<module>" for change in unit.changes}
        for unit in self._job_units():
            for thing in unit.touches - filled:
                value = self._value(thing)
                if made.is_empty(value) or self._is_changing_object(thing, value):
                    yield thing, (unit, _assumed_of(thing, value))

    def _let_go(self) -> Iterator[tuple[Thing, tuple[Unit, Change]]]:
        """What functions return, keep elsewhere or pass on, and only jobs use: others may change it by another name."""
        outside = {thing for unit in self._outside() for thing in unit.touches}
        for unit in self._job_units():
            for thing in unit.lets_go - outside:
                value = self._value(thing)
                if made.may_change(self.pack, thing, value):
                    yield thing, (unit, _assumed_of(thing, value))

    def _is_foreign(self, thing: Thing) -> bool:
        """Whether the import made it by a call of which cannot be told what comes out."""
        value = self._value(thing)
        if not isinstance(value, ast.Call) or made.maker(value) in made.SAFE_MAKERS:
            return False
        made_of = self.pack.resolve(thing.path, value.func)
        return made_of is not None and made_of.kind in ("outside", "function", "method")

    def _is_changing_object(self, thing: Thing, value: ast.expr | None) -> bool:
        if made.maker(value) == "partial":
            return bool(self._held.get(thing))
        made_of = self.pack.resolve(thing.path, value.func) if isinstance(value, ast.Call) else None
        return made_of is not None and made_of.kind == "class" and set_by_methods(self.pack, made_of)

    def _is_state(self, thing: Thing, changes: list[tuple[Unit, Change]]) -> bool:
        value = self._value(thing)
        if all(change.how != "rebind" for _, change in changes):
            return made.maker(value) not in made.SAFE_MAKERS
        return True

    def _judge(self, thing: Thing, changes: list[tuple[Unit, Change]]) -> Finding:
        first = min((change for _, change in changes), key=lambda change: (change.path, change.line))
        users = [unit for unit in self._job_units() if thing in unit.touches]
        treatment, reason = self._treatment(thing, [change for _, change in changes], users)
        return Finding(
            kind=CLASS_STATE if thing.kind == "attribute" else MODULE_STATE,
            name=thing.name,
            file=first.path,
            line=first.line,
            treatment=treatment,
            reason=reason,
            classes=self._classes(users if treatment == IN_TURN else [unit for unit, _ in changes]),
            defined_in=thing.path,
        )

    def _treatment(self, thing: Thing, changes: list[Change], users: list[Unit]) -> tuple[str, str]:
        for (end, name), known in OVERRIDES.items():
            if name == thing.name and thing.path.endswith(end):
                return known
        exclusive = IN_TURN if all(map(self._node_classes, users)) else ALONE  # Else other jobs may touch it, too.
        servers = [unit for unit in self._outside() if thing in unit.touches]
        if servers:
            if not all(change.how == "key" or change.is_guarded for change in changes):
                return exclusive, "the server uses it too, and a job replaces what another one put there"
            answers = [unit for unit in servers if (unit.path, unit.name) not in self._callers.job]
            is_answered = any(change.thing == thing for unit in answers for change in unit.changes)
            if is_answered and any(self._callers.knows_node_id(name) for name in self._classes(users)):
                return exclusive, "the server answers by a node's number, which two jobs may share"
            return SHARED, "the server uses it too, entry by entry"
        if thing.name.partition(".")[0] in self.pack.files[thing.path].functions:
            return exclusive, "an attribute of a function"
        is_rebound = all(change.how == "rebind" for change in changes)
        holders = self._holders.get(thing, ())
        if is_rebound or (self._can_be_copied(thing) and all(made.can_be_held(self.pack, one) for one in holders)):
            return PER_SLOT, "only jobs use it"
        return exclusive, "an object that cannot be copied for each slot"

    def _outside(self) -> Iterator[Unit]:
        return (unit for unit in self._units if (unit.path, unit.name) in self._callers.outside)

    def _can_be_copied(self, thing: Thing) -> bool:
        return made.can_be_copied(self.pack, thing, self._value(thing))

    def _value(self, thing: Thing) -> ast.expr | None:
        return made.value_of(self.pack, thing)

    def _node_classes(self, unit: Unit) -> frozenset[str]:
        return self._callers.classes_reaching((unit.path, unit.name))

    def _classes(self, units: Iterable[Unit]) -> frozenset[str]:
        return frozenset().union(*map(self._node_classes, units))

    def _functions(self) -> Iterator[Finding]:
        """What functions keep from one call to the next, in defaults of parameters and in functions around them."""
        for path, names in self.kept_by_functions().items():
            for name, (line, kept) in names.items():
                for one in sorted(kept):
                    yield Finding(FUNCTION_STATE, f"{name}.{one}", path, line, PER_SLOT, "only jobs use it")

    def kept_by_functions(self) -> dict[str, dict[str, tuple[int, set[str]]]]:
        """For each file its functions that keep something, each with its line and the names of that."""
        called = self._callers.called_at_import()
        found: dict[str, dict[str, tuple[int, set[str]]]] = defaultdict(dict)
        for place, function in self._callers.functions():
            if place not in self._callers.outside:
                kept = caching(function) | (keeping(function) if place in called else set())
                if kept:
                    found[place[0]][place[1]] = function.lineno, kept
        return found

    def _host_writes(self) -> Iterator[Finding]:
        for unit, change in self._job_changes():
            if change.thing.kind == "outside":
                kind, treatment, reason = outside_treatment(change)
                if kind:
                    yield self._at(kind, change.thing.name, unit, change.line, treatment, reason)

    def _switches(self) -> Iterator[Finding]:
        for unit in self._job_units():
            for thing, call in unit.calls:
                if thing.kind == "outside" and thing.name in SWITCHES:
                    reason = f"{SWITCHES[thing.name]} has one for all threads"
                    yield self._at(SWITCH, thing.name, unit, call.lineno, ALONE, reason)

    def _seeds(self) -> Iterator[Finding]:
        """Seeding what an object holds: it may be the one generator that a library has."""
        for unit in self._job_units():
            owner = Thing("class", unit.path, unit.class_name) if unit.class_name else None
            for call in unit.seeds:
                match call.value:
                    case ast.Attribute(value=ast.Name(id="self"), attr=attr) if owner is not None:
                        if makes_generator(self.pack, owner, attr):
                            continue
                name = ast.unparse(call)
                yield self._at(SEEDING, name, unit, call.lineno, IN_TURN, "it may be a generator that all slots share")

    def _at(self, kind: str, name: str, unit: Unit, line: int, treatment: str, reason: str) -> Finding:
        return Finding(kind, name, unit.path, line, treatment, reason, self._node_classes(unit))

    def _devices(self) -> Iterator[Finding]:
        for path, file in self.pack.files.items():
            of_classes = ((owner, file.attributes(owner)) for owner in file.classes)
            values = {f"{owner}.{name}": value for owner, found in of_classes for name, value in found.items()}
            for name, value in (*file.values.items(), *values.items()):
                if value is not None and _chooses_device(value):
                    yield Finding(DEVICE, name, path, value.lineno, PER_SLOT, "chosen at import", frozenset(), path)


def _assumed_of(thing: Thing, value: ast.expr | None) -> Change:
    return Change(thing, "mutate", thing.path, getattr(value, "lineno", 0))


def _chooses_device(value: ast.expr) -> bool:
    calls = (leaf for leaf in ast.walk(value) if isinstance(leaf, ast.Call))
    return any(made.maker(call) in _DEVICE_MAKERS for call in calls)
