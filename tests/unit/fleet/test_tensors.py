"""What participants in different processes give each other is the same to the bit."""

from __future__ import annotations

import pickle

import pytest

torch = pytest.importorskip("torch")

from comfy_parallel.fleet.tensors import Packed, packed, unpacked  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool", "uint8", "float8_e4m3fn"])
def test_tensors_are_the_same_to_the_bit(dtype: str) -> None:
    value = (torch.rand(3, 5) * 9).to(getattr(torch, dtype)).t()
    again = unpacked(packed({"samples": value, "list": [value[:0], "text"]}))
    assert again["samples"].dtype == value.dtype
    assert torch.equal(again["samples"].float(), value.float())
    assert again["list"][0].shape == value[:0].shape


def test_what_is_packed_stays_as_it_is_until_it_is_looked_at() -> None:
    once = packed([1])
    assert packed(once) is once
    assert unpacked(once) == [1]
    assert unpacked([1]) == [1]
    assert isinstance(Packed(once), bytes)


def test_it_takes_little_more_than_the_values() -> None:
    value = torch.zeros(1000)
    assert len(packed(value)) < 4200
    assert len(packed(value[:10])) < 400


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        packed(lambda: None)
