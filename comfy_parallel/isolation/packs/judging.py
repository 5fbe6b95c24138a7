"""Once the node packs are loaded: say what is done about each, and have the scheduler do its part of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from comfy_parallel.config import PackModes
from comfy_parallel.isolation.packs import loader, serial, verdicts
from comfy_parallel.isolation.packs.clashes import clashes
from comfy_parallel.isolation.packs.host_objects import with_objects
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import slots

logger = logging.getLogger(__name__)

_SERIAL = "COMFY_PARALLEL_SERIAL_NODES"


def judge(
    modes: PackModes,
    serial_nodes: Iterable[str],
    node_classes: Mapping[str, type],
    folders: Iterable[Path],
    while_waiting: Callable[[], None],
    tell_unsafe: Callable[[Callable[[Any], bool]], None] = lambda is_unsafe: None,
) -> Callable[[], None]:
    """Have jobs run alone, or in turn, with what cannot be made safe; returns what takes it back.

    Args:
        serial_nodes: class types whose nodes run one at a time.
        node_classes: all that are loaded, by class type.
        folders: where packs lie.
        while_waiting: called now and then in a job that waits for its turn; it may raise.
        tell_unsafe: is given a function that says of a workflow whether its nodes are unsafe only beside others in one
            process: it need not run alone in a process of its own.
    """
    known = _verdicts(modes, folders)
    chosen = [*serial.KNOWN, *serial.of_user(serial_nodes)]
    asynchronous, take_back = serial.make_serial(node_classes, chosen, while_waiting)
    unsafe = verdicts.classes_alone(node_classes, known, modes) | dict.fromkeys(asynchronous, _SERIAL)
    one_at_a_time = {*asynchronous, *serial.names_in(node_classes, chosen)}
    tell_unsafe(_only_first(verdicts.by_classes(unsafe.keys() - one_at_a_time), verdicts.by_classes(one_at_a_time)))
    in_turn = verdicts.classes_in_turn(node_classes, known, modes)
    in_processes = [slot.process is not None for slot in slots()]
    if all(in_processes):  # Each of these slots is alone in its process.
        unsafe, in_turn = {}, {}
    if any(in_processes):  # The turns of nodes end at the process.
        unsafe |= dict.fromkeys(serial.names_in(node_classes, chosen), _SERIAL)
    items.when_to_run_alone(verdicts.by_classes(unsafe) if unsafe else None)
    items.who_takes_turns(verdicts.turns_of(in_turn) if in_turn else None)
    return take_back


def _only_first(first: Callable[[Any], bool], second: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda workflow: first(workflow) and not second(workflow)


def let_go() -> None:
    """Have no job run alone, or in turn."""
    items.when_to_run_alone(None)
    items.who_takes_turns(None)


def _verdicts(modes: PackModes, folders: Iterable[Path]) -> list[verdicts.Verdict]:
    installed = [pack for folder in folders for pack in verdicts.packs_in(folder)]
    found = verdicts.chosen(installed, modes)
    found |= {pack: list(with_objects(findings)) for pack, findings in loader.found().items()}
    known = verdicts.verdicts(found, {pack: clashes(pack) for pack in found}, modes)
    for verdict in known:
        for line in verdict.lines():
            logger.log(logging.WARNING if verdicts.CLASH in line else logging.INFO, "comfy_parallel: %s", line)
    for name in verdicts.not_there(installed, modes):
        logger.warning("comfy_parallel: COMFY_PARALLEL_PACKS names %r, but no node pack's folder is called so", name)
    return known
