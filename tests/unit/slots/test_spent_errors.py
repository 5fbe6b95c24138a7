"""Errors of jobs that have ended keep no frames."""

from __future__ import annotations

import builtins
import weakref
from typing import Any, NoReturn

import pytest

from comfy_parallel.slots.slot import Run, entered
from comfy_parallel.slots.spent_errors import drop_frames, dropping_frames
from tests.fakes import make_slots


class Tensor:
    pass


class Odd(Exception):
    """Whoever asks it for what it holds gets an error."""

    @property
    def __traceback__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError

    __cause__ = __context__ = __traceback__  # type: ignore[assignment]


def raised(error: BaseException, *, cause: BaseException | None = None) -> weakref.ref[Tensor]:
    """Raise it in a frame that has a tensor, while another error is handled."""

    def node() -> None:
        kept.append(Tensor())
        tensor = kept.pop()
        made.append(weakref.ref(tensor))
        try:
            raise KeyError(tensor is None)
        except KeyError:
            raise error from cause

    kept: list[Tensor] = []
    made: list[weakref.ref[Tensor]] = []
    with pytest.raises(BaseException) as caught:
        node()
    del caught
    return made[0]


@pytest.mark.parametrize("error", [ValueError("a"), SystemExit(1), Odd("b")])
def test_it_lets_go_of_the_frames_of_all_its_ends(error: BaseException) -> None:
    tensors = [raised(error) for _ in range(3)]
    drop_frames(error)
    assert [tensor() for tensor in tensors] == [None] * 3


def test_so_do_its_causes_and_the_parts_of_a_group_also_in_a_circle() -> None:
    first, second = ValueError("first"), ValueError("second")
    tensors = [raised(first, cause=second), raised(second, cause=first)]
    kind: Any = getattr(builtins, "ExceptionGroup", None)  # None before Python 3.11
    group = ValueError("no group") if kind is None else kind("both", [first, ValueError("third")])
    tensors.append(raised(group, cause=first))
    drop_frames(group)
    assert [tensor() for tensor in tensors] == [None] * 3


def test_the_frames_are_there_until_the_job_has_ended() -> None:
    (slot,) = make_slots("cpu")
    error = ValueError("a")
    tensor = raised(error)
    handle = dropping_frames(lambda *args: None)
    with entered(slot):
        slot.begin_run(Run("job"), 0.0)
        handle(None, "job", {}, [], [], {}, error)
        assert tensor() is not None
        slot.end_run({"status_str": "error"})
    assert tensor() is None
