"""Small weights side by side, with the CPU as the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.weights import packs
from comfy_parallel.weights.homes import Home
from comfy_parallel.weights.packs import Pack
from comfy_parallel.weights.store import Store
from tests.unit.weight_device import stand_in_stream
from tests.unit.weight_samples import bits, collect, numbers, read, slots_store, write

pytestmark = pytest.mark.timeout(30)

META = torch.device("meta")
SHAPES = ((3,), (2, 5), (1,), (128,), (), (7, 1, 3))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    stand_in_stream(monkeypatch)
    store = slots_store(monkeypatch)
    yield store
    collect()
    store.drop_unused()


def shared(store: Store, path: Path, dtype: Any, *, is_inference: bool = False) -> list[Any]:
    """Tensors of a file that all slots share."""
    weights = {f"{i}": numbers(*shape, dtype=dtype, start=float(i)) for i, shape in enumerate(SHAPES)}
    views = read(store, write(path, **weights))
    with torch.inference_mode(is_inference):
        return [store.shared(views[name], dtype, 0, must_align=False) for name in weights]


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_each_copy_is_like_its_weight(store: Store, tmp_path: Path, dtype: Any, is_inference: bool) -> None:
    tensors = shared(store, tmp_path / "a.safetensors", dtype, is_inference=is_inference)
    pack = Pack([Home(tensor) for tensor in tensors])
    copies = pack.queue_copies(torch.device("cpu"))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert bits(copy) == bits(tensor)
        assert (copy.dtype, copy.shape, copy.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert copy.is_inference() == is_inference
    assert pack.size == sum(tensor.nbytes for tensor in tensors)


def test_each_begins_where_torch_would_let_it_begin(store: Store, tmp_path: Path) -> None:
    pack = Pack([Home(tensor) for tensor in shared(store, tmp_path / "a.safetensors", torch.float16)])
    copies = pack.queue_copies(torch.device("cpu"))
    assert {(copy.data_ptr() - copies[0].data_ptr()) % 512 for copy in copies} == {0}
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1


def test_every_load_has_memory_of_its_own(store: Store, tmp_path: Path) -> None:
    pack = Pack([Home(tensor) for tensor in shared(store, tmp_path / "a.safetensors", torch.float16)])
    first, second = (pack.queue_copies(META) for _ in range(2))
    assert all(copy.device == META for copy in first)
    assert first[0].untyped_storage()._cdata != second[0].untyped_storage()._cdata


def test_only_small_weights_that_are_alike_go_together(store: Store, tmp_path: Path) -> None:
    half, full = (Home(numbers_of(store, tmp_path, 8, dtype)) for dtype in (torch.float16, torch.float32))
    assert packs.kind(half) != packs.kind(full)
    assert packs.kind(half) == packs.kind(Home(numbers_of(store, tmp_path, 9, torch.float16)))
    with torch.inference_mode():
        assert packs.kind(half) != packs.kind(Home(numbers_of(store, tmp_path, 10, torch.float16)))
    assert packs.kind(Home(numbers_of(store, tmp_path, packs.LARGEST // 4, torch.float32))) is not None
    assert packs.kind(Home(numbers_of(store, tmp_path, packs.LARGEST // 4 + 1, torch.float32))) is None
    assert packs.kind(Home(numbers_of(store, tmp_path, 0, torch.float32))) is None


def numbers_of(store: Store, directory: Path, length: int, dtype: Any) -> Any:
    path = write(directory / f"{length}-{dtype}.safetensors", weight=numbers(length, dtype=dtype))
    return store.shared(read(store, path)["weight"], dtype, 0, must_align=False)
