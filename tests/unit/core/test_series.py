"""Jobs are counted by stretches of time, of which an hour is kept."""

from __future__ import annotations

from comfy_parallel.core.series import KEPT, STRETCH_S, Series, merged


def test_jobs_of_one_stretch_are_summed() -> None:
    series = Series()
    series.add(STRETCH_S + 1, 1.0, 10.0)
    series.add(2 * STRETCH_S - 1, 2.0, 20.0)
    series.add(2 * STRETCH_S, 4.0, 40.0)
    assert series.points(2 * STRETCH_S) == [(STRETCH_S, 2, 3.0, 30.0), (2 * STRETCH_S, 1, 4.0, 40.0)]


def test_no_more_than_an_hour_is_kept_however_long_it_runs() -> None:
    series = Series()
    for number in range(3 * KEPT):
        series.add(number * STRETCH_S, 0.0, 1.0)
    points = series.points(3 * KEPT * STRETCH_S)
    assert len(series._points) == KEPT
    assert [points[0][0], points[-1][0]] == [(2 * KEPT + 1) * STRETCH_S, (3 * KEPT - 1) * STRETCH_S]


def test_what_ended_long_ago_is_told_no_more() -> None:
    series = Series()
    series.add(0.0, 0.0, 1.0)
    assert series.points(KEPT * STRETCH_S) == []


def test_series_of_several_slots_are_summed() -> None:
    assert merged([[(0.0, 1, 1.0, 2.0), (20.0, 1, 1.0, 1.0)], [(20.0, 2, 3.0, 4.0)], []]) == [
        (0.0, 1, 1.0, 2.0),
        (20.0, 3, 4.0, 5.0),
    ]
