"""Jobs that leave a slot's cached outputs as they are, such as those that load files ahead.

The host's cache forgets, before a job runs, whatever that job does not use. After such a job the slot's client
would compute everything again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from comfy_parallel.slots.slot import SlotLocal, current_slot

_keeping: set[str] = set()
_cached_for: SlotLocal[Any] = SlotLocal(object)  # The client whose job's outputs the slot has; at first nobody's.


def keep_during(prompt_id: str) -> None:
    """Have the job with this id add to what its slot has cached, and take nothing away. Call it before it is queued."""
    _keeping.add(prompt_id)


def is_kept(prompt_id: Any) -> bool:
    """Whether the job that its slot runs now takes nothing away from what is cached."""
    return prompt_id in _keeping


def keeping_outputs(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.execute`."""

    @functools.wraps(execute)
    def execute_keeping(self: Any, prompt: Any, prompt_id: Any, *args: Any, **kwargs: Any) -> Any:
        slot = current_slot()
        if slot is None:
            return execute(self, prompt, prompt_id, *args, **kwargs)
        if prompt_id not in _keeping:
            _cached_for.set(slot.last_client_id)
            return execute(self, prompt, prompt_id, *args, **kwargs)
        with _nothing_forgotten(self.caches.all):
            try:
                return execute(self, prompt, prompt_id, *args, **kwargs)
            finally:
                _keeping.discard(prompt_id)
                slot.last_client_id = _cached_for.get()  # Its next job still belongs here.

    return execute_keeping


@contextmanager
def _nothing_forgotten(caches: Iterable[Any]) -> Iterator[None]:
    kept = list(caches)
    for cache in kept:
        cache.clean_unused = lambda: None
    try:
        yield
    finally:
        for cache in kept:
            del cache.clean_unused
