"""Weights side by side, with the CPU as the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, copies, homes, loads
from comfy_parallel.weights.gpu.homes import Home
from tests.fakes import make_slots
from tests.unit.weights.device import Driver, stand_in_driver, stand_in_stream
from tests.unit.weights.samples import bits, collect, model_of, numbers, read, slots_store, write

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
SHAPES = ((3,), (2, 5), (1,), (256,), (), (7, 1, 3), (64,), (64, 4), (8, 8), (300,))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in_driver(monkeypatch)


@pytest.fixture
def slot() -> Slot:
    return make_slots("cuda:0")[0]


@pytest.fixture
def store(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    stand_in_stream(monkeypatch)
    store = slots_store(monkeypatch)
    yield store
    collect()
    store.drop_unused()


def written(store: Store, path: Path, *weights: Any, is_inference: bool = False) -> nn.Module:
    """A module with these weights, which are read from a file."""
    views = read(store, write(path, **{f"{number:03}": weight for number, weight in enumerate(weights)}))
    with torch.inference_mode(is_inference):
        return model_of(store, views)


def sample(dtype: Any = torch.float32) -> list[Any]:
    return [numbers(*shape, dtype=dtype, start=float(i)) for i, shape in enumerate(SHAPES)]


def load(store: Store, model: nn.Module, slot: Slot) -> list[Any]:
    """What lies on the device."""
    with entered(slot), copies.complete():
        loads.load_whole(store, pairs_of(model), CPU)
    return [parameter.data for parameter in model.parameters()]


def pairs_of(model: nn.Module) -> list[tuple[Any, Home]]:
    return [(parameter, Home(parameter.data)) for parameter in model.parameters()]


def blocks_of(model: nn.Module) -> list[blocks.Block]:
    return list(blocks.blocks(pairs_of(model)))


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8], ids=str)
def test_each_copy_is_like_its_weight(store: Store, tmp_path: Path, slot: Slot, dtype: Any, is_inference: bool) -> None:
    weights = sample(dtype)
    model = written(store, tmp_path / "a.safetensors", *weights, is_inference=is_inference)
    made = load(store, model, slot)
    for weight, copy in zip(weights, made, strict=True):
        assert bits(copy) == bits(weight)
        assert (copy.dtype, copy.shape, copy.stride()) == (weight.dtype, weight.shape, weight.stride())
        assert copy.is_inference() == is_inference
    assert len({copy.untyped_storage().data_ptr() for copy in made}) == 1
    assert all(homes.home_of(parameter) is not None for parameter in model.parameters())


def test_kinds_of_weights_do_not_mix(store: Store, tmp_path: Path, slot: Slot) -> None:
    weights = [weight for pair in zip(sample(), sample(torch.float16), strict=True) for weight in pair]
    made = load(store, written(store, tmp_path / "a.safetensors", *weights), slot)
    assert [bits(copy) for copy in made] == [bits(weight) for weight in weights]
    assert len({copy.untyped_storage().data_ptr() for copy in made}) == 2


def test_each_begins_where_kernels_expect_it(store: Store, tmp_path: Path, slot: Slot) -> None:
    made = load(store, written(store, tmp_path / "a.safetensors", *sample(torch.float16)), slot)
    assert {(copy.data_ptr() - copy.untyped_storage().data_ptr()) % 256 for copy in made} == {0}


def test_what_follows_without_a_gap_is_one_copy(store: Store, tmp_path: Path) -> None:
    (block,) = blocks_of(written(store, tmp_path / "a.safetensors", *(numbers(64, 3) for _ in range(9))))
    assert len(block.parameters) == 9
    assert [span.shape for span in block.stretches] == [(9 * 64 * 3 * 4,)]
    (block,) = blocks_of(written(store, tmp_path / "b.safetensors", numbers(64), numbers(3), numbers(64), numbers(64)))
    assert [span.shape for span in block.stretches] == [(256 + 12,), (512,)]


def test_a_block_has_a_limit(store: Store, tmp_path: Path, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_LARGEST", 1000)
    weights = [numbers(100, start=float(i)) for i in range(7)] + [numbers(500)] + [numbers(10), numbers(11)]
    model = written(store, tmp_path / "a.safetensors", *weights)
    assert [len(block.parameters) for block in blocks_of(model)] == [2, 2, 2, 1, 1, 2]
    assert [bits(copy) for copy in load(store, model, slot)] == [bits(weight) for weight in weights]


@pytest.mark.parametrize("refused", [{0}, {1}, set(range(100))], ids=str)
def test_what_the_driver_refuses_goes_through_buffers(
    store: Store, driver: Driver, tmp_path: Path, slot: Slot, refused: set[int]
) -> None:
    driver.refused = refused
    weights = [*sample(), numbers(5000), *sample()]
    made = load(store, written(store, tmp_path / "a.safetensors", *weights), slot)
    assert [bits(copy) for copy in made] == [bits(weight) for weight in weights]
    counted = copies.bytes_from(slot)
    assert counted["staged"] > 0
    assert counted["staged"] + counted["pinned"] >= sum(weight.nbytes for weight in weights)


def test_blocks_of_the_same_bytes_in_the_same_places_are_alike(store: Store, tmp_path: Path) -> None:
    weights = sample()
    pairs = pairs_of(written(store, tmp_path / "a.safetensors", *weights))
    (one,) = blocks.blocks(pairs)
    (again,) = blocks_of(written(store, tmp_path / "b.safetensors", *weights))
    assert one.layout == again.layout
    for others in (pairs[1:], pairs[:-1], pairs[:3] + pairs[4:]):
        assert blocks.Block(others).layout != one.layout


def test_a_weight_alone_is_in_no_block(store: Store, tmp_path: Path, slot: Slot) -> None:
    (alone,) = load(store, written(store, tmp_path / "a.safetensors", numbers(5)), slot)
    assert not blocks.is_in_one(alone)
    made = load(store, written(store, tmp_path / "b.safetensors", *sample()), slot)
    assert all(map(blocks.is_in_one, made))


class Wrapped(torch.Tensor):
    """As quantized weights are in newer hosts: it has no memory of its own."""

    @staticmethod
    def __new__(cls) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls() if func is torch.ops.aten.detach.default else NotImplemented


@pytest.mark.parametrize("weight", [Wrapped(), torch.eye(3).to_sparse()], ids=["wrapped", "sparse"])
def test_a_special_weight_is_in_no_block(weight: Any) -> None:
    assert not blocks.is_in_one(nn.Parameter(weight, requires_grad=False))


# Seals.


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 8 * 4096, 8 * 4096 * 3 + 8 * 5 + 3])
def test_equal_bytes_have_equal_seals(size: int) -> None:
    memory = torch.randint(256, (size,), dtype=torch.uint8)
    assert torch.equal(blocks.seal(memory), blocks.seal(memory.clone()))


@pytest.mark.parametrize("place", [0, 5000, 16383, 32768, 65600])
def test_a_bit_that_changes_breaks_the_seal(place: int) -> None:
    memory = torch.randn(65601, dtype=torch.float32)
    before = blocks.seal(memory)
    memory.view(torch.int32)[place] ^= 1
    assert not torch.equal(blocks.seal(memory), before)


def swap_rows(memory: Any) -> None:
    memory.copy_(memory.view(8, -1).flip(0).reshape(-1))


def swap_columns(memory: Any) -> None:
    memory.copy_(memory.view(8, -1).flip(1).reshape(-1))


@pytest.mark.parametrize(
    "change", [torch.neg_, torch.zero_, swap_rows, swap_columns], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_numbers_that_are_only_moved_or_turned_over_break_the_seal(change: Any, dtype: Any) -> None:
    memory = torch.randint(-100, 100, (8 * 32768,)).to(dtype)
    before = blocks.seal(memory)
    change(memory)
    assert not torch.equal(blocks.seal(memory), before)
