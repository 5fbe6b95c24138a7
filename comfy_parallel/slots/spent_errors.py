"""What an error keeps alive once its job has ended: the frames that it went through, and with them the job's tensors.

A node pack may keep an error, or raise one and the same object again and again: each time Python adds the new frames to
those that the error has.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator
from typing import Any

from comfy_parallel.slots.slot import current_slot

_LINKS = ("__cause__", "__context__")
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", None)  # None before Python 3.11


def drop_frames(error: BaseException) -> None:
    """Have an error, what caused it and what was handled meanwhile forget the frames that they went through."""
    for one in _chain(error):
        BaseException.with_traceback(one, None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Read as Python itself does: a class may have put something else in the place of these attributes."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if _GROUP is not None and issubclass(type(one), _GROUP):
            waiting.extend(_GROUP.exceptions.__get__(one))
        linked = (BaseException.__dict__[name].__get__(one) for name in _LINKS)
        waiting.extend(other for other in linked if other is not None)


def dropping_frames(handle_error: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's `PromptExecutor.handle_execution_error`: the error keeps no frames once the job has ended."""

    @functools.wraps(handle_error)
    def handle_execution_error(
        self: Any, prompt_id: Any, prompt: Any, current_outputs: Any, executed: Any, error: Any, ex: Any
    ) -> None:
        handle_error(self, prompt_id, prompt, current_outputs, executed, error, ex)
        slot = current_slot()
        if slot is not None and slot.run is not None and isinstance(ex, BaseException):
            slot.run.at_end.append(functools.partial(drop_frames, ex))

    return handle_execution_error
