"""Durations are counted by bounds, each with all below it."""

from __future__ import annotations

from comfy_parallel.core.histogram import BOUNDS_S, Histogram


def test_a_duration_counts_for_its_bound_and_all_above() -> None:
    histogram = Histogram()
    for seconds in (0.1, 0.2, 99999.0):
        histogram.add(seconds)
    rows = dict(histogram.cumulative())
    assert (rows["0.1"], rows["0.25"], rows[str(BOUNDS_S[-1])], rows["+Inf"]) == (1, 2, 2, 3)
    assert histogram.sum_s == 0.1 + 0.2 + 99999.0
