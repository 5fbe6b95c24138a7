"""Several slots on one GPU record and replay at once, and a recording that fails harms nobody. One GPU is enough."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from comfy_parallel.graphs.recording import Recorder
from comfy_parallel.graphs.refusal import Uncapturable
from comfy_parallel.slots import device as slots_device
from comfy_parallel.slots import gates
from tests.gpu.conftest import MakeGpuServer
from tests.gpu.test_gpus import jobs_in_any_order
from tests.host.graph_cases import Steps
from tests.host.test_parity import GROUPS, differing, run_jobs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

MIXED_JOBS = 200
ROUNDS = 60


@pytest.fixture
def recorder(one_gpu: Any) -> Recorder:
    return Recorder(one_gpu)


def wait_for_the_device(x: Any) -> None:
    import torch

    torch.cuda.synchronize()


def empty_the_cache(x: Any) -> None:
    import torch

    torch.cuda.empty_cache()


def ask_for_too_much(x: Any) -> None:
    x.new_empty(1 << 42)


def change_the_stream(x: Any) -> None:
    import torch

    torch.cuda.set_stream(torch.cuda.Stream())


def draw(x: Any) -> None:
    x.uniform_()


def read_a_result(x: Any) -> None:
    x.sum().item()


def stop(x: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "meddle", [wait_for_the_device, empty_the_cache, ask_for_too_much, change_the_stream, draw, read_a_result, stop]
)
def test_a_recording_that_fails_leaves_the_device_usable(recorder: Recorder, meddle: Callable[[Any], None]) -> None:
    import torch

    x = torch.rand(1000, device="cuda")
    kept = recorder.record(lambda inputs: inputs[0] * 3, [x.clone()])
    stream = torch.cuda.current_stream()
    with torch.inference_mode():
        for _ in range(3):
            with suppress(Uncapturable, torch.OutOfMemoryError, KeyboardInterrupt):
                recorder.record(lambda inputs: (inputs[0] * 2, meddle(inputs[0] + 1))[0], [x.clone()])
            torch.cuda.set_stream(stream)
            assert_usable(x)
            again = recorder.record(lambda inputs: inputs[0] * 5, [x.clone()])
            assert torch.equal(kept.replay([x]), x * 3)
            assert torch.equal(again.replay([x]), x * 5)
            del again


def assert_usable(x: Any) -> None:
    """torch gives its cache back, waits for the device, allocates, and draws what the seed says."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    drawn = [torch.cuda.manual_seed(4) or torch.rand(8, device=x.device) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(x + x.clone(), x * 2)


def test_memory_of_recordings_that_failed_is_given_back(recorder: Recorder) -> None:
    import torch

    x = torch.rand(1 << 20, device="cuda")

    def spoilt(inputs: list[Any]) -> Any:
        results = [inputs[0] + number for number in range(64)]
        torch.cuda.synchronize()
        return results

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(4):
        with pytest.raises(Uncapturable):
            recorder.record(spoilt, [x])
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_two_threads_record_replay_draw_and_wait_on_one_device(one_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", gates.wait_for_recording(torch.cuda.synchronize))
    monkeypatch.setattr(torch.cuda, "empty_cache", slots_device.empty_own_cache(torch.cuda.empty_cache))
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(20))).to(one_gpu)
    alone = torch.rand(ROUNDS, 8, 512, device=one_gpu)
    with torch.inference_mode():
        expected = [layers(x) for x in alone]
    together = threading.Barrier(2)

    def work(number: int) -> list[str]:
        wrong = []
        recorder = Recorder(one_gpu)
        generator = torch.Generator(one_gpu)
        together.wait()
        with torch.inference_mode(), torch.cuda.device(one_gpu):
            layers(alone[0])  # as a slot does: a step is recorded after it ran
            for index in range(ROUNDS):
                recording = recorder.record(lambda inputs: layers(inputs[0]), [alone[index].clone()])
                for other in (index, (index + 7) % ROUNDS):
                    if not torch.equal(recording.replay([alone[other]]), expected[other]):
                        wrong.append(f"thread {number}, round {index}: replay of {other}")
                drawn = [torch.rand(64, device=one_gpu, generator=generator.manual_seed(index)) for _ in range(2)]
                if not torch.equal(*drawn):
                    wrong.append(f"thread {number}, round {index}: drawn")
                torch.rand(64, device=one_gpu, generator=generator)  # Slots that share a GPU have one each.
                torch.cuda.synchronize()
                if index % 10 == number:
                    torch.cuda.empty_cache()
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [[], []]


@pytest.mark.host
def test_mixed_jobs_on_two_slots_of_one_gpu_give_stocks_bytes(make_gpu_server: MakeGpuServer) -> None:
    jobs = jobs_in_any_order(MIXED_JOBS // len(GROUPS))
    two = {"COMFY_PARALLEL_SLOTS_PER_GPU": "2"}
    stock = make_gpu_server(slots=None, link=False)
    expected = run_jobs(stock, jobs)
    stock.stop()
    server = make_gpu_server(slots="cuda:0", env=two)
    found = run_jobs(server, jobs)
    seen = [Steps.of(server, slot) for slot in (0, 1)]
    print("\n", *seen, sep="\n")
    assert differing(jobs, expected, found) == []
    assert {entry["gpu_id"] for entry in found.entries.values()} == {0, 1}
    assert all(steps.replays > steps.captures > 0 for steps in seen)
    assert not [reason for steps in seen for reason in steps.eager if "several slots" in reason]
    log = server.log()
    server.stop()
    assert "INTERNAL ASSERT" not in log
