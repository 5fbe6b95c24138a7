"""Pickled weight files: read once, and shared like any other where they hold plain tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import ALIGNMENT, SharedMemory, is_shared, origin_of
from comfy_parallel.weights.files.store import Store
from tests.fakes import make_slots
from tests.unit.weights.samples import GIB, bits, collect, numbers, overwrite

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["map", "copy"])
def store(request: pytest.FixtureRequest) -> Store:
    return Store(request.param, GIB)


class Reader:
    """Reads a pickled file as the host does, and counts."""

    def __init__(self, path: Path, content: Any) -> None:
        self.path = str(path)
        self.count = 0
        torch.save(content, path)

    def __call__(self) -> Any:
        self.count += 1
        return torch.load(self.path, weights_only=True)


def make_reader(folder: Path, content: Any) -> Reader:
    return Reader(folder / "a.ckpt", content)


def read(store: Store, reader: Reader) -> Any:
    return loading.load_file(store, reader.path, reader)


def share(store: Store, tensor: Any, slot_index: int = 0) -> Any:
    return store.shared(tensor, tensor.dtype, slot_index, must_align=False)


def test_a_pickled_file_is_read_once(store: Store, tmp_path: Path) -> None:
    content = {"a": numbers(50, 30), "b": numbers(7, dtype=torch.bfloat16), "c": torch.tensor(2)}
    reader = make_reader(tmp_path, content)
    first, second = read(store, reader), read(store, reader)
    assert reader.count == 1
    for weights in (first, second):
        assert list(weights) == list(content)
        assert all(bits(weights[name]) == bits(tensor) for name, tensor in content.items())
        assert all(weights[name].dtype == tensor.dtype for name, tensor in content.items())
    assert share(store, first["a"]).data_ptr() == share(store, second["a"], 1).data_ptr()


def test_its_tensors_lie_aligned_in_memory_of_our_own(store: Store, tmp_path: Path) -> None:
    weights = read(store, make_reader(tmp_path, {"a": numbers(3), "b": numbers(5), "c": numbers(70)}))
    file = store.files()[0]
    assert isinstance(file.content, SharedMemory)
    assert (file.mapped_bytes, file.copied_bytes) == (0, file.content.size)
    assert all(share(store, tensor).data_ptr() % ALIGNMENT == 0 for tensor in weights.values())


def test_each_reader_may_write_to_what_it_got(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"a": numbers(5000)})
    first = read(store, reader)["a"]
    first.zero_()
    second = read(store, reader)["a"]
    assert bits(second) == bits(numbers(5000))
    assert share(store, first) is None
    assert bits(share(store, second)) == bits(numbers(5000))


def test_tensors_of_one_storage_stay_together(store: Store, tmp_path: Path) -> None:
    whole = numbers(1000, 10)
    content = {"whole": whole, "rows": whole[30:40], "column": whole[:, 3], "turned": whole.t(), "again": whole}
    reader = make_reader(tmp_path, content)
    for _ in range(2):
        weights = read(store, reader)
        for name, tensor in content.items():
            assert weights[name].stride() == tensor.stride()
            assert bits(weights[name]) == bits(tensor)
    content_size = store.files()[0].copied_bytes
    assert whole.nbytes <= content_size < 2 * whole.nbytes
    shared = {name: share(store, tensor) for name, tensor in weights.items()}
    assert shared["again"].data_ptr() == shared["whole"].data_ptr()
    assert shared["rows"].data_ptr() == shared["whole"][30:].data_ptr()
    assert bits(shared["turned"]) == bits(whole.t())


def test_a_write_is_seen_through_the_other_tensors_of_its_storage(store: Store, tmp_path: Path) -> None:
    whole = numbers(10, 10)
    reader = make_reader(tmp_path, {"whole": whole, "again": whole})
    read(store, reader)
    weights = read(store, reader)
    weights["whole"][0, 0] = -1
    assert weights["again"][0, 0] == -1


def test_an_ordered_dict_stays_one(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, OrderedDict(b=numbers(3), a=numbers(4)))
    for _ in range(2):
        weights = read(store, reader)
        assert type(weights) is OrderedDict
        assert list(weights) == ["b", "a"]


def test_plain_values_are_kept_beside_the_tensors(store: Store, tmp_path: Path) -> None:
    values = {"epoch": 3, "rate": 0.5, "name": "model", "done": True, "none": None, "raw": b"bytes"}
    reader = make_reader(tmp_path, {**values, "a": numbers(3)})
    for _ in range(2):
        weights = read(store, reader)
        assert {name: weights[name] for name in values} == values
        assert bits(weights["a"]) == bits(numbers(3))
    assert reader.count == 1


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"a": torch.empty(0, 3)}, {"a": torch.empty(0), "b": numbers(2)}]
)
def test_there_may_be_few_numbers_or_none(store: Store, tmp_path: Path, content: dict[str, Any]) -> None:
    reader = make_reader(tmp_path, content)
    for _ in range(2):
        weights = read(store, reader)
        assert weights.keys() == content.keys()
        assert all(torch.equal(weights[n], v) for n, v in content.items() if isinstance(v, torch.Tensor))
        assert all(weights[n].shape == v.shape for n, v in content.items() if isinstance(v, torch.Tensor))


NESTED: dict[str, Callable[[], Any]] = {
    "a dict": lambda: {"inner": {"a": numbers(3)}, "b": numbers(4)},
    "a list": lambda: {"a": [numbers(3)], "b": numbers(4)},
    "no plain memory": lambda: {"a": numbers(4, 4).to_sparse_csr(), "b": numbers(4)},
    "no dict": lambda: [numbers(3)],
    "one tensor": lambda: numbers(3),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", NESTED)
def test_what_is_more_than_tensors_is_read_each_time(store: Store, tmp_path: Path, name: str) -> None:
    reader = make_reader(tmp_path, NESTED[name]())
    results = [read(store, reader) for _ in range(2)]
    assert reader.count == 2
    for result in results:
        assert repr(result) == repr(NESTED[name]())
    assert store.used_bytes == 0
    tensor = results[0].get("b") if isinstance(results[0], dict) else None
    assert tensor is None or origin_of(tensor) is None


def test_modules_of_two_slots_share_a_pickled_file(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, nn.Linear(4, 6).state_dict())
    modules = []
    for slot in make_slots("cpu", "cpu"):
        module = nn.Linear(4, 6)
        with entered(slot):
            weights = read(store, reader)
            module.load_state_dict({**weights, **loading.share_parameters(store, module, weights, "")})
        modules.append(module)
    assert is_shared(modules[0].weight)
    assert modules[0].weight.data_ptr() == modules[1].weight.data_ptr()
    assert bits(modules[0].weight) == bits(torch.load(reader.path, weights_only=True)["weight"])
    assert store.find(reader.path).slots == [0, 1]


@pytest.mark.parametrize("script", [': > "$1"', 'printf XXXX | dd of="$1" bs=1 seek=600 conv=notrunc status=none'])
def test_users_keep_the_numbers_of_a_pickled_file_that_is_overwritten(
    store: Store, tmp_path: Path, script: str
) -> None:
    reader = make_reader(tmp_path, {"a": numbers(500)})
    weights = read(store, reader)
    shared = share(store, weights["a"])
    overwrite(script, reader.path)
    assert bits(weights["a"]) == bits(shared) == bits(numbers(500))


def test_a_pickled_file_that_was_replaced_is_read_again(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"a": numbers(3)})
    kept = read(store, reader)
    torch.save({"a": numbers(4, start=9)}, reader.path)
    assert bits(read(store, reader)["a"]) == bits(numbers(4, start=9))
    assert bits(kept["a"]) == bits(numbers(3))


def test_one_that_nobody_uses_is_given_back_and_read_again(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"a": numbers(3)})
    read(store, reader)
    collect()
    store.drop_unused()
    assert store.files() == []
    assert bits(read(store, reader)["a"]) == bits(numbers(3))
    assert reader.count == 2


def test_an_error_of_the_first_reader_is_not_remembered(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"a": numbers(3)})

    def fail() -> Any:
        raise EOFError("cut off")

    with pytest.raises(EOFError):
        loading.load_file(store, reader.path, fail)
    assert bits(read(store, reader)["a"]) == bits(numbers(3))


def test_slots_that_read_one_after_the_other_are_told_apart(store: Store, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"a": numbers(3)})
    slots: tuple[Slot, ...] = make_slots("cpu", "cpu", "cpu")
    tensors = [share(store, read(store, reader)["a"], slot.index) for slot in slots]
    assert store.find(reader.path).slots == [0, 1, 2]
    del tensors[1]
    collect()
    assert store.find(reader.path).slots == [0, 2]
