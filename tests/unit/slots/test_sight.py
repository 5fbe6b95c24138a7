"""What a run has told last is kept, whatever shape nodes give it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.slots.sight import Sight

PICTURE = SimpleNamespace(save=None)


def test_a_job_that_has_told_nothing() -> None:
    sight = Sight()
    assert (sight.node, sight.step, sight.nodes_done, sight.image, sight.number) == (None, None, 0, None, 0)


def test_the_running_nodes_progress() -> None:
    sight = Sight()
    sight.note("execution_cached", {"nodes": ["1", "2"]})
    sight.note("progress_state", {"nodes": {"2": {"state": "finished"}, "3": {"state": "running"}}})
    assert (sight.node, sight.step, sight.nodes_done) == ("3", None, 2)
    sight.note("progress", {"value": 3, "max": 20, "node": "3"})
    assert (sight.node, sight.step) == ("3", (3, 20))


def test_the_progress_of_a_node_that_has_ended_is_not_that_of_the_next() -> None:
    sight = Sight()
    sight.note("progress", {"value": 20, "max": 20, "node": "3"})
    sight.note("progress_state", {"nodes": {"3": {"state": "finished"}, "4": {"state": "running"}}})
    assert (sight.node, sight.step, sight.nodes_done) == ("4", None, 1)


def test_previews_of_both_kinds_are_numbered() -> None:
    sight = Sight()
    sight.note(2, ("JPEG", PICTURE, 512))
    assert (sight.image, sight.number) == ((PICTURE, 512), 1)
    sight.note(4, (("PNG", PICTURE, None), {"node_id": "3"}))
    assert (sight.image, sight.number) == ((PICTURE, None), 2)


@pytest.mark.parametrize("data", [None, 1, "text", [], {}, {"nodes": 1}, {"nodes": {"1": None}}, {"value": "x"}, b"x"])
def test_what_nodes_send_in_other_shapes_is_no_progress(data: Any) -> None:
    sight = Sight()
    for event in ("progress", "progress_state", "execution_cached", 2, 4):
        sight.note(event, data)
    assert (sight.step, sight.nodes_done, sight.image) == (None, 0, None)


@pytest.mark.parametrize(("value", "most"), [(1, 0), (None, 2), (1, "2"), (float("nan"), 2), (1, -1)])
def test_progress_that_is_no_part_of_a_whole_is_left_out(value: Any, most: Any) -> None:
    sight = Sight()
    sight.note("progress", {"value": value, "max": most, "node": "3"})
    assert (sight.node, sight.step) == ("3", None)
