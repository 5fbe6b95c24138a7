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
from comfy_parallel.http.health import Answers, answers_of
from comfy_parallel.slots.slot import slots
from comfy_parallel.slots.snapshot import Snapshot

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ["gpu_id", "device"]


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
        yield self._jobs()
        yield self._per_slot(
            CounterMetricFamily, "busy_seconds", "Time spent running jobs", lambda s: s.stats.busy_seconds
        )
        yield self._per_slot(CounterMetricFamily, "wait_seconds", "Time jobs waited", lambda s: s.stats.wait_seconds)
        yield self._per_slot(
            CounterMetricFamily, "out_of_memory", "Jobs that ran out of memory", lambda s: s.stats.out_of_memory
        )
        yield self._per_slot(
            CounterMetricFamily,
            "memory_retries",
            "Jobs that ran once more after they had run out of memory",
            lambda s: s.stats.memory_retries,
        )
        yield self._per_slot(
            CounterMetricFamily,
            "suspensions",
            "Times the slot was suspended because it failed jobs in a row",
            lambda s: s.stats.suspensions,
        )
        yield self._per_slot(
            GaugeMetricFamily,
            "slot_suspended",
            "1 while the slot is suspended",
            lambda s: int(s.state is SlotState.SUSPENDED),
        )
        yield self._per_slot(
            CounterMetricFamily,
            "worker_restarts",
            "Times the worker was started again",
            lambda s: s.stats.worker_restarts,
        )
        yield self._per_slot(GaugeMetricFamily, "slot_running", "1 while a job runs", lambda s: int(s.run is not None))
        yield from self._durations()
        yield from self._waiting()
        yield self._health(answers)
        yield self._memory(answers)
        yield from self._graphs(answers)

    def _jobs(self) -> Metric:
        family = CounterMetricFamily("comfy_parallel_jobs", "Finished jobs", labels=[*_LABELS, "outcome"])
        for slot in slots():
            for outcome in ("succeeded", "failed", "interrupted"):
                family.add_metric([str(slot.index), slot.device, outcome], getattr(slot.stats, outcome))
        return family

    def _graphs(self, answers: list[Answers]) -> Iterator[Metric]:
        """Of slots whose steps all run eagerly only the reason."""
        reports = [(each.slot, each.graphs) for each in answers if each.graphs is not None]
        is_on = GaugeMetricFamily(
            "comfy_parallel_graphs_on", "1 if steps are recorded; else 0 and why not", labels=[*_LABELS, "reason"]
        )
        for slot, report in reports:
            is_on.add_metric([str(slot.index), slot.device, report["reason"] or ""], int(report["on"]))
        yield is_on
        reports = [(slot, report) for slot, report in reports if report["on"]]
        families: list[tuple[Any, str]] = [
            (CounterMetricFamily("comfy_parallel_graph_captures", "Steps recorded", labels=_LABELS), "captures"),
            (CounterMetricFamily("comfy_parallel_graph_replays", "Steps replayed", labels=_LABELS), "replays"),
            (GaugeMetricFamily("comfy_parallel_graph_bytes", "Memory of recordings", labels=_LABELS), "size_bytes"),
        ]
        for family, name in families:
            for slot, report in reports:
                family.add_metric([str(slot.index), slot.device], report[name])
            yield family
        eager = CounterMetricFamily(
            "comfy_parallel_eager_steps", "Steps neither recorded nor replayed", labels=[*_LABELS, "reason"]
        )
        for slot, report in reports:
            for reason, count in report["eager"].items():
                eager.add_metric([str(slot.index), slot.device, reason], count)
        yield eager

    def _per_slot(self, kind: Any, name: str, help: str, value: Any) -> Metric:
        family: Any = kind(f"comfy_parallel_{name}", help, labels=_LABELS)
        for slot in slots():
            family.add_metric([str(slot.index), slot.device], value(slot))
        return family  # type: ignore[no-any-return]

    def _durations(self) -> Iterator[Metric]:
        for name, help in (("waits", "Seconds that jobs waited"), ("runs", "Seconds that jobs ran")):
            family = HistogramMetricFamily(f"comfy_parallel_job_{name}_seconds", help, labels=_LABELS)
            for slot in slots():
                histogram = getattr(slot.stats, name)
                family.add_metric([str(slot.index), slot.device], histogram.cumulative(), histogram.sum_s)
            yield family

    def _waiting(self) -> Iterator[Metric]:
        seen: Snapshot = self._front.snapshot()
        yield self._pending(seen)
        waiting = [item for items in (*seen.pending, seen.unassigned) for item in items]
        since = [queued_at for item in waiting if (queued_at := getattr(item, "queued_at", 0.0))]
        age_s = time.monotonic() - min(since) if since else 0.0
        yield GaugeMetricFamily(
            "comfy_parallel_oldest_waiting_seconds", "How long the oldest waiting job waits; 0: none does", value=age_s
        )

    def _pending(self, seen: Snapshot) -> Metric:
        family = GaugeMetricFamily(
            "comfy_parallel_jobs_pending", "Waiting jobs; gpu_id auto: any slot", labels=["gpu_id"]
        )
        for slot, pending in zip(slots(), seen.pending, strict=True):
            family.add_metric([str(slot.index)], len(pending))
        family.add_metric(["auto"], len(seen.unassigned))
        return family

    def _health(self, answers: list[Answers]) -> Metric:
        family = GaugeMetricFamily("comfy_parallel_slot_healthy", "1 while the slot's device answers", labels=_LABELS)
        for each in answers:
            family.add_metric([str(each.slot.index), each.slot.device], int(each.error is None))
        return family

    def _memory(self, answers: list[Answers]) -> Metric:
        """Devices that do not answer have no samples."""
        family = GaugeMetricFamily("comfy_parallel_device_memory_bytes", "Device memory", labels=["device", "kind"])
        memory_of = {each.slot.device: each.memory for each in answers}
        for name, memory in memory_of.items():
            for kind, size in (memory or {}).items():
                family.add_metric([name, kind.removesuffix("_bytes")], size)
        return family
