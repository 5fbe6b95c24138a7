"""Fair shares between those who submit jobs, as a place in the queue that a job is given when it comes.

Start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, SIGCOMM 1996): a job's place is where its party's last one
ended, or the place that is served now, whichever is later. Places are on the scale of the host's job numbers, so jobs
whose number the client chose keep their meaning beside them. Pure: no lock, no clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

_LEAST_COST, _MOST_COST = 0.1, 10.0  # of a job, in jobs of average length
_WEIGHT = 0.3  # of the newest run in an average
_MOST_PARTIES = 10_000  # whose run times are remembered


class FairShare:
    """Gives places to jobs. A party whose jobs run longer than others' gets fewer turns."""

    def __init__(self) -> None:
        self._served = float("-inf")  # the place of the job that was started last
        self._ends: dict[Hashable, float] = {}
        self._seconds: dict[Hashable, float] = {}
        self._average: float | None = None

    def place(self, party: Hashable, number: float, *, is_idle: bool) -> float:
        """The place of a job of `party` that comes now.

        Args:
            number: the host's, which only grows.
            is_idle: no other job waits, so nobody can be behind.
        """
        if is_idle:
            self._served = max(self._served, number)
            self._ends.clear()
        start = max(self._served, self._ends.get(party, self._served))
        self._ends[party] = start + self._cost(party)
        return start

    def resume(self, waiting: Iterable[tuple[Hashable, float]]) -> None:
        """Jobs of these parties wait at these places, which they had before a restart."""
        for party, place in waiting:
            self._served = place if self._served == float("-inf") else min(self._served, place)
            self._ends[party] = max(self._ends.get(party, place), place) + 1.0

    def started(self, place: float) -> None:
        """A job with this place was given to a slot."""
        if place > self._served:
            self._served = place

    def ended(self, party: Hashable, seconds: float) -> None:
        """A job of `party` has run for so long."""
        before = self._seconds.pop(party, seconds)
        self._seconds[party] = before + _WEIGHT * (seconds - before)
        if len(self._seconds) > _MOST_PARTIES:
            del self._seconds[next(iter(self._seconds))]
        average = seconds if self._average is None else self._average
        self._average = average + _WEIGHT * (seconds - average)

    def _cost(self, party: Hashable) -> float:
        seconds = self._seconds.get(party)
        if seconds is None or not self._average:
            return 1.0
        return min(max(seconds / self._average, _LEAST_COST), _MOST_COST)
