"""Which slots record steps, and what those that do not say of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from comfy_parallel.graphs import per_slot
from comfy_parallel.graphs.recording import Recorder
from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graph stepping is on and torch is made for NVIDIA's GPUs, with its own allocator."""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.version, "hip", None)
    per_slot.switch(True)
    yield
    per_slot.switch(False)


def stepper_of(slot: Slot) -> Any:
    with entered(slot):
        return per_slot.of_slot()


@pytest.mark.usefixtures("on")
def test_slots_record_each_for_itself() -> None:
    first, second, third = make_slots("cuda:0", "cuda:1", "cuda:1")
    assert [stepper_of(slot) is None for slot in (first, second, third)] == [False, False, False]
    assert [per_slot.report(slot)["on"] for slot in (first, second, third)] == [True, True, True]
    assert len({stepper_of(slot) for slot in (first, second, third)}) == 3


def test_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    expect_off("cuda:0", "COMFY_PARALLEL_GRAPHS is off", logging.INFO, caplog)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("device", ["cpu", "xpu:0", "mps"])
def test_devices_that_are_no_nvidia_gpus(device: str, caplog: pytest.LogCaptureFixture) -> None:
    expect_off(device, device.partition(":")[0], logging.INFO, caplog)


@pytest.mark.usefixtures("on")
def test_another_allocator(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    expect_off("cuda:0", "cudaMallocAsync; start ComfyUI with --disable-cuda-malloc", logging.WARNING, caplog)


@pytest.mark.usefixtures("on")
def test_a_gpu_of_amd(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    expect_off("cuda:0", "AMD", logging.WARNING, caplog)


@pytest.mark.usefixtures("on")
def test_an_old_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {}))
    expect_off("cuda:0", "install a newer one", logging.WARNING, caplog)


def expect_off(device: str, reason: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    slots = make_slots(device, device)
    with caplog.at_level(logging.INFO):
        per_slot.tell()
    for slot in slots:
        assert stepper_of(slot) is None
        report = per_slot.report(slot)
        assert (report["on"], reason in report["reason"]) == (False, True)
        told = [record for record in caplog.records if slot.name in record.getMessage()]
        assert [(record.levelno, report["reason"] in record.getMessage()) for record in told] == [(level, True)]


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("devices", "error", "expected"),
    [
        (("cuda:0", "cuda:0"), RuntimeError("spoilt"), UncapturableNow),
        (("cuda:0", "cuda:1"), RuntimeError("refused"), Uncapturable),
        (("cuda:0", "cuda:0"), None, Uncapturable),
    ],
)
def test_what_another_slot_may_have_spoilt_is_tried_again(
    devices: tuple[str, ...], error: Exception | None, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_args: Any) -> Any:
        raise Uncapturable("CUDA refused to record it") from error

    monkeypatch.setattr(Recorder, "record", record)
    slot = make_slots(*devices)[0]
    with pytest.raises(Uncapturable, match="CUDA refused") as caught:
        per_slot._SlotRecorder(slot, torch.device(slot.device)).record(lambda inputs: inputs, [])
    assert caught.type is expected
    assert not slot.is_recording
