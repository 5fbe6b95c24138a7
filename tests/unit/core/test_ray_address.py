"""Addresses of Ray clusters."""

from __future__ import annotations

import pytest

from comfy_parallel.core.ray_address import RayAddress, parse
from comfy_parallel.errors import ConfigError


def test_an_address_may_say_how_many_slots_it_is() -> None:
    assert parse("") is None
    assert parse("auto") == RayAddress("auto")
    assert parse("10.0.0.2:6379#slots=16") == RayAddress("10.0.0.2:6379", 16)
    assert parse("[fd00::2]:6379") == RayAddress("[fd00::2]:6379")


@pytest.mark.parametrize(
    "value", ["10.0.0.2", "yes", "ray://10.0.0.2:10001", "http://a:1", "auto#slots=0", "auto#slots=513", "auto,a:1"]
)
def test_what_is_no_address_is_refused_with_an_example(value: str) -> None:
    with pytest.raises(ConfigError, match=r"COMFY_PARALLEL_RAY=.* write auto, or host:port"):
        parse(value)
