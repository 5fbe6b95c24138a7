"""What `/metrics` tells about devices: whether they answer, their memory, how busy they are. Sizes are bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from comfy_parallel.core.shown import clipped
from comfy_parallel.host import facts
from comfy_parallel.http.families import LABELS, labels_of
from comfy_parallel.http.health import Answers
from comfy_parallel.slots import device

logger = logging.getLogger(__name__)

_MOST = 300  # characters of a reason
_told: set[str] = set()  # the devices of which was said why their utilisation is not known


def device_families(answers: list[Answers]) -> Iterator[Metric]:
    """Each device's families. One that does not answer has no samples but that it is not healthy."""
    vram = {each.slot.device: _vram(each) for each in answers if each.slot.kind != "remote"}
    yield _health(answers)
    yield _memory(answers)
    for kind, help in (("used", "Device memory in use"), ("free", "Device memory that ComfyUI can use")):
        family = GaugeMetricFamily(f"comfy_parallel_vram_{kind}_bytes", f"{help}, as it counts", labels=["device"])
        for name, sizes in vram.items():
            if sizes is not None:
                family.add_metric([name], sizes[f"{kind}_bytes"])
        yield family
    yield _utilisation([name for name, sizes in vram.items() if sizes is not None])


def _vram(answers: Answers) -> dict[str, int] | None:
    return answers.ask(lambda: facts.vram(answers.slot.device))


def _health(answers: list[Answers]) -> Metric:
    family = GaugeMetricFamily("comfy_parallel_slot_healthy", "1 while the slot's device answers", labels=LABELS)
    for each in answers:
        family.add_metric(labels_of(each.slot), int(each.error is None))
    return family


def _memory(answers: list[Answers]) -> Metric:
    family = GaugeMetricFamily("comfy_parallel_device_memory_bytes", "Device memory", labels=["device", "kind"])
    for name, memory in {each.slot.place: each.memory for each in answers}.items():
        for kind, size in (memory or {}).items():
            family.add_metric([name, kind.removesuffix("_bytes")], size)
    return family


def _utilisation(names: list[str]) -> Metric:
    family = GaugeMetricFamily(
        "comfy_parallel_device_utilisation_ratio", "Share of the last moments that a GPU computed", labels=["device"]
    )
    for name in names:
        try:
            ratio = device.utilisation(name)
        except Exception as error:  # noqa: BLE001 - the library and the driver raise what they like; the log tells it
            _tell_once(name, error)
        else:
            if ratio is not None:
                family.add_metric([name], ratio)
    return family


def _tell_once(name: str, error: Exception) -> None:
    if name not in _told:
        _told.add(name)
        remedy = "run: pip install nvidia-ml-py" if isinstance(error, ModuleNotFoundError) else "the rest is there"
        reason = clipped(f"{type(error).__name__}: {error}", _MOST)
        logger.info("comfy_parallel: /metrics has no utilisation of %s (%s); %s", name, reason, remedy)
