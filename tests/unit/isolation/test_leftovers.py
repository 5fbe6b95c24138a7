"""What a job leaves is ascribed to it, put back, and never at the cost of one that still runs."""

from __future__ import annotations

import pytest

from comfy_parallel.isolation.leftovers import ABSENT, UNREADABLE, Leftover, OwnSettings, SharedSettings


class Process(dict[str, int]):
    def set_to(self, name: str, value: int) -> int:
        if value is ABSENT:
            self.pop(name, None)
        else:
            self[name] = value
        return value


@pytest.fixture
def process() -> Process:
    return Process(a=1, b=2)


@pytest.fixture
def shared(process: Process) -> SharedSettings:
    return SharedSettings(lambda: process, process.set_to)


def test_a_jobs_change_is_put_back_and_told(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    process["a"] = 5
    assert shared.end("first") == [Leftover("a", 5, 1)]
    assert process == {"a": 1, "b": 2}
    shared.begin("second")
    assert shared.end("second") == []


def test_what_was_added_or_taken_away_too(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    process["new"] = 1
    del process["b"]
    assert {one.name for one in shared.end("first")} == {"new", "b"}
    assert process == {"a": 1, "b": 2}


def test_what_a_job_puts_back_itself_is_not_told(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    process["a"] = 5
    shared.begin("second")
    process["a"] = 1
    assert shared.end("first") == shared.end("second") == []


def test_a_change_between_jobs_is_the_servers_and_stays(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    shared.end("first")
    process["a"] = 7
    shared.begin("second")
    process["b"] = 3
    assert shared.end("second") == [Leftover("b", 3, 2)]
    assert process == {"a": 7, "b": 2}


def test_the_end_of_one_does_not_undo_what_another_did_for_as_long_as_it_runs(
    process: Process, shared: SharedSettings
) -> None:
    shared.begin("keeps")
    process["a"] = 5  # seen when the next begins, so it is this job's for sure
    shared.begin("other")
    assert shared.end("other") == []
    assert process["a"] == 5
    assert shared.end("keeps") == [Leftover("a", 5, 1)]


def test_where_two_may_have_done_it_both_are_waited_for(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    shared.begin("second")
    process["a"] = 5
    assert shared.end("first") == []
    shared.begin("third")  # It began after the change: nobody waits for it.
    assert shared.end("second") == [Leftover("a", 5, 1, was_sure=False)]
    assert process["a"] == 1
    assert shared.end("third") == []


def test_two_that_set_the_same_leave_what_was_there_before_both(process: Process, shared: SharedSettings) -> None:
    shared.begin("first")
    process["a"] = 5
    shared.begin("second")
    process["a"] = 6
    assert shared.end("first") == []
    assert [(one.value, one.before) for one in shared.end("second")] == [(6, 1)]
    assert process["a"] == 1


def test_what_cannot_be_put_back_costs_no_job_its_end(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str, value: int) -> int:
        raise OSError("gone")

    shared = SharedSettings(lambda: process, refuse)
    shared.begin("first")
    process["a"] = 5
    assert [one.name for one in shared.end("first")] == ["a"]
    assert "cannot be put back" in caplog.text


def test_the_threads_own_settings(process: Process) -> None:
    own = OwnSettings(lambda: dict(process), process.set_to)
    own.begin()
    process["a"] = 9
    assert own.end() == [Leftover("a", 9, 1)]
    assert process["a"] == 1


def test_what_stays_is_left_and_not_told(process: Process) -> None:
    shared = SharedSettings(lambda: process, process.set_to, lambda name, before, value: name == "a" and value == 5)
    shared.begin("first")
    process["a"], process["b"] = 5, 6
    assert [one.name for one in shared.end("first")] == ["b"]
    assert process == {"a": 5, "b": 2}
    shared.begin("second")
    process["a"] = 7
    assert shared.end("second") == [Leftover("a", 7, 5)]


def test_what_can_no_longer_be_read_is_put_back_and_what_never_could_is_left(process: Process) -> None:
    process["b"] = UNREADABLE
    shared = SharedSettings(lambda: process, process.set_to)
    shared.begin("first")
    process["a"], process["b"] = UNREADABLE, 4
    assert [one.name for one in shared.end("first")] == ["a"]
    assert process == {"a": 1, "b": 4}


def test_what_putting_back_leaves_as_it_was_is_not_told(process: Process) -> None:
    shared = SharedSettings(lambda: process, lambda name, value: process[name])
    shared.begin("first")
    process["a"] = 5
    assert shared.end("first") == []


def test_the_threads_own_settings_that_cannot_be_put_back(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str, value: int) -> None:
        raise OSError("gone")

    own = OwnSettings(lambda: dict(process), refuse)
    own.begin()
    process["a"] = 9
    assert [one.name for one in own.end()] == ["a"]
    assert "cannot be put back" in caplog.text


def test_the_next_job_begins_with_what_was_seen_at_the_end_of_the_last_one(process: Process) -> None:
    looks: list[int] = []

    def read() -> Process:
        looks.append(1)
        return Process(process)

    shared, own = SharedSettings(read, process.set_to), OwnSettings(read, process.set_to)
    for is_fresh in (False, True, True):
        shared.begin("a", is_fresh=is_fresh)
        own.begin(is_fresh=is_fresh)
        assert (shared.end("a"), own.end()) == ([], [])
    assert len(looks) == 2 + 2 * 3
    shared.begin("b", is_fresh=True)
    own.begin(is_fresh=True)
    process["a"] = 5
    assert (own.end(), shared.end("b")) == ([Leftover("a", 5, 1)], [])
    own.begin(is_fresh=True)  # What was put back is looked at anew.
    assert own.end() == []
