"""A job has at most as many nodes as the server was told to take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfy_parallel.core import limits
from comfy_parallel.errors import TooManyNodes
from comfy_parallel.http.checks import check_prompt


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    limits.set_max_nodes(3)
    yield
    limits.set_max_nodes(limits.DEFAULT_MAX_NODES)


def test_up_to_the_limit() -> None:
    limits.check_nodes(3)
    with pytest.raises(TooManyNodes, match="4 nodes.* at most 3.*COMFY_PARALLEL_MAX_NODES"):
        limits.check_nodes(4)


def test_a_prompt_is_checked_before_its_nodes_are_looked_at() -> None:
    node = {"class_type": "KSampler", "inputs": {}}
    check_prompt({"prompt": {str(number): node for number in range(3)}})
    with pytest.raises(TooManyNodes):
        check_prompt({"prompt": {str(number): None for number in range(4)}})
