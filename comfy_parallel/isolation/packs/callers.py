"""Who runs a pack's functions: nodes in a job, the server outside of jobs, or only the import."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator

from comfy_parallel.isolation.packs.sources import Pack, Thing
from comfy_parallel.isolation.packs.uses import MODULE, Function, Unit

Place = tuple[str, str]  # a unit's file and name

_HANDS_OVER = {
    *("add_route", "add_get", "add_post", "add_put", "add_delete", "add_on_prompt_handler", "add_middleware"),
    *("run_coroutine_threadsafe", "call_soon_threadsafe", "add_signal_handler", "on_startup", "on_shutdown"),
}
_STARTS = {"Thread", "Timer", "submit", "run_in_executor", "create_task", "ensure_future", "start_new_thread"}
_ASKED_BY_THE_SERVER = {"INPUT_TYPES", "VALIDATE_INPUTS", "validate_inputs", "define_schema", "comfy_entrypoint"}
# A call of such a method is of a list, dict, set or text, and not of a node whose function is called so.
_OF_CONTAINERS = {name for kind in (list, dict, set, str) for name in dir(kind) if not name.startswith("_")}
_MOST_NAMESAKES = {"outside": 4, "job": 25}  # of a method, for a call by its name to count as one of each of them


class Callers:
    """Reachability between the units of a pack, by the names they mention."""

    def __init__(self, pack: Pack, units: list[Unit]) -> None:
        self._pack = pack
        self._units = {(unit.path, unit.name): unit for unit in units}
        self._methods: dict[str, list[Place]] = defaultdict(list)
        for place in self._units:
            if "." in place[1]:
                self._methods[place[1].rpartition(".")[2]].append(place)
        self.nodes = {place for path, file in pack.files.items() for place in self._node_classes(path)}
        self._next = {
            kind: {place: set(self._reached_by(unit, most)) & self._units.keys() for place, unit in self._units.items()}
            for kind, most in _MOST_NAMESAKES.items()
        }
        self.outside = self.reach(self._outside_roots(), "outside")
        self.job = self.reach(self._job_roots())
        self.importing = self.reach(self._import_roots()) - self.job - self.outside
        self._reaches = {place: self.reach(self._methods_of(place)) for place in sorted(self.nodes)}

    def is_of_job(self, place: Place) -> bool:
        """Whether a job may run a unit; what nothing mentions may be called by any name."""
        return place in self.job or place not in self.outside | self.importing

    def called_at_import(self) -> set[Place]:
        """The functions that the import calls, or decorates with, and what these lead to."""
        refers = (thing for unit in self._units.values() if unit.name == MODULE for thing in unit.refers)
        return self.reach(
            place for thing in refers if thing.kind in ("function", "method") for place in self._places(thing)
        )

    def functions(self) -> Iterator[tuple[Place, Function]]:
        """The functions and methods of the pack."""
        for path, file in self._pack.files.items():
            for name, function in file.functions.items():
                yield (path, name), function
            for owner in file.classes:
                for name, function in file.methods(owner).items():
                    yield (path, f"{owner}.{name}"), function

    def classes_reaching(self, place: Place) -> frozenset[str]:
        """The node classes whose methods get to a unit."""
        return frozenset(owner for (_, owner), reached in self._reaches.items() if place in reached)

    def knows_node_id(self, node_class: str) -> bool:
        """Whether a node is told its number in the workflow."""
        for path, name in self.nodes:
            if name == node_class:
                tree = self._pack.files[path].classes[name]
                texts = {leaf.value for leaf in ast.walk(tree) if isinstance(leaf, ast.Constant)}
                names = {leaf.attr for leaf in ast.walk(tree) if isinstance(leaf, ast.Attribute)}
                return "UNIQUE_ID" in texts or "unique_id" in names
        return False

    def reach(self, roots: Iterable[Place], kind: str = "job") -> set[Place]:
        """The roots and all that they lead to."""
        found: set[Place] = set()
        waiting = [root for root in roots if root in self._units]
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting.extend(self._next[kind][place] - found)
        return found

    def _reached_by(self, unit: Unit, most: int) -> Iterator[Place]:
        for thing in unit.refers if unit.name != MODULE else ():
            yield from self._places(thing)
        for name in unit.methods_called if unit.name != MODULE else ():
            if 0 < len(self._methods[name]) <= most:
                is_plain = name in _OF_CONTAINERS
                yield from (place for place in self._methods[name] if not (is_plain and self._is_of_node(place)))

    def _is_of_node(self, place: Place) -> bool:
        return (place[0], place[1].rpartition(".")[0]) in self.nodes

    def _places(self, thing: Thing) -> Iterator[Place]:
        if thing.kind in ("function", "method"):
            yield thing.path, thing.name
        elif thing.kind == "class":
            for base in self._pack.base_classes(thing):
                for name in ("__init__", "__new__", "__call__", "__enter__", "__exit__", "__getattr__", "__getitem__"):
                    yield base.path, f"{base.name}.{name}"

    def _methods_of(self, place: Place) -> Iterator[Place]:
        for base in self._pack.base_classes(Thing("class", *place)):
            for name in self._pack.files[base.path].methods(base.name):
                if name not in _ASKED_BY_THE_SERVER:
                    yield base.path, f"{base.name}.{name}"

    def _node_classes(self, path: str) -> Iterator[Place]:
        file = self._pack.files[path]
        for name in file.classes:
            bases = list(self._pack.base_classes(Thing("class", path, name)))
            members = {m for base in bases for m in self._pack.files[base.path].methods(base.name)}
            if members & {"INPUT_TYPES", "define_schema"}:
                yield path, name

    def _job_roots(self) -> Iterator[Place]:
        for place in self.nodes:
            yield from self._methods_of(place)
        for unit in self._units.values():
            if unit.name == MODULE:
                handed = self._handed_over(unit)
                for thing in unit.refers - unit.calls_only:
                    yield from (place for place in self._places(thing) if place not in handed)

    def _import_roots(self) -> Iterator[Place]:
        for unit in self._units.values():
            if unit.name == MODULE:
                for thing in unit.calls_only:
                    yield from self._places(thing)

    def _outside_roots(self) -> Iterator[Place]:
        for place in self._units:
            if place[1].rpartition(".")[2] in _ASKED_BY_THE_SERVER:
                yield place
        for place, unit in self._units.items():
            yield from self._handed_over(unit)
            if unit.is_route:
                yield place

    def _handed_over(self, unit: Unit) -> set[Place]:
        """What a unit gives to the server or, when it runs at import, to a thread."""
        names = _HANDS_OVER | (_STARTS if unit.name == MODULE else set())
        calls = [(thing.name.rpartition(".")[2], call) for thing, call in unit.calls] + unit.unknown_calls
        found: set[Place] = set()
        for name, call in calls:
            if name in names:
                for leaf in ast.walk(call):
                    thing = self._pack.resolve(unit.path, leaf) if isinstance(leaf, ast.Name | ast.Attribute) else None
                    found |= set(self._places(thing)) if thing is not None else set()
        return found
