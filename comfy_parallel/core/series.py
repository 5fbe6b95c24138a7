"""How many jobs ended in each stretch of time, and how long they had waited and ran: the last ones only."""

from __future__ import annotations

from collections import deque

STRETCH_S = 20.0
KEPT = 180  # stretches: an hour

Point = tuple[float, int, float, float]  # begin in seconds, jobs, seconds waited, seconds run


class Series:
    """Sums per stretch of time; stretches in which nothing ended take no memory."""

    __slots__ = ("_points",)

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=KEPT)

    def add(self, now_s: float, waited_s: float, ran_s: float) -> None:
        """Count a job that ends now. Times do not go back from call to call."""
        begin = now_s // STRETCH_S * STRETCH_S
        last = self._points[-1] if self._points else None
        if last is not None and last[0] == begin:
            self._points[-1] = (begin, last[1] + 1, last[2] + waited_s, last[3] + ran_s)
        else:
            self._points.append((begin, 1, waited_s, ran_s))

    def points(self, now_s: float) -> list[Point]:
        """The stretches of the last hour in which jobs ended, oldest first."""
        return [point for point in tuple(self._points) if point[0] > now_s - KEPT * STRETCH_S]


def merged(many: list[list[Point]]) -> list[Point]:
    """The sums over several series."""
    sums: dict[float, Point] = {}
    for begin, jobs, waited_s, ran_s in (point for points in many for point in points):
        _, other_jobs, other_waited_s, other_ran_s = sums.get(begin, (begin, 0, 0.0, 0.0))
        sums[begin] = (begin, jobs + other_jobs, waited_s + other_waited_s, ran_s + other_ran_s)
    return sorted(sums.values())
