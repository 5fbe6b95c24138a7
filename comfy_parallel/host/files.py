"""The host's files: those that a workflow names, and places for new ones."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from comfy_parallel.host import facts

KINDS = ("input", "output", "temp")
_LONGEST = 1024  # characters of a name


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file of the host: the folder's kind, the folder in it, and the name; and how a workflow names it."""

    kind: str
    subfolder: str
    name: str
    path: Path
    suffix: str  # what follows the name: ` [output]`, or nothing

    def renamed(self, subfolder: str, name: str) -> str:
        """How a workflow names that file instead."""
        return (f"{subfolder}/{name}" if subfolder else name) + self.suffix


def directory(kind: str) -> Path:
    """The host's folder of a kind.

    Raises:
        ValueError: when there is none.
    """
    import folder_paths

    found = folder_paths.get_directory_by_type(kind) if kind in KINDS else None
    if found is None:
        raise ValueError(f"{kind!r} is no folder of ComfyUI's")
    return Path(os.path.abspath(found))


def named_file(value: str) -> NamedFile | None:
    """The file that an input of a workflow names, as the host understands it; None when it names none."""
    if not value or len(value) > _LONGEST or "\0" in value or "\n" in value or os.path.isabs(value):
        return None
    kind, name, suffix = "input", value, ""
    for one in KINDS:
        if value.endswith(f"[{one}]"):
            kind, name = one, value[: -len(one) - 2].rstrip()
            suffix = value[len(name) :]
    base = directory(kind)
    path = Path(os.path.abspath(base / name))
    if not path.is_relative_to(base) or path == base or not path.is_file():
        return None
    place = path.relative_to(base)
    return NamedFile(kind, "" if place.parent == Path() else place.parent.as_posix(), place.name, path, suffix)


def numbered_place(kind: str, subfolder: str, prefix: str) -> tuple[Path, Any]:
    """The folder of a new file, and the number that the calling slot's job holds for it.

    Raises:
        Exception: the host's, when that is outside of its folder.
    """
    import folder_paths

    folder, _, number, *_ = folder_paths.get_save_image_path(os.path.join(subfolder, prefix), str(directory(kind)))
    return Path(folder), number


def folder_in(kind: str, subfolder: str) -> Path:
    """A folder in one of the host's, made if need be.

    Raises:
        ValueError: when it is outside of that.
    """
    base = directory(kind)
    folder = Path(os.path.abspath(base / subfolder))
    if not folder.is_relative_to(base):
        raise ValueError(f"{subfolder!r} is outside of the {kind} folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checks_itself(kind: str, name: str) -> bool:
    """Whether a node's own code says which values this input may have, instead of the host."""
    node_class = facts.node_classes().get(kind)
    return node_class is not None and name in _checked(node_class)


@cache
def _checked(node_class: type) -> Any:
    for method in ("VALIDATE_INPUTS", "validate_inputs"):
        check = getattr(node_class, method, None)
        if check is not None and "input_types" not in (names := inspect.signature(check).parameters):
            takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values())
            return _Everything() if takes_all else frozenset(names)
    return frozenset()


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True
