"""What of a load is copied together, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import entered
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, homes, parts, plans, transfers
from comfy_parallel.weights.gpu.parts import Part
from tests.fakes import make_slots
from tests.unit.weights.device import stand_in_driver, stand_in_stream
from tests.unit.weights.samples import bits, let_go, model_of, numbers, read, slots_store, write

pytestmark = pytest.mark.timeout(30)

CPU = torch.device("cpu")


def numbered(*names: str, size: int = 1) -> list[Part]:
    """Parts that are told apart by their places alone."""
    return [Part([name], [SimpleNamespace(place=name)], size) for name in names]  # type: ignore[list-item]


def names(batch: list[Part]) -> str:
    return "".join(part.parameters[0] for part in batch)


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The places of what another GPU has."""
    lent: set[str] = set()
    monkeypatch.setattr(homes, "is_lent", lambda sources, target: sources[0].place in lent)
    return lent


def test_parts_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_FIRST", 1024)
    monkeypatch.setattr(parts, "_LARGEST", 4096)
    monkeypatch.setattr(parts, "_SMALL", 600)
    weights: Any = [(number, SimpleNamespace(size=700 if number % 2 else 7)) for number in range(12)]
    found = parts.apart(weights)
    assert [len(part.homes) for part in found] == [2, 3, 5, 2]
    assert [(part.large, part.small) for part in found] == [(1024, 512), (1024, 1024), (3072, 1024), (1024, 512)]
    assert [pair for part in found for pair in zip(part.parameters, part.homes, strict=True)] == weights
    assert parts.apart([]) == []


def test_batches_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, lent: set[str]) -> None:
    monkeypatch.setattr(parts, "_FIRST", 2)
    monkeypatch.setattr(parts, "_LARGEST", 4)
    with parts.batches(numbered(*"abcdefghijklm"), 0) as cut:
        assert list(map(names, cut)) == ["ab", "cdef", "ghij", "klm"]


def test_what_another_gpu_has_comes_last(monkeypatch: pytest.MonkeyPatch, lent: set[str]) -> None:
    """As it is when a batch is asked for."""
    monkeypatch.setattr(parts, "_FIRST", 1)
    monkeypatch.setattr(parts, "_LARGEST", 1)
    lent.add("c")
    with parts.batches(numbered(*"abcde"), 0) as cut:
        found = [names(next(cut))]
        lent.add("b")
        found += map(names, cut)
    assert found == ["a", "d", "e", "b", "c"]


def test_loads_at_once_begin_with_other_parts(monkeypatch: pytest.MonkeyPatch, lent: set[str]) -> None:
    monkeypatch.setattr(parts, "_FIRST", 2)
    monkeypatch.setattr(parts, "_LARGEST", 2)
    with parts.batches(numbered(*"abcdefg"), 0) as first, parts.batches(numbered(*"abcdefg"), 1) as second:
        found = [names(next(cut)) for cut in (first, second, second, first)]
        rest = ["".join(map(names, cut)) for cut in (first, second)]
    assert found == ["ab", "cd", "ef", "gc"]
    assert rest == ["def", "abg"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_load_finds_nothing_left_behind(
    monkeypatch: pytest.MonkeyPatch, lent: set[str], *, fails: bool
) -> None:
    def load() -> None:
        with parts.batches(numbered(*"abca"), 0) as cut:
            for batch in cut:
                assert names(batch) == "abca", "two weights may be the same of the file's"
                if fails:
                    raise RuntimeError("no room")

    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="no room"):
                load()
        else:
            load()
    assert not parts._claimed


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    stand_in_driver(monkeypatch)
    stand_in_stream(monkeypatch)
    monkeypatch.setattr(blocks, "_LARGEST", 1)
    return slots_store(monkeypatch)


@pytest.fixture
def model(store: Store, tmp_path: Path) -> Iterator[nn.Module]:
    """In six blocks of one weight each."""
    expected = {str(number): numbers(8, start=float(number)) for number in range(6)}
    model = model_of(store, read(store, write(tmp_path / "a.safetensors", **expected)))
    yield model
    let_go(store, model)


@pytest.mark.parametrize(("largest", "expected"), [(1, 7), (1024, 4), (1 << 20, 2)])
def test_a_load_takes_one_turn_for_each_batch(
    store: Store, model: nn.Module, monkeypatch: pytest.MonkeyPatch, largest: int, expected: int
) -> None:
    """And one to find out what there is to copy."""
    turns = 0

    @contextmanager
    def turn() -> Iterator[None]:
        nonlocal turns
        turns += 1
        yield

    monkeypatch.setattr(transfers, "turn", turn)
    monkeypatch.setattr(plans, "turn", turn)
    monkeypatch.setattr(parts, "_FIRST", largest)
    monkeypatch.setattr(parts, "_LARGEST", largest)
    with entered(make_slots("cuda:0")[0]), transfers.complete():
        plans.load_ahead(store, model, CPU, ())
    assert turns == expected
    assert [bits(one.data) for one in model.parameters()] == [bits(numbers(8, start=float(i))) for i in range(6)]
