"""Which slots take part in jobs that are shared out: what a job says itself, else what was chosen for all."""

from __future__ import annotations

from typing import Any

from comfy_parallel.slots.slot import participating, slots

KEY = "participants"  # of a job's extra_data: a list of slots, or how many shares


def slots_of(extra_data: Any) -> frozenset[int] | None:
    """The slots that may compute shares of a job; None for all."""
    asked = extra_data.get(KEY) if isinstance(extra_data, dict) else None
    if isinstance(asked, list):
        return frozenset(asked)
    chosen = participating()
    return None if len(chosen) == len(slots()) else frozenset(chosen)


def count(extra_data: Any, in_all: int) -> int:
    """How many shares a job is made of whose nodes do not say; `in_all`: one for each slot."""
    asked = extra_data.get(KEY) if isinstance(extra_data, dict) else None
    if type(asked) is int:
        return asked
    chosen = slots_of(extra_data)
    return in_all if chosen is None else max(len(chosen), 1)
