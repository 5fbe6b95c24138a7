"""What a look at a node pack's source finds, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PER_SLOT = "per slot"
SHARED = "shared"
IN_TURN = "in turn"  # One job at a time has such nodes of the pack, beside others.
ALONE = "alone"
TREATMENTS = (PER_SLOT, SHARED, IN_TURN, ALONE)

MODULE_STATE = "module state"  # a global name of the pack's that functions rebind or change
CLASS_STATE = "class state"  # the same of a class attribute
FUNCTION_STATE = "function state"  # what a function keeps from one call to the next
SEEDING = "seeding"  # of a generator of random numbers of which cannot be told whose it is
HOST_WRITE = "host write"  # a name of a module, class or settings object that is not the pack's
SWITCH = "switch"  # a setting that torch keeps once per process, outside Python
DEVICE = "device"  # a device that was chosen when the pack was imported


@dataclass(frozen=True)
class Finding:
    """One thing that a pack's code changes for the whole process while jobs run.

    `file` is relative to the pack's folder; `name` is dotted for attributes. `classes` are the node classes whose
    code reaches the change.
    """

    kind: str
    name: str
    file: str
    line: int
    treatment: str
    reason: str = ""
    classes: frozenset[str] = frozenset()
    defined_in: str = ""  # the file whose name it is, where that is another one than `file`


@dataclass(frozen=True)
class Clash:
    """One place where a pack takes what we use too; `file` is relative to the pack's folder."""

    what: str
    consequence: str
    file: str
    line: int


def pack_name(pack: Path) -> str:
    """A pack's name: of its folder, or of its file without the ending."""
    return pack.name.removesuffix(".py")
