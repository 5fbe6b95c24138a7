"""How long jobs of a kind run, and how fast each slot is, learnt from jobs that have ended. Pure: no lock, no clock.

A job's seconds are taken as those of its kind times a factor of its slot. Both follow what is measured slowly, so one
job that was disturbed changes little.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence

_NEW = 0.3  # the weight of a new measurement
_MOST_KINDS = 1000
_ENOUGH = 6  # measurements of a slot before its factor is relied upon
_UNEQUAL = 1.25  # Slots whose factors differ by less are taken as equal.
_SURE = 8.0  # standard errors by which factors differ beyond that; of many slots the two farthest are compared
_SHORTEST_S = 0.1  # A shorter run has found its results in the cache.


class Paces:
    """What is known of all slots. Factors: 1.0 is the mean of all, 2.0 takes twice as long."""

    def __init__(self, num_slots: int) -> None:
        self._factors = [0.0] * num_slots  # logarithms
        self._counts = [0] * num_slots
        self._noise = 0.0  # the mean square of what the newest measurements were beside the expected
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()  # by kind, logarithms, of a slot of factor 1

    def note(self, slot: int, kind: Hashable, seconds: float) -> None:
        """A job of this kind has succeeded on a slot after so many seconds."""
        if seconds < _SHORTEST_S:
            return
        measured = math.log(seconds)
        known = self._seconds.pop(kind, None)
        if known is None:
            self._seconds[kind] = measured - self._factors[slot]
            if len(self._seconds) > _MOST_KINDS:
                self._seconds.popitem(last=False)
            return
        rest = measured - known - self._factors[slot]
        self._seconds[kind] = known + _NEW * rest / 2
        self._counts[slot] += 1
        self._noise += max(_NEW / 2, 1 / sum(self._counts)) * (rest * rest - self._noise)
        self._factors[slot] += _NEW * rest / 2
        mean = sum(self._factors) / len(self._factors)
        self._factors = [factor - mean for factor in self._factors]

    @property
    def are_unequal(self) -> bool:
        """Whether some slots are known to be so much faster than others that it matters where a job runs."""
        known = self._known()
        return len(known) > 1 and max(known) - min(known) > math.log(_UNEQUAL) + _SURE * self._error

    def factors(self) -> Sequence[float]:
        """One for each slot; 1.0 for those that are not known well."""
        return [math.exp(f) if count >= _ENOUGH else 1.0 for f, count in zip(self._factors, self._counts, strict=True)]

    def seconds(self, kind: Hashable) -> float | None:
        """What a job of this kind takes on a slot of factor 1; None when none has ended."""
        known = self._seconds.get(kind)
        return None if known is None else math.exp(known)

    @property
    def _error(self) -> float:
        """The standard error of a slot's factor, which follows its measurements with the weight `_NEW / 2`."""
        return math.sqrt(self._noise * _NEW / 2 / (2 - _NEW / 2))

    def _known(self) -> list[float]:
        return [factor for factor, count in zip(self._factors, self._counts, strict=True) if count >= _ENOUGH]
