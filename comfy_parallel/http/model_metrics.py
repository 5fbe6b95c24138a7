"""What `/metrics` tells about models: recorded and eager steps, weight files and what was copied to GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from comfy_parallel.http.families import LABELS, labels_of, per_slot
from comfy_parallel.http.health import Answers
from comfy_parallel.weights import report


def graph_families(answers: list[Answers]) -> Iterator[Metric]:
    """Of slots whose steps all run eagerly only the reason."""
    reports = [(each.slot, each.graphs) for each in answers if each.graphs is not None]
    is_on = GaugeMetricFamily(
        "comfy_parallel_graphs_on", "1 if steps are recorded; else 0 and why not", labels=[*LABELS, "reason"]
    )
    for slot, steps in reports:
        is_on.add_metric([*labels_of(slot), steps["reason"] or ""], int(steps["on"]))
    yield is_on
    reports = [(slot, steps) for slot, steps in reports if steps["on"]]
    families: list[tuple[Any, str]] = [
        (CounterMetricFamily("comfy_parallel_graph_captures", "Steps recorded", labels=LABELS), "captures"),
        (CounterMetricFamily("comfy_parallel_graph_replays", "Steps replayed", labels=LABELS), "replays"),
        (GaugeMetricFamily("comfy_parallel_graph_bytes", "Memory of recordings", labels=LABELS), "size_bytes"),
    ]
    for family, name in families:
        for slot, steps in reports:
            family.add_metric(labels_of(slot), steps[name])
        yield family
    eager = CounterMetricFamily(
        "comfy_parallel_eager_steps", "Steps neither recorded nor replayed", labels=[*LABELS, "reason"]
    )
    for slot, steps in reports:
        for reason, count in steps["eager"].items():
            eager.add_metric([*labels_of(slot), reason], count)
    yield eager


def weight_families() -> Iterator[Metric]:
    """Zero where every slot keeps weights of its own (`COMFY_PARALLEL_WEIGHTS=off`): nothing is counted there."""
    yield per_slot(CounterMetricFamily, "weight_loads", "Weight files that were loaded for jobs", report.file_loads)
    copied = CounterMetricFamily(
        "comfy_parallel_weight_copied_bytes", "Weights copied to the slot's GPU", labels=[*LABELS, "source"]
    )
    for slot, sizes in report.copied_bytes():
        for source, size in sizes.items():
            copied.add_metric([*labels_of(slot), source], size)
    yield copied
    ram = GaugeMetricFamily("comfy_parallel_weight_ram_bytes", "RAM of copied and pinned weights", labels=["kind"])
    for kind, size in report.ram().items():
        ram.add_metric([kind.removesuffix("_bytes")], size)
    yield ram
