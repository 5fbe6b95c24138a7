"""A slot that holds weights whose bytes are lost: its jobs fail until it has let go."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.errors import WeightsLost
from comfy_parallel.patches import model_management
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading, lost
from comfy_parallel.weights.files import mapping
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import homes, loads
from tests.fakes import make_slots
from tests.unit.weights.device import stand_in_driver, stand_in_stream
from tests.unit.weights.samples import GIB, bits, collect, model_of, numbers, overwrite, read, write

pytestmark = pytest.mark.timeout(120)

CHECK = model_management._raise_if_interrupted(lambda: None, KeyError)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cpu", "cpu")


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The slots that were told to let go. No memory is left for copies."""
    told: list[int] = []

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mapping, "on_loss", None)
    monkeypatch.setattr(loading, "_store", None)
    loading.use(Store("map", GIB), told.append)
    monkeypatch.setattr(mapping, "_copy_in_place", fail)
    yield told
    lost._lost.clear()


@pytest.fixture
def store(freed: list[int]) -> Store:
    found = loading.store()
    assert found is not None
    return found


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", a=numbers(5000))


def loaded(store: Store, path: str, slot: Slot) -> dict[str, Any]:
    with entered(slot):
        return read(store, path)


def test_only_slots_that_hold_it_fail(
    store: Store, path: str, slots: tuple[Slot, ...], freed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    views = loaded(store, path, slots[1])
    overwrite(': > "$1"', path)
    with entered(slots[0]):
        CHECK()
    CHECK()
    for _ in range(2):
        with (
            entered(slots[1]),
            pytest.raises(WeightsLost, match=r"a\.safetensors was overwritten .*Submit the job again"),
        ):
            CHECK()
    assert freed == [1]
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert views


def test_a_slot_that_has_let_go_works_again(store: Store, path: str, slots: tuple[Slot, ...]) -> None:
    views = loaded(store, path, slots[0])
    overwrite(': > "$1"', path)
    with entered(slots[0]):
        loading.between_jobs(was_freed=False)
        with pytest.raises(WeightsLost):
            CHECK()
        loading.between_jobs(was_freed=True)  # but somebody kept the tensors
        with pytest.raises(WeightsLost):
            CHECK()
        views.clear()
        loading.between_jobs(was_freed=True)
        CHECK()


def test_a_recording_is_not_disturbed(store: Store, path: str, slots: tuple[Slot, ...]) -> None:
    views = loaded(store, path, slots[0])
    overwrite(': > "$1"', path)
    slots[0].is_recording = True
    with entered(slots[0]):
        CHECK()
    assert views


def test_what_is_on_a_gpu_does_not_go_home_to_what_is_lost(
    store: Store, path: str, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_driver(monkeypatch)
    stand_in_stream(monkeypatch)
    with entered(slots[0]):
        model = model_of(store, read(store, path))
        home = loading.home_at(model.pa)
        assert home is not None
        with loading.copies.complete():
            loads.load_whole(store, [(model.pa, home)], torch.device("cpu"))
        overwrite(': > "$1"', path)
        loading.send_home(store, [(model.pa, home)])
        assert bits(model.pa.data) == bits(numbers(5000))
        assert homes.home_of(model.pa) is None
    del model, home
    collect()
    store.drop_unused()
