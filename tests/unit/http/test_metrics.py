"""`GET /metrics` is what Prometheus can read."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from comfy_parallel.graphs import per_slot
from comfy_parallel.graphs.stepper import StepStats
from comfy_parallel.http import device_metrics, metrics
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import copies
from tests.fakes import failed, host_item, make_front, run_next, take

LABELS = ("gpu_id", "device", "outcome", "kind", "reason", "le", "state", "source")


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.name", lambda device: f"Card {device}")
    monkeypatch.setattr("comfy_parallel.slots.device.memory", lambda device: {"total_bytes": 80, "free_bytes": 30})
    monkeypatch.setattr("comfy_parallel.host.facts.vram", lambda device: {"used_bytes": 50, "free_bytes": 30})
    monkeypatch.setattr("comfy_parallel.slots.device.utilisation", lambda device: 0.75)
    monkeypatch.setattr(device_metrics, "_told", set())


def samples(front: Any) -> dict[tuple[str, ...], float]:
    """Each sample's value by its name and its labels' values, in the order of LABELS."""
    families = text_string_to_metric_families(metrics.exposition(front).decode())
    return {
        (
            sample.name.removeprefix("comfy_parallel_"),
            *(sample.labels[label] for label in LABELS if label in sample.labels),
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_idle_server_shows_every_series_as_zero(front: Any) -> None:
    values = samples(front)
    counters = ("busy_seconds_total", "wait_seconds_total", "out_of_memory_total", "worker_restarts_total")
    for slot in (("0", "cuda:0"), ("1", "cuda:1")):
        for name in (*counters, "slot_running"):
            assert values[(name, *slot)] == 0
        for outcome in ("succeeded", "failed", "interrupted"):
            assert values[("jobs_total", *slot, outcome)] == 0
    assert [values["jobs_pending", gpu_id] for gpu_id in ("0", "1", "auto")] == [0, 0, 0]


def test_jobs_are_counted(front: Any) -> None:
    first, second = front.slot_queues
    first.put(host_item("a"))
    run_next(first)
    first.put(host_item("b"))
    run_next(first, failed(("execution_error", {"exception_type": "OutOfMemoryError"})))
    second.put(host_item("running"))
    take(second)
    second.put(host_item("pinned"))
    front.put(host_item("open"))
    front.put(host_item("also open"))
    values = samples(front)
    assert values["jobs_total", "0", "cuda:0", "succeeded"] == 1
    assert values["jobs_total", "0", "cuda:0", "failed"] == 1
    assert values["out_of_memory_total", "0", "cuda:0"] == 1
    assert values["slot_running", "1", "cuda:1"] == 1
    assert [values["jobs_pending", gpu_id] for gpu_id in ("0", "1", "auto")] == [0, 1, 2]


def test_waits_and_runs_are_told_as_histograms_and_how_long_the_oldest_job_waits(front: Any) -> None:
    first = front.slot_queues[0]
    assert samples(front)["oldest_waiting_seconds",] == 0
    first.put(host_item("a"))
    assert samples(front)["oldest_waiting_seconds",] > 0
    run_next(first)
    values = samples(front)
    for name in ("job_waits_seconds", "job_runs_seconds"):
        assert values[f"{name}_bucket", "0", "cuda:0", "3600.0"] == values[f"{name}_count", "0", "cuda:0"] == 1
        assert values[f"{name}_bucket", "1", "cuda:1", "+Inf"] == 0


def test_memory_is_shown_once_per_device() -> None:
    values = samples(make_front("cpu", "cpu"))
    memory = {key: value for key, value in values.items() if key[0] == "device_memory_bytes"}
    assert memory == {
        ("device_memory_bytes", "cpu", "total"): 80,
        ("device_memory_bytes", "cpu", "free"): 30,
    }


def test_what_a_gpu_has_in_use_and_how_busy_it_is_is_shown_once_per_device() -> None:
    values = samples(make_front("cuda:0", "cuda:0"))
    shown = {key: value for key, value in values.items() if key[0].startswith(("vram", "device_utilisation"))}
    assert shown == {
        ("vram_used_bytes", "cuda:0"): 50,
        ("vram_free_bytes", "cuda:0"): 30,
        ("device_utilisation_ratio", "cuda:0"): 0.75,
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("nvidia-ml-py does not seem to be installed"), "run: pip install nvidia-ml-py"),
        (RuntimeError("Driver not loaded"), "the rest is there"),
    ],
)
def test_a_utilisation_that_is_not_known_is_said_once_and_costs_no_other_metric(
    front: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    def fail(device: str) -> float:
        raise error

    monkeypatch.setattr("comfy_parallel.slots.device.utilisation", fail)
    caplog.set_level(logging.INFO)
    values = [samples(front) for _ in range(3)][-1]
    assert [key for key in values if key[0].startswith("device_utilisation")] == []
    assert values["slot_healthy", "0", "cuda:0"] == 1
    assert values["vram_used_bytes", "cuda:1"] == 50
    told = [record.getMessage() for record in caplog.records if "utilisation" in record.getMessage()]
    assert len(told) == 2
    assert all(str(error) in line and line.endswith(said) for line in told)


def test_a_slots_state_is_one_of_those_that_clients_see(front: Any) -> None:
    front.slot_queues[0].put(host_item("a"))
    take(front.slot_queues[0])
    front.closing.pause([1])
    values = {key[1:]: value for key, value in samples(front).items() if key[0] == "slot_state"}
    assert {key for key, value in values.items() if value} == {("0", "cuda:0", "running"), ("1", "cuda:1", "paused")}
    assert {state for _, _, state in values} == {
        *("starting", "idle", "running", "draining", "paused", "suspended", "failed")
    }


def test_loads_and_bytes_copied_are_counted_per_slot(front: Any) -> None:
    slot = front.slot_queues[1].slot
    loading._loads.of(slot)
    slot.values[loading._loads] = 3
    copies._queued.of(slot).bytes_from.update(pinned=7, peer=5)
    values = samples(front)
    assert (values["weight_loads_total", "0", "cuda:0"], values["weight_loads_total", "1", "cuda:1"]) == (0, 3)
    copied = {key[3]: value for key, value in values.items() if key[:2] == ("weight_copied_bytes_total", "1")}
    assert copied == {"pinned": 7, "staged": 0, "peer": 5}
    assert values["weight_ram_bytes", "used"] == 0


def test_graph_stepping_is_counted(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_slot, "why_off", lambda slot: ["too old", None][slot.index])
    stats = StepStats(captures=2, replays=40, eager=Counter({"first of its kind": 2, 'a "quoted" reason': 7}))
    front.slot_queues[1].slot.values[per_slot._steppers] = SimpleNamespace(stats=stats, size_bytes=1 << 20)
    values = samples(front)
    assert values["graph_captures_total", "1", "cuda:1"] == 2
    assert values["graph_replays_total", "1", "cuda:1"] == 40
    assert values["graph_bytes", "1", "cuda:1"] == 1 << 20
    assert values["eager_steps_total", "1", "cuda:1", "first of its kind"] == 2
    assert values["eager_steps_total", "1", "cuda:1", 'a "quoted" reason'] == 7
    assert values["graphs_on", "1", "cuda:1", ""] == 1
    assert values["graphs_on", "0", "cuda:0", "too old"] == 0
    assert [key for key in values if key[0].startswith(("graph", "eager")) and key[1] == "0"] == [
        ("graphs_on", "0", "cuda:0", "too old")
    ]


def test_every_family_has_help_and_a_type(front: Any) -> None:
    text = metrics.exposition(front).decode()
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    assert families == {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(name.startswith("comfy_parallel_") for name in families)


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert metrics.CONTENT_TYPE.startswith("text/plain")
