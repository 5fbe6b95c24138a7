"""What is done about each node pack: which of its node classes run alone, and how that is told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_parallel.config import PackModes
from comfy_parallel.isolation.packs.finding import ALONE, IN_TURN, TREATMENTS, Clash, Finding, pack_name

CLASH = "CLASH"
_OURS = Path(__file__).resolve().parents[3]
_PARENTS = ("custom_nodes.", "comfy_extras.")  # what the host puts before a pack's name in its node classes


@dataclass(frozen=True)
class Verdict:
    """What was found in one pack, and what the user wants for it: `auto`, `trust` or `alone`."""

    name: str
    mode: str
    findings: tuple[Finding, ...] = ()
    clashes: tuple[Clash, ...] = ()

    def runs_alone(self, class_name: str) -> bool:
        """Whether a job with a node of this Python class must be the only one that runs."""
        return self.mode == "alone" or self._is(ALONE, class_name)

    def runs_in_turn(self, class_name: str) -> bool:
        """Whether only one job with such nodes of the pack runs at a time."""
        return self._is(IN_TURN, class_name)

    def _is(self, treatment: str, class_name: str) -> bool:
        found = [one for one in self.findings if one.treatment == treatment and self.mode == "auto"]
        return any(not one.classes or class_name in one.classes for one in found)

    def lines(self) -> Iterator[str]:
        """One sentence for each treatment and each clash."""
        if self.mode == "trust":
            yield f"node pack {self.name}: trusted: its jobs run beside others, nothing is isolated"
        elif self.mode == "alone":
            yield f"node pack {self.name}: its jobs run alone, as COMFY_PARALLEL_PACKS says"
        else:
            for treatment in TREATMENTS:
                found = [one for one in self.findings if one.treatment == treatment]
                if found:
                    yield f"node pack {self.name}: {_MEANING[treatment]}: {_listed(found)}"
        for clash in self.clashes:
            yield f"node pack {self.name}: {CLASH}: {clash.what} ({clash.file}:{clash.line}); {clash.consequence}"


_MEANING = {
    "per slot": "isolated, every slot has its own",
    "shared": "one for all slots, as the server uses it too",
    IN_TURN: "jobs with such nodes run one at a time, beside others",
    ALONE: "jobs with such nodes run alone",
}


def verdicts(
    found: Mapping[Path, Iterable[Finding]], clashes: Mapping[Path, Iterable[Clash]], modes: PackModes
) -> list[Verdict]:
    """What is done about each pack, by the name of its folder or file."""
    packs = sorted({*found, *clashes}, key=lambda path: path.name.lower())
    return [
        Verdict(name, modes.of(name), tuple(found.get(pack, ())), tuple(clashes.get(pack, ())))
        for pack in packs
        for name in [pack_name(pack)]
    ]


def classes_alone(node_classes: Mapping[str, type], known: Iterable[Verdict], modes: PackModes) -> dict[str, str]:
    """For each class type whose jobs run alone, its pack's name."""
    return _classes(node_classes, known, modes, Verdict.runs_alone)


def classes_in_turn(node_classes: Mapping[str, type], known: Iterable[Verdict], modes: PackModes) -> dict[str, str]:
    """For each class type of which only one job of its pack runs at a time, that pack's name."""
    return _classes(node_classes, known, modes, Verdict.runs_in_turn)


def _classes(
    node_classes: Mapping[str, type],
    known: Iterable[Verdict],
    modes: PackModes,
    says: Callable[[Verdict, str], bool],
) -> dict[str, str]:
    by_name = {verdict.name: verdict for verdict in known}
    found: dict[str, str] = {}
    for class_type, node_class in node_classes.items():
        name = pack_of(node_class)
        if name is not None and says(by_name.get(name) or Verdict(name, modes.of(name)), node_class.__name__):
            found[class_type] = name
    return found


def packs_in(folder: Path) -> list[Path]:
    """The node packs in a folder, besides this one."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    are_packs = (path.suffix == ".py" or (path / "__init__.py").is_file() for path in paths)
    return [path for path, is_pack in zip(paths, are_packs, strict=True) if is_pack and path.resolve() != _OURS]


def chosen(installed: Iterable[Path], modes: PackModes) -> dict[Path, list[Finding]]:
    """The packs for which the user has chosen something, without findings."""
    return {pack: [] for pack in installed if modes.of(pack_name(pack)) != "auto"}


def not_there(installed: Iterable[Path], modes: PackModes) -> list[str]:
    """The names that `COMFY_PARALLEL_PACKS` has a choice for and that no pack has."""
    names = {pack_name(pack).lower() for pack in installed}
    return [name for name, _ in modes.named if name not in names]


def by_classes(alone: Collection[str]) -> Callable[[Any], bool]:
    """Whether a workflow has a node of one of these class types."""
    wanted = frozenset(alone)
    return lambda workflow: not wanted.isdisjoint(_class_types(workflow))


def turns_of(in_turn: Mapping[str, str]) -> Callable[[Any], frozenset[str]]:
    """The packs of the nodes of these class types that a workflow has."""
    return lambda workflow: frozenset(in_turn[name] for name in _class_types(workflow) if name in in_turn)


def _class_types(workflow: Any) -> list[str]:
    nodes = workflow.values() if isinstance(workflow, dict) else ()
    found = [made.get("class_type") for made in nodes if isinstance(made, dict)]
    return [name for name in found if isinstance(name, str)]


def pack_of(node_class: Any) -> str | None:
    """The pack that a node class came with; None for the host's basic nodes."""
    module = str(getattr(node_class, "RELATIVE_PYTHON_MODULE", ""))
    parent = next((parent for parent in _PARENTS if module.startswith(parent)), None)
    return None if parent is None else module.removeprefix(parent)


def _listed(found: Iterable[Finding]) -> str:
    """`name (file:line, file:line), …`, each name once."""
    places: dict[str, list[str]] = defaultdict(list)
    for one in found:
        places[one.name].append(f"{one.file}:{one.line}")
    return ", ".join(f"{name} ({', '.join(dict.fromkeys(where))})" for name, where in places.items())
