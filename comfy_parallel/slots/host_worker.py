"""The host's own call of its worker, made again for each slot with the slot's queue in the place of the front."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from comfy_parallel.errors import HostMismatch

RunWorker = Callable[[Any], None]

WORKER_NAME = "prompt_worker"
_MAIN_MODULES = ("__main__", "main")


def replace_worker(start: Callable[[RunWorker, Any], None], is_queue: Callable[[Any], bool]) -> None:
    """Have `start(run, queue)` called on the host's worker thread instead of the host's worker.

    That is a function of the host's main module, looked up there when its thread is made. `queue` is the one among
    its arguments for which `is_queue` holds.
    """
    for name in _MAIN_MODULES:
        module = sys.modules.get(name)
        worker = getattr(module, WORKER_NAME, None)
        if callable(worker) and not hasattr(worker, "__replaced__"):
            setattr(module, WORKER_NAME, _started(worker, start, is_queue))


def _started(
    worker: Callable[..., Any], start: Callable[[RunWorker, Any], None], is_queue: Callable[[Any], bool]
) -> Callable[..., Any]:
    @functools.wraps(worker)
    def prompt_worker(*args: Any, **kwargs: Any) -> None:
        queue = next((value for value in (*args, *kwargs.values()) if is_queue(value)), None)
        if queue is None:
            raise HostMismatch(f"{WORKER_NAME}: the host's worker was not given the queue that it takes jobs from")
        start(_with_queue(worker, args, kwargs, queue), queue)

    prompt_worker.__replaced__ = worker  # type: ignore[attr-defined]
    return prompt_worker


def calling_worker(frame: FrameType | None, is_queue: Callable[[Any], bool]) -> tuple[RunWorker, Any]:
    """The host's worker among a frame and its callers, for a host that calls it in another way than by its name.

    It is the outermost function of a module that was given the queue: what is further in may be a node pack's.

    Raises:
        HostMismatch: when there is none.
    """
    found, names = None, []
    while frame is not None:
        if not str(frame.f_globals.get("__name__")).startswith("comfy_parallel."):
            names.append(frame.f_code.co_name)
            arguments, named = _given(frame)
            queue = next((value for value in (*arguments, *named.values()) if is_queue(value)), None)
            if queue is not None and _is_modules(frame):
                found = (frame, queue)
        frame = frame.f_back
    if found is None:
        raise HostMismatch(f"{' < '.join(names[:4])}: none of these is a module's function that was given the queue")
    return worker_of(*found), found[1]


def _is_modules(frame: FrameType) -> bool:
    function = frame.f_globals.get(frame.f_code.co_name)
    return inspect.isfunction(function) and inspect.unwrap(function).__code__ is frame.f_code


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
    arguments, named = _given(frame)
    if not any(value is front for value in (*arguments, *named.values())):
        raise HostMismatch(f"{name}: the host's worker was not given the queue that it takes jobs from")

    return _with_queue(worker, arguments, named, front)


def _given(frame: FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function was called with: in order, and by name."""
    given = inspect.getargvalues(frame)
    count = frame.f_code.co_argcount  # The names after these are given by name only.
    arguments = [given.locals[argument] for argument in given.args[:count]]
    arguments += given.locals[given.varargs] if given.varargs else ()
    named = {argument: given.locals[argument] for argument in given.args[count:]}
    named |= given.locals[given.keywords] if given.keywords else {}
    return tuple(arguments), named


def _with_queue(worker: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], front: Any) -> RunWorker:
    def run(queue: Any) -> None:
        def own(value: Any) -> Any:
            return queue if value is front else value

        worker(*map(own, args), **{argument: own(value) for argument, value in named.items()})

    return run
