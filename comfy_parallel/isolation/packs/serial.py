"""Nodes that run one at a time over all slots, while the rest of their jobs runs beside others.

For what neither isolation of globals nor a slot of its own mends: nodes that number their files by looking which are
there, or that use something outside of the process which there is once.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_parallel.slots.slot import current_slot

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.1  # after which a waiting job sees that it was interrupted
_V3_FUNCTION = "execute"  # the method that a node of the host's newer kind has


@dataclass(frozen=True, slots=True)
class Serial:
    """Class types, with `*` for any text, whose nodes run one at a time, together; and why."""

    patterns: tuple[str, ...]
    why: str


KNOWN = (Serial(("VHS_VideoCombine",), "it numbers its files itself, by looking which are there (VideoHelperSuite)"),)


class _Turn:
    """One after the other; whoever waits sees that it was interrupted."""

    def __init__(self, while_waiting: Callable[[], None]) -> None:
        self._lock = threading.RLock()  # A node may call another of its kind.
        self._while_waiting = while_waiting

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=_LOOK_AGAIN_S):
            if current_slot() is not None:
                self._while_waiting()

    def __exit__(self, *_exc_info: object) -> None:
        self._lock.release()


def of_user(names: Iterable[str]) -> list[Serial]:
    """What `COMFY_PARALLEL_SERIAL_NODES` names: the nodes of each name take turns with each other."""
    return [Serial((name,), "COMFY_PARALLEL_SERIAL_NODES names it") for name in names]


def make_serial(
    node_classes: Mapping[str, type], serials: Iterable[Serial], while_waiting: Callable[[], None]
) -> tuple[list[str], Callable[[], None]]:
    """Have the nodes of these class types run one at a time.

    Args:
        while_waiting: called now and then in a job that waits for its turn; it may raise.

    Returns:
        The class types whose function is asynchronous, which cannot wait in this way: their jobs have to run alone; and
        what takes all of it back.
    """
    undos: list[Callable[[], None]] = []
    asynchronous = []
    for serial in serials:
        turn = _Turn(while_waiting)
        matching = names_in(node_classes, [serial])
        if not matching and serial not in KNOWN:
            logger.warning("comfy_parallel: %s: no node is called so (COMFY_PARALLEL_SERIAL_NODES)", serial.patterns[0])
        for name in matching:
            if (undo := _wrap(node_classes[name], turn)) is None:
                asynchronous.append(name)
            else:
                undos.append(undo)
            logger.info("comfy_parallel: node %s runs one at a time over all slots: %s", name, serial.why)

    def take_back() -> None:
        while undos:
            undos.pop()()

    return asynchronous, take_back


def names_in(node_classes: Iterable[str], serials: Iterable[Serial]) -> list[str]:
    """Those of the class types whose nodes run one at a time."""
    patterns = [pattern for serial in serials for pattern in serial.patterns]
    return [name for name in node_classes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _wrap(node_class: type, turn: _Turn) -> Callable[[], None] | None:
    """Have a class's node function wait for its turn; None when it is asynchronous."""
    name = _V3_FUNCTION if hasattr(node_class, "define_schema") else getattr(node_class, "FUNCTION", _V3_FUNCTION)
    raw = inspect.getattr_static(node_class, name)
    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    if inspect.iscoroutinefunction(function):
        return None

    @functools.wraps(function)
    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with turn:
            return function(*args, **kwargs)

    had = vars(node_class).get(name)
    setattr(node_class, name, type(raw)(one_at_a_time) if function is not raw else one_at_a_time)

    def undo() -> None:
        if had is None:
            delattr(node_class, name)
        else:
            setattr(node_class, name, had)

    return undo
