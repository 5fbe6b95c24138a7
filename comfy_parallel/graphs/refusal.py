"""Saying that a call cannot be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn


class Uncapturable(Exception):
    """This call must run eagerly; the message is a short reason, the same for every call of its kind."""


class UncapturableNow(Uncapturable):
    """The same, because of how things are at the moment."""


def refusal_of(error: BaseException) -> Uncapturable:
    """Why a step is not recorded that ran well eagerly, when recording it ended with this error.

    What an interrupt and too little memory stopped may be recorded another time.
    """
    import torch

    if isinstance(error, Uncapturable):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        refusal: Uncapturable = UncapturableNow("too little memory to record it")
    else:
        kind = Uncapturable if isinstance(error, Exception) else UncapturableNow
        refusal = kind(f"{type(error).__name__} while it was recorded")
    refusal.__cause__ = error
    return refusal


_noted: ContextVar[list[str] | None] = ContextVar("comfy_parallel_refusals", default=None)


def refuse(reason: str) -> NoReturn:
    """Raise `Uncapturable` in the middle of a forward."""
    noted = _noted.get()
    if noted is not None:
        noted.append(reason)
    raise Uncapturable(reason)


@contextmanager
def refusals_count() -> Iterator[None]:
    """Raises at the end if the body refused, even if a model's code has caught the refusal."""
    noted: list[str] = []
    token = _noted.set(noted)
    try:
        yield
    except Exception as error:
        if noted and not isinstance(error, Uncapturable):
            raise Uncapturable(noted[0]) from error
        raise
    finally:
        _noted.reset(token)
    if noted:
        raise Uncapturable(noted[0])
