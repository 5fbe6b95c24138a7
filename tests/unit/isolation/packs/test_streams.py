"""A stream that a job puts in the place of `sys.stdout` is for its own slot."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from comfy_parallel.isolation.packs import streams, writes

InSlot = Callable[..., Any]


@contextlib.contextmanager
def stream() -> Iterator[io.StringIO]:
    """What `sys.stdout` is when the jobs begin."""
    made = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", made)
        patch.setattr(contextlib, "setattr", writes.set_attribute, raising=False)
        yield made
        streams.revert()
        assert sys.stdout is made


def put(stream: Any) -> Any:
    saved = sys.stdout
    writes.set_attribute(sys, "stdout", stream)
    return saved


def test_streams_are_put_back_in_any_order(in_slot: InSlot) -> None:
    first, second = io.StringIO(), io.StringIO()
    with stream() as host:
        of_first, of_second = in_slot(0, put, first), in_slot(1, put, second)
        for slot in (0, 1, None):
            in_slot(slot, print, slot)
        in_slot(0, put, of_first)
        in_slot(0, print, "back")
        in_slot(1, print, "still mine")
        in_slot(1, put, of_second)
        in_slot(1, print, "back")
    assert first.getvalue() == "0\n"
    assert second.getvalue() == "1\nstill mine\n"
    assert host.getvalue() == "None\nback\nback\n"


def test_streams_lie_on_each_other(in_slot: InSlot) -> None:
    outer, inner = io.StringIO(), io.StringIO()

    def job() -> None:
        with contextlib.redirect_stdout(outer):
            with contextlib.redirect_stdout(inner):
                print("inner")
            print("outer")
        print("host")

    with stream() as host:
        in_slot(0, job)
    assert (inner.getvalue(), outer.getvalue(), host.getvalue()) == ("inner\n", "outer\n", "host\n")


def test_the_process_s_stream_is_told_and_set_below_those_of_slots(in_slot: InSlot) -> None:
    mine, other = io.StringIO(), io.StringIO()
    with stream() as host:
        in_slot(0, put, mine)
        assert [in_slot(slot, streams.below, "stdout") for slot in (0, 1, None)] == [host] * 3
        in_slot(1, streams.put_below, "stdout", other)
        for slot in (0, 1):
            in_slot(slot, print, slot)
        in_slot(1, streams.put_below, "stdout", host)
    assert (mine.getvalue(), other.getvalue()) == ("0\n", "1\n")
