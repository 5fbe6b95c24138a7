"""The device that a node has chosen for what it loads, for the length of its call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_CHOSEN: ContextVar[str | None] = ContextVar("comfy_parallel_chosen_device", default=None)
_OFFLOAD: ContextVar[str | None] = ContextVar("comfy_parallel_chosen_offload_device", default=None)


@contextmanager
def loading_on(device: str | None, offload: str | None = None) -> Iterator[None]:
    """What the body loads is loaded for `device` and waits on `offload`, written as torch writes them.

    None leaves that to the slot. Other threads and slots do not see it.
    """
    token, other = _CHOSEN.set(device), _OFFLOAD.set(offload)
    try:
        yield
    finally:
        _OFFLOAD.reset(other)
        _CHOSEN.reset(token)


def instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of the host that chooses a device: what a node has chosen comes first."""
    return _instead_of(original, _CHOSEN)


def instead_of_offload(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the device where weights wait."""
    return _instead_of(original, _OFFLOAD)


def _instead_of(original: Callable[..., Any], choice: ContextVar[str | None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        chosen = choice.get()
        if chosen is None:
            return original(*args, **kwargs)
        import torch

        return torch.device(chosen)

    return choose
