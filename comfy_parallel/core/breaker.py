"""Whether a slot fails its jobs although they are not to blame: a circuit breaker for slots. Pure: no lock, no clock.

A slot that fails fast is the first to be idle again, so it would take, and fail, every job that any slot may take.
After some failures in a row it is suspended. That is also how the question is settled: its jobs go to other slots.
Where the same client's jobs of the same kind fail there too, the jobs were to blame, and the slot is resumed at once.
Otherwise it is tried with one job after a pause, and suspended for twice as long when that fails. One client's jobs of
one kind that are bound to the slot say nothing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple


class Limits(NamedTuple):
    """When a slot is suspended, and for how long. `in_a_row` 0: never. `fast_s`: a slower failure is none of these."""

    in_a_row: int = 5
    fast_s: float = 10.0
    first_pause_s: float = 10.0
    longest_pause_s: float = 600.0


class JobEnd(NamedTuple):
    """How a job ended on a slot. `kind`: what it has in common with jobs like it, and its client.

    `is_bound`: no other slot could have taken it, so none will show whether it was to blame.
    """

    slot: int
    kind: Hashable
    succeeded: bool
    ran_s: float
    is_bound: bool = False


class Suspension(NamedTuple):
    """Suspend this slot, and try it again after `pause_s`."""

    slot: int
    pause_s: float
    failures: int


@dataclass(slots=True)
class _Seen:
    """What is known of one slot since it last ran a job well."""

    kinds: set[Hashable] = field(default_factory=set)  # of the jobs that it has failed in a row
    failures: int = 0
    can_be_settled: bool = False  # Other slots may take such jobs, or several clients' jobs or kinds of jobs failed.
    failed_elsewhere: dict[Hashable, set[int]] = field(default_factory=dict)
    pause_s: float = 0.0
    is_suspended: bool = False
    is_tried: bool = False


class Breaker:
    """Decides by how jobs end; it is told of every end, with the slots that take jobs."""

    def __init__(self, limits: Limits, num_slots: int) -> None:
        self._limits = limits
        self._seen = [_Seen() for _ in range(num_slots)]

    def ended(self, end: JobEnd, open_slots: Collection[int]) -> tuple[Suspension | None, list[int]]:
        """The slot to suspend, and those to resume because their jobs were to blame."""
        if not self._limits.in_a_row:
            return None, []
        self._note_elsewhere(end)
        cleared = [slot for slot, seen in enumerate(self._seen) if seen.is_suspended and self._is_cleared(slot)]
        for slot in cleared:
            self._seen[slot] = _Seen()
        if end.succeeded:
            self._seen[end.slot] = _Seen()
        elif end.ran_s <= self._limits.fast_s:
            return self._failed(end, open_slots), cleared
        return None, cleared

    def tried(self, slot: int) -> None:
        """A suspended slot takes jobs again; its next one decides."""
        self._seen[slot].is_suspended, self._seen[slot].is_tried = False, True

    def again(self, slot: int) -> float:
        """A suspended slot could not be tried; the seconds to the next time."""
        return self._longer(self._seen[slot])

    def _failed(self, end: JobEnd, open_slots: Collection[int]) -> Suspension | None:
        seen = self._seen[end.slot]
        seen.failures += 1
        seen.kinds.add(end.kind)
        seen.can_be_settled = seen.can_be_settled or not end.is_bound or len(seen.kinds) > 1
        is_enough = seen.is_tried or seen.failures >= self._limits.in_a_row
        others = [slot for slot in open_slots if slot != end.slot]
        if not is_enough or not seen.can_be_settled or not others or self._is_cleared(end.slot):
            return None
        seen.is_suspended, seen.is_tried = True, False
        return Suspension(end.slot, self._longer(seen), seen.failures)

    def _longer(self, seen: _Seen) -> float:
        seen.pause_s = min(2 * seen.pause_s, self._limits.longest_pause_s) or self._limits.first_pause_s
        return seen.pause_s

    def _note_elsewhere(self, end: JobEnd) -> None:
        for slot, seen in enumerate(self._seen):
            if slot == end.slot or end.kind not in seen.kinds:
                continue
            if end.succeeded:
                seen.failed_elsewhere.pop(end.kind, None)
            else:
                seen.failed_elsewhere.setdefault(end.kind, set()).add(end.slot)

    def _is_cleared(self, slot: int) -> bool:
        """Whether all that it failed has failed on two other slots as well, or on the only other one."""
        seen = self._seen[slot]
        enough = min(2, len(self._seen) - 1)
        return bool(seen.kinds) and all(len(seen.failed_elsewhere.get(kind, ())) >= enough for kind in seen.kinds)
