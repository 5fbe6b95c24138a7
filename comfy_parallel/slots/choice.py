"""The device that a node has chosen for what it loads, for the length of its call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_CHOSEN: ContextVar[str | None] = ContextVar("comfy_parallel_chosen_device", default=None)


@contextmanager
def loading_on(device: str | None) -> Iterator[None]:
    """What the body loads is loaded for `device`, written as torch writes it; None leaves that to the slot.

    Other threads and slots do not see it.
    """
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of the host that chooses a device: what a node has chosen comes first."""

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        chosen = _CHOSEN.get()
        if chosen is None:
            return original(*args, **kwargs)
        import torch

        return torch.device(chosen)

    return choose
