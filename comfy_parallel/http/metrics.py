"""The slots' counters in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from comfy_parallel.core.states import SlotState
from comfy_parallel.http.device_metrics import device_families
from comfy_parallel.http.families import LABELS, labels_of, per_slot
from comfy_parallel.http.health import answers_of
from comfy_parallel.http.model_metrics import graph_families, weight_families
from comfy_parallel.slots.slot import slots
from comfy_parallel.slots.snapshot import Snapshot

CONTENT_TYPE = CONTENT_TYPE_LATEST
_OUTCOMES = ("succeeded", "failed", "interrupted")
_STATES = sorted({state.shown for state in SlotState})


def exposition(front: Any) -> bytes:
    """The reply of `GET /metrics`."""
    registry = CollectorRegistry()
    registry.register(_SlotCollector(front))
    return generate_latest(registry)


class _SlotCollector(Collector):
    def __init__(self, front: Any) -> None:
        self._front = front

    def collect(self) -> Iterator[Metric]:
        answers = answers_of(slots())
        yield from _jobs()
        yield from _states()
        yield from _processes()
        yield from _durations()
        yield from _waiting(self._front.snapshot())
        yield from device_families(answers)
        yield from graph_families(answers)
        yield from weight_families()


def _jobs() -> Iterator[Metric]:
    family = CounterMetricFamily("comfy_parallel_jobs", "Finished jobs", labels=[*LABELS, "outcome"])
    for slot in slots():
        for outcome in _OUTCOMES:
            family.add_metric([*labels_of(slot), outcome], getattr(slot.stats, outcome))
    yield family
    for name, help in (
        ("busy_seconds", "Time spent running jobs, and shares of other slots' jobs"),
        ("shares", "Shares of other slots' jobs that have ended"),
        ("wait_seconds", "Time jobs waited"),
        ("out_of_memory", "Jobs that ran out of memory"),
        ("worker_restarts", "Times the worker was started again"),
        ("memory_retries", "Jobs that ran once more after they had run out of memory"),
        ("suspensions", "Times the slot was suspended because it failed jobs in a row"),
    ):
        yield per_slot(CounterMetricFamily, name, help, lambda slot, name=name: getattr(slot.stats, name))  # type: ignore[misc]


def _processes() -> Iterator[Metric]:
    """Of slots in processes of their own."""
    restarts = CounterMetricFamily(
        "comfy_parallel_process_restarts", "Times the slot's process was started again", labels=LABELS
    )
    is_ready = GaugeMetricFamily("comfy_parallel_process_ready", "1 while the slot's process takes jobs", labels=LABELS)
    for slot in slots():
        if slot.process is not None:
            restarts.add_metric(labels_of(slot), slot.process.restarts)
            is_ready.add_metric(labels_of(slot), int(slot.process.state == "ready"))
    yield from (restarts, is_ready)


def _states() -> Iterator[Metric]:
    yield per_slot(GaugeMetricFamily, "slot_running", "1 while a job runs", lambda slot: int(slot.run is not None))
    yield per_slot(
        GaugeMetricFamily,
        "slot_suspended",
        "1 while the slot is suspended",
        lambda slot: int(slot.state is SlotState.SUSPENDED),
    )
    family = GaugeMetricFamily("comfy_parallel_slot_state", "1 for the state it is in", labels=[*LABELS, "state"])
    for slot in slots():
        shown = slot.state.shown
        for state in _STATES:
            family.add_metric([*labels_of(slot), state], int(state == shown))
    yield family


def _durations() -> Iterator[Metric]:
    for name, help in (("waits", "Seconds that jobs waited"), ("runs", "Seconds that jobs ran")):
        family = HistogramMetricFamily(f"comfy_parallel_job_{name}_seconds", help, labels=LABELS)
        for slot in slots():
            histogram = getattr(slot.stats, name)
            family.add_metric(labels_of(slot), histogram.cumulative(), histogram.sum_s)
        yield family


def _waiting(seen: Snapshot) -> Iterator[Metric]:
    pending = GaugeMetricFamily("comfy_parallel_jobs_pending", "Waiting jobs; gpu_id auto: any slot", labels=["gpu_id"])
    for slot, jobs in zip(slots(), seen.pending, strict=True):
        pending.add_metric([str(slot.index)], len(jobs))
    pending.add_metric(["auto"], len(seen.unassigned))
    yield pending
    waiting = [item for items in (*seen.pending, seen.unassigned) for item in items]
    since = [queued_at for item in waiting if (queued_at := getattr(item, "queued_at", 0.0))]
    age_s = time.monotonic() - min(since) if since else 0.0
    yield GaugeMetricFamily(
        "comfy_parallel_oldest_waiting_seconds", "How long the oldest waiting job waits; 0: none does", value=age_s
    )
