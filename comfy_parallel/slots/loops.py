"""The event loop that the host's executor runs a job in: a slot keeps it for the next job, if it is as good as new.

The host makes a loop for each job, which costs about as much as all else that the host does for a job that computes
nothing, and a dozen calls of the system, each of which lets go of the interpreter.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from comfy_parallel.slots.slot import SlotLocal, current_slot

_stock_run = asyncio.run
_LOOP_IS_NEW: dict[str, Callable[[Any], bool]] = {  # by attribute of asyncio's own loop
    "_ready": lambda ready: not ready,
    "_scheduled": lambda timers: not timers,
    "_asyncgens": lambda generators: not generators,
    "_default_executor": lambda executor: executor is None,
    "_task_factory": lambda factory: factory is None,
    "_exception_handler": lambda handler: handler is None,
    "_debug": lambda is_on: not is_on,
    "_selector": lambda selector: len(selector.get_map()) == 1,  # its own pipe, by which other threads wake it
}
_kept: SlotLocal[list[Any]] = SlotLocal(list)  # the `asyncio.Runner` for the next job, if there is one


def run(main: Coroutine[Any, Any, Any], **options: Any) -> Any:
    """As `asyncio.run`, on a slot's thread with the loop of the job before where nothing of that job is left in it.

    Where a node pack has put something in the place of `asyncio.run`, that is called.
    """
    if current_slot() is None or options or asyncio.run is not _stock_run or sys.version_info < (3, 11):
        return asyncio.run(main, **options)
    kept = _kept.get()
    runner = kept.pop() if kept else asyncio.Runner()
    try:
        asyncio.set_event_loop(runner.get_loop())
        result = runner.run(main, context=contextvars.copy_context())
    except BaseException:
        runner.close()
        raise
    if not _is_as_new(runner):
        runner.close()
        return result
    asyncio.set_event_loop(None)
    kept.append(runner)
    return result


def _is_as_new(runner: Any) -> bool:
    """Whether nothing of a job is left in its loop, and nobody refers to it who might use it later, such as a task."""
    num_references = _num_references(runner)  # before there is one more
    loop = runner.get_loop()
    return (
        num_references == _num_references_when_new()
        and type(loop) is asyncio.SelectorEventLoop
        and all(name in vars(loop) and is_new(vars(loop)[name]) for name, is_new in _LOOP_IS_NEW.items())
    )


def _num_references(runner: Any) -> int:
    asyncio.set_event_loop(None)
    return sys.getrefcount(runner.get_loop())


@functools.cache
def _num_references_when_new() -> int:
    async def nothing() -> None:
        pass

    with asyncio.Runner() as runner:
        runner.run(nothing())
        return _num_references(runner)
