"""The table of what test files cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests import costs


def report(nodeid: str, when: str, duration: float, *starts: float) -> Any:
    properties = [(costs.STARTS, seconds) for seconds in starts]
    return SimpleNamespace(nodeid=nodeid, when=when, duration=duration, user_properties=properties)


def test_the_longest_file_is_first_and_starts_are_counted_once() -> None:
    reports = [
        report("a.py::one", "setup", 1.0),
        report("a.py::one", "call", 2.0),
        report("b.py::one", "setup", 5.0, 4.0),
        report("b.py::one", "call", 1.0, 4.0),
        report("b.py::one", "teardown", 1.0, 4.0, 2.0),
    ]
    assert list(costs.table(reports)) == [
        "    7.0 s    2 hosts started in    6.0 s  b.py",
        "    3.0 s    0 hosts started in    0.0 s  a.py",
        "   10.0 s    2 hosts started in    6.0 s  all files",
    ]


def test_what_was_started_is_told_once() -> None:
    costs.started[:] = [3.0, 4.0]
    assert costs.take_starts() == [(costs.STARTS, 3.0), (costs.STARTS, 4.0)]
    assert costs.take_starts() == []
