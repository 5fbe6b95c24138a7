"""What each test file costs: a table at the end of a run, by which tests/order.py has the longest start first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

SHOWN = 30
STARTS = "seconds that a host took to start"  # a test's property, which pytest-xdist brings along

started: list[float] = []  # of hosts that started since it was last looked


def take_starts() -> list[tuple[str, float]]:
    """The hosts that a test has started, as properties of its report."""
    taken = [(STARTS, seconds) for seconds in started]
    started.clear()
    return taken


def table(reports: Iterable[Any]) -> Iterator[str]:
    """One line for each of the longest files: its seconds, the hosts that it started, and how long these took.

    A host that several files share counts for the first.
    """
    seconds: dict[str, float] = defaultdict(float)
    starts: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        file = report.nodeid.partition("::")[0]
        seconds[file] += report.duration
        if report.when == "teardown":
            starts[file] += [value for name, value in report.user_properties if name == STARTS]
    for file in sorted(seconds, key=lambda name: -seconds[name])[:SHOWN]:
        yield f"{seconds[file]:7.1f} s  {len(starts[file]):3} hosts started in {sum(starts[file]):6.1f} s  {file}"
    every = [one for of_file in starts.values() for one in of_file]
    yield f"{sum(seconds.values()):7.1f} s  {len(every):3} hosts started in {sum(every):6.1f} s  all files"
