"""Values that servers give each other keep their types and bits, and cannot make the reader run code."""

from __future__ import annotations

import hashlib
import pickle
from fractions import Fraction
from typing import Any

import pytest
import torch

from comfy_parallel.core.fan_out import Plan
from comfy_parallel.core.tiles import Tile
from comfy_parallel.fleet.plain_values import NotPlain, decoded, encoded, make_known

make_known(Plan, Tile)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, 1.5, 2**70, "ü\n", [], (), {}, [1, (2, [3])], {"a": {1: (None,)}}, {1, 2}, frozenset(["x"]),
        b"", b"bytes", float("inf"), 0.1 + 0.2, {"float": "1"}, {"tensor": []}, Tile(1, 2, 3, 4, 5, 6, 7, 8),
        Plan({"a": {"inputs": {}}}, ("a",), 3, frozenset("a"), frozenset("b"), {"a": 2}),
    ],
    ids=repr,
)  # fmt: skip
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    again = decoded(encoded(value))
    assert again == value
    assert type(again) is type(value)


def test_nan_comes_back() -> None:
    (again,) = decoded(encoded([float("nan")]))
    assert again != again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 4, 4, 3), (3, 0, 2)])
def test_tensors_keep_shape_type_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).mul(100).to(dtype)
    latent = {"samples": values, "also": [values.transpose(0, -1) if len(shape) > 1 else values]}
    again = decoded(encoded(latent))
    assert again["samples"].dtype == dtype
    assert again["samples"].shape == values.shape
    assert torch.equal(again["samples"], values)
    assert torch.equal(again["also"][0], latent["also"][0])
    again["samples"].zero_()  # It can be written to.


class Own(list[int]):
    pass


@pytest.mark.parametrize("value", [object(), Fraction(1, 2), Own([1]), torch.nn.Parameter(torch.ones(1)), print])
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    with pytest.raises(NotPlain, match=r"cannot be sent to another server"):
        encoded([value])


def signed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


def test_other_bytes_are_refused() -> None:
    good = encoded([torch.ones(4), "text"])
    bad = [b"", good[:-1], good[:40], good[:-1] + b"x", pickle.dumps([1]), signed(b"\0" * 8), signed(b"\0" * 7)]
    for text in (
        '{"data":["Popen",[]]}',
        '{"tensor":["nn",[1],0,0]}',
        '{"tensor":["uint8",[4],0,4]}',
        '{"x":1}',
        '{"made":1}',
    ):
        bad.append(signed(len(text).to_bytes(8, "big") + text.encode()))
    for data in bad:
        with pytest.raises(ValueError, match="value"):
            decoded(data)
