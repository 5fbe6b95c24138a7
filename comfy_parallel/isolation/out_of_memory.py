"""A job that runs out of memory is run once more, after its slot alone has given back all that it keeps.

What the job's nodes have computed before stays cached, so nothing is computed or saved twice.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_parallel.slots import garbage
from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attempt:
    """A run of a job. `may_repeat`: running out of memory does not end it yet."""

    may_repeat: bool
    node: str = ""  # the one that ran out of memory, when the job is to be repeated


_attempt: SlotLocal[_Attempt | None] = SlotLocal(lambda: None)


def retrying(
    execute: Callable[..., Any], unload: Callable[[], object], empty_cache: Callable[[], object]
) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.execute`. `unload` and `empty_cache` give back what the calling slot keeps."""

    @functools.wraps(execute)
    def execute_retrying(self: Any, prompt: Any, prompt_id: Any, *args: Any, **kwargs: Any) -> None:
        slot = current_slot()
        if slot is None:
            execute(self, prompt, prompt_id, *args, **kwargs)
            return
        first = _Attempt(may_repeat=True)
        _run(first, execute, self, prompt, prompt_id, *args, **kwargs)
        if not first.node:
            return
        shown_before = dict(getattr(self, "history_result", {}))
        _free(slot, first.node, prompt_id, unload, empty_cache)
        _run(_Attempt(may_repeat=False), execute, self, prompt, prompt_id, *args, **kwargs)
        _add_missing(self.history_result, shown_before)

    return execute_retrying


def _run(attempt: _Attempt, execute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    _attempt.set(attempt)
    try:
        execute(*args, **kwargs)
    finally:
        _attempt.set(None)


def _free(
    slot: Slot, node: str, prompt_id: Any, unload: Callable[[], object], empty_cache: Callable[[], object]
) -> None:
    logger.warning(
        "%s: job %s ran out of memory in %s; the slot's models, recordings and cached memory are freed, and the job"
        " runs once more",
        slot.name,
        prompt_id,
        node,
    )
    slot.stats.memory_retries += 1
    if slot.run is not None:
        slot.run.started = False  # An interrupt that came meanwhile is meant for this job, and stays.
    unload()
    garbage.collect()
    empty_cache()


def _add_missing(result: dict[str, Any], before: dict[str, Any]) -> None:
    """What nodes showed in the first run, and some hosts do not repeat for cached nodes."""
    for part, shown in before.items():
        if isinstance(shown, dict) and isinstance(result.get(part), dict):
            result[part] = {**shown, **result[part]}


def deferring(
    handle_error: Callable[..., None],
    oom_exception: type[BaseException],
    is_oom: Callable[[BaseException], bool] | None,
) -> Callable[..., None]:
    """Wrap the host's `PromptExecutor.handle_execution_error`, which tells the client and the history of a failure.

    `oom_exception`, and `is_oom` of newer hosts, say what running out of memory is.
    """

    def ran_out(error: Any) -> bool:
        known = (MemoryError,) if oom_exception is Exception else (MemoryError, oom_exception)
        return isinstance(error, known) or (is_oom is not None and isinstance(error, Exception) and is_oom(error))

    @functools.wraps(handle_error)
    def handle_execution_error(
        self: Any, prompt_id: Any, prompt: Any, current_outputs: Any, executed: Any, error: Any, ex: Any
    ) -> None:
        slot = current_slot()
        attempt = None if slot is None else _attempt.get()
        if slot is not None and attempt is not None and ran_out(ex):
            node = f"node {error['node_id']} ({prompt[error['node_id']]['class_type']})"
            if attempt.may_repeat and not (executed and _caches_nothing(self)):
                attempt.node = node
                return
            error = {**error, "exception_message": f"{error['exception_message']}\n\n{_advice(slot, attempt, node)}"}
        handle_error(self, prompt_id, prompt, current_outputs, executed, error, ex)

    return handle_execution_error


def _advice(slot: Slot, attempt: _Attempt, node: str) -> str:
    tried = (
        "It was not run again, because --cache-none keeps no results and nodes would have run twice."
        if attempt.may_repeat
        else f"All that {slot.name} keeps was freed and the job run once more, and {node} ran out of memory again."
    )
    return f"{tried} Use a smaller batch, size or model, or send the job to a slot with more memory (X-TARGET-GPU)."


def _caches_nothing(executor: Any) -> bool:
    """Whether nodes that ran would run again in a second run."""
    return getattr(getattr(executor, "cache_type", None), "name", "") == "NONE"
