"""What a worker process asks the front while its job runs, by the name of the question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_answers: dict[str, Callable[..., Any]] = {}


def answer_by(question: str, answer: Callable[..., Any]) -> None:
    """Have `answer(*args)` called for each such question, in the slot of the process that asks. It must not wait."""
    _answers[question] = answer


def is_known(question: str) -> bool:
    return question in _answers


def answer(question: str, *args: Any) -> Any:
    """The answer to a question by its name."""
    return _answers[question](*args)
