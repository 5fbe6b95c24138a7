"""What the nodes say of inputs that settle how a job is shared out."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from comfy_parallel.nodes.parallel.kinds import known_before


class Node:
    """As the host looks at it."""

    VALIDATE_INPUTS = known_before(participants=(0, 64), load_balance=None)


def test_the_host_finds_the_names() -> None:
    names = inspect.getfullargspec(Node.VALIDATE_INPUTS).args
    assert names == ["cls", "participants", "load_balance", "enabled_worker_ids", "participant"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, True),
        ({"participants": [3], "load_balance": [False], "enabled_worker_ids": ["[]"]}, True),
        ({"participants": 3}, True),
        ({"enabled_worker_ids": [["1", "2"]]}, True),
        ({"participants": (None,)}, "participants is connected"),
        ({"load_balance": (None,)}, "load_balance is connected"),
        ({"enabled_worker_ids": (None,)}, "enabled_worker_ids is connected"),
        ({"participants": [-1]}, "participants is -1; write a number from 0 to 64"),
        ({"participants": [65], "participant": [3]}, True),  # a share of a job that was checked
        ({"participants": [65]}, "participants is 65; write a number from 0 to 64"),
        ({"enabled_worker_ids": ["1, 2"]}, "enabled_worker_ids is '1, 2'"),
    ],
)
def test_what_it_says(given: dict[str, Any], said: Any) -> None:
    found = Node.VALIDATE_INPUTS(**given)
    assert found is True if said is True else said in found
