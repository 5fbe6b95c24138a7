"""When one slot's device does not answer, the replies hold everything about the others, and why this one is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from comfy_parallel.http import health, metrics, status
from comfy_parallel.slots.slot import Slot
from tests.fakes import host_item, make_front, take

LOST = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"


class NVMLError(Exception):
    """As a library's own error: no RuntimeError."""


def failing_on(broken: str, error: Exception, answer: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A question that fails for one device, and is answered for the others. Takes a device's name or a slot."""

    def ask(asked: Any) -> Any:
        name = asked.device if isinstance(asked, Slot) else asked
        if name == broken:
            raise error
        return answer(name)

    return ask


def report(device: str) -> dict[str, Any]:
    return {"on": True, "reason": None, "captures": 3, "replays": 4, "eager": {}, "size_bytes": 5}


ANSWERS: dict[str, Callable[[str], Any]] = {
    "comfy_parallel.slots.device.name": lambda device: f"Card {device}",
    "comfy_parallel.slots.device.memory": lambda device: {"total_bytes": 80, "free_bytes": 30},
    "comfy_parallel.graphs.per_slot.report": report,
}
METRICS_ONLY: dict[str, Callable[[str], Any]] = {
    "comfy_parallel.host.facts.vram": lambda device: {"used_bytes": 50, "free_bytes": 30},
    "comfy_parallel.slots.device.utilisation": lambda device: 0.5,
}
ERRORS = [RuntimeError(LOST), AssertionError("no device"), OSError(5, "I/O error"), NVMLError("GPU is lost")]


def models_of(slot: Slot) -> list[dict[str, Any]]:
    return [{"name": "SD15", "loaded_bytes": 7}]


@pytest.fixture(params=["cuda:0", "cuda:1", "cuda:2"])
def broken(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Any:
    for target, answer in (ANSWERS | METRICS_ONLY).items():
        monkeypatch.setattr(target, failing_on("", RuntimeError(), answer))
    return make_front("cuda:0", "cuda:1", "cuda:2")


def slots_of(front: Any, models: status.ModelsOf = models_of) -> dict[str, dict[str, Any]]:
    return {slot["device"]: slot for slot in json.loads(status.queue_all_json(front, models))["queues"]}


def samples(front: Any) -> dict[tuple[str, str, str], float]:
    families = text_string_to_metric_families(metrics.exposition(front).decode())
    return {
        (sample.name.removeprefix("comfy_parallel_"), sample.labels.get("device", ""), sample.labels.get("kind", "")): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("question", [*ANSWERS, "models"])
def test_the_others_are_told_of_as_before(
    front: Any, monkeypatch: pytest.MonkeyPatch, broken: str, question: str, error: Exception
) -> None:
    expected = slots_of(front)
    del expected[broken]
    fails: Any = failing_on(broken, error, ANSWERS.get(question, lambda device: models_of(front.slot_queues[0].slot)))
    if question == "models":
        found = slots_of(front, fails)
    else:
        monkeypatch.setattr(question, fails)
        found = slots_of(front)
    lost = found.pop(broken)
    assert found == expected
    assert lost["health"] == "broken"
    assert lost["error"].startswith(type(error).__name__)
    assert "\n" not in lost["error"]
    missing = {"name": "device_name", "memory": "vram", "report": "graphs", "models": "models"}[question.split(".")[-1]]
    assert [key for key in ("device_name", "vram", "graphs", "models") if lost[key] is None] == [missing]


def test_its_jobs_and_state_are_still_told(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = front.slot_queues[1]
    queue.put(host_item("running"))
    take(queue)
    queue.put(host_item("waiting"))
    for target, answer in ANSWERS.items():
        monkeypatch.setattr(target, failing_on("cuda:1", RuntimeError(LOST), answer))
    lost = slots_of(front)["cuda:1"]
    assert (lost["running"], lost["pending"], lost["state"]) == (["running"], ["waiting"], "running")
    assert status.debug_queues(front)["queues"][1] == {"gpu_id": 1, "queued": 1, "running": 1}


def test_metrics_leave_out_what_is_not_known(front: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    expected = samples(front)
    for target, answer in (ANSWERS | METRICS_ONLY).items():
        monkeypatch.setattr(target, failing_on(broken, NVMLError("GPU is lost"), answer))
    found = samples(front)
    missing = {key for key in expected if key not in found}
    assert {device for _, device, _ in missing} == {broken}
    assert {name for name, _, _ in missing} >= {"device_memory_bytes", "graph_captures_total", "vram_used_bytes"}
    changed = {key: value for key, value in found.items() if value != expected[key]}
    assert changed == {("slot_healthy", broken, ""): 0}


def test_a_reason_is_logged_once(front: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.memory", failing_on("cuda:1", RuntimeError(LOST), lambda _: {}))
    for _ in range(3):
        slots_of(front)
        samples(front)
    assert [record.message for record in caplog.records] == [
        "slot 1 (cuda:1): its device does not answer: RuntimeError: CUDA error: unspecified launch failure"
    ]


def test_an_error_without_words_is_named_by_its_type(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.memory", failing_on("cuda:0", NVMLError(), lambda _: {}))
    assert health.Answers(front.slot_queues[0].slot).error == "NVMLError: "
