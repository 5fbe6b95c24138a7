"""What the client of a job hears of its shares."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.shares import Share

SHARE = Share("job", 2, 4)
MARK = {"prompt_id": "job", "gpu_id": 1, "participant": 2, "participants": 4}


@pytest.mark.parametrize(
    "event", ["execution_start", "execution_cached", "executing", "executed", "execution_success", "execution_error", 1]
)
def test_the_life_of_a_share_is_not_told(event: Any) -> None:
    assert SHARE.told(event, {"prompt_id": "child", "node": None}, 1) is None


def test_progress_and_previews_carry_the_participant() -> None:
    assert SHARE.told("progress", {"prompt_id": "child", "value": 1}, 1) == {"value": 1, **MARK}
    state = {"prompt_id": "child", "nodes": {"3": {"prompt_id": "child", "value": 1}}}
    assert SHARE.told("progress_state", state, 1) == {**MARK, "nodes": {"3": {"prompt_id": "job", "value": 1}}}
    assert SHARE.told(4, ("image", {"prompt_id": "child", "node_id": "3"}), 1) == ("image", {"node_id": "3", **MARK})


def test_what_names_no_job_is_passed_on() -> None:
    assert SHARE.told("status", {"status": {}}, 1) == {"status": {}}
    assert SHARE.told("a pack's", [1], 1) == [1]
