"""What a job here asks of the server that sent it: the parts of a job that is shared out are gathered there.

That server keeps the job's WebSocket open. It is told there that a question waits, fetches it, and puts the answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.fleet.plain_values import decoded, encoded

TOLD = "comfy_parallel_question"  # the event
ASKS = "comfy_parallel_asks"  # in a job's extra_data: whoever sent it answers
_LOOK_S = 0.2
_ANSWER_WITHIN_S = 600.0

_lines: dict[str, Line] = {}


class Line:
    """The questions of one job that runs. `tell()` says that one waits; `check()` raises when the job is to stop."""

    def __init__(self, job_id: str, tell: Callable[[], None], check: Callable[[], None]) -> None:
        self._job_id, self._tell, self._check = job_id, tell, check
        self._one_at_a_time, self._lock = threading.Lock(), threading.Lock()
        self._number, self._question = 0, b""
        self._is_answered, self._answer = threading.Event(), b""
        _lines[job_id] = self

    def ask(self, what: str, *args: Any) -> Any:
        """The answer to a question.

        Raises:
            NotPlain: when a value in it cannot be sent.
            RuntimeError: with the reason when there is no answer.
        """
        with self._one_at_a_time:
            with self._lock:
                self._number += 1
                self._is_answered.clear()
                self._question = encoded((self._number, what, args))
            self._tell()
            self._wait()
            is_answered, answer = decoded(self._answer)
        if not is_answered:
            raise RuntimeError(f"the server that sent this job could not answer {what!r}: {answer}")
        return answer

    def _wait(self) -> None:
        deadline = time.monotonic() + _ANSWER_WITHIN_S
        while not self._is_answered.wait(_LOOK_S):
            self._check()
            if time.monotonic() > deadline:
                raise RuntimeError("the server that sent this job does not answer")

    def close(self) -> None:
        """The job has ended."""
        del _lines[self._job_id]


def question(job_id: str) -> bytes:
    """The question of this job that waits, with its number; empty when there is none."""
    line = _lines.get(job_id)
    return b"" if line is None else line._question


def answer(job_id: str, number: int, value: bytes) -> bool:
    """Answer that question; False when it does not wait any more."""
    line = _lines.get(job_id)
    if line is None:
        return False
    with line._lock:
        if number != line._number or not line._question:
            return False
        line._question, line._answer = b"", value
        line._is_answered.set()
    return True
