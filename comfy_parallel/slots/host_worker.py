"""The host's own call of its worker, made again for each slot with the slot's queue in the place of the front."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from comfy_parallel.errors import HostMismatch

RunWorker = Callable[[Any], None]


def worker_of(frame: FrameType, front: Any) -> RunWorker:
    """`run(queue)`, which calls the function of a frame as the host did, whatever other arguments it was given.

    Hosts differ in what they hand to their worker: the queue and the server, or more of their own objects.

    Raises:
        HostMismatch: when the function cannot be called again, or was not given the front queue.
    """
    name = frame.f_code.co_name
    worker = frame.f_globals.get(name)
    if not callable(worker):
        raise HostMismatch(f"{name}: the host's worker is no module-level function")
    given = inspect.getargvalues(frame)
    count = frame.f_code.co_argcount  # The names after these are given by name only.
    arguments = [given.locals[argument] for argument in given.args[:count]]
    arguments += given.locals[given.varargs] if given.varargs else ()
    named = {argument: given.locals[argument] for argument in given.args[count:]}
    named |= given.locals[given.keywords] if given.keywords else {}
    if not any(value is front for value in (*arguments, *named.values())):
        raise HostMismatch(f"{name}: the host's worker was not given the queue that it takes jobs from")

    def run(queue: Any) -> None:
        def own(value: Any) -> Any:
            return queue if value is front else value

        worker(*map(own, arguments), **{argument: own(value) for argument, value in named.items()})

    return run
