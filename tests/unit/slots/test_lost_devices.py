"""Which slots fail when a GPU is lost, what becomes of the jobs, and when the process leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.core.states import SlotState
from comfy_parallel.errors import DeviceError, SlotFailed
from comfy_parallel.slots import lost_devices
from comfy_parallel.slots.lost_devices import LostDevices, telling_of_lost_devices
from comfy_parallel.slots.slot import entered
from tests.fakes import host_item, make_front, succeeded, take

LOST = RuntimeError("CUDA error: device-side assert triggered\nmore")
UNCLEAR = RuntimeError("CUDA error: unknown error")
ONE_CALL = RuntimeError("CUDA error: out of memory")


class Devices:
    """Devices, some of which are lost, and what was told."""

    def __init__(self, *lost: str) -> None:
        self.lost, self.asked, self.told, self.left = set(lost), list[str](), list[str](), 0

    def check(self, name: str) -> None:
        self.asked.append(name)
        if name in self.lost:
            raise DeviceError(f"{name} cannot be initialised: CUDA error: device-side assert triggered")

    def leave(self) -> None:
        self.left += 1


@pytest.fixture
def front() -> Any:
    return make_front("cuda:0", "cuda:0", "cuda:1")


@pytest.fixture(autouse=True)
def _none_afterwards() -> Iterator[None]:
    yield
    lost_devices.use(None)


def states(front: Any) -> list[str]:
    return [queue.slot.state.value for queue in front.slot_queues]


def watcher(front: Any, devices: Devices) -> LostDevices:
    return LostDevices(front.slot_queues, devices.check, devices.leave, devices.told.append)


@pytest.mark.parametrize(
    ("error", "lost", "failed"),
    [
        (LOST, ("cuda:0",), [0, 1]),
        (UNCLEAR, ("cuda:0",), [0, 1]),
        (LOST, ("cuda:1",), [2]),  # A job may use another slot's GPU.
        (LOST, (), []),
        (UNCLEAR, (), []),
        (ONE_CALL, ("cuda:0",), []),
        (ValueError("no"), ("cuda:0",), []),
    ],
)
def test_the_slots_of_the_lost_device_fail(
    front: Any, error: Exception, lost: tuple[str, ...], failed: list[int]
) -> None:
    devices = Devices(*lost)
    front.slot_queues[0].put(host_item("a"))
    take(front.slot_queues[0])
    reason = watcher(front, devices).look(front.slot_queues[0].slot, error)
    assert [index for index, state in enumerate(states(front)) if state == "failed"] == failed
    assert (reason is not None) is (0 in failed)
    assert len(devices.told) == len(failed)


@pytest.mark.parametrize("how", ["cause", "context", "deep"])
def test_what_caused_an_error_counts(front: Any, how: str) -> None:
    error: Exception = ValueError("sampling failed")
    error.__cause__ = LOST if how == "cause" else None
    error.__context__ = LOST if how == "context" else None
    if how == "deep":
        for _ in range(5):
            outer = ValueError("again")
            outer.__context__ = error
            error.__context__, error = error.__context__ or LOST, outer
        error.__cause__ = error  # It may cause itself.
    assert watcher(front, Devices("cuda:0")).look(front.slot_queues[0].slot, error) is not None


def test_bound_jobs_end_as_errors_and_others_go_elsewhere(front: Any) -> None:
    devices = Devices("cuda:1")
    watch = watcher(front, devices)
    for queue in front.slot_queues:
        queue.put(host_item(f"runs {queue.slot.index}"))
        take(queue)
    front.slot_queues[2].put(host_item("bound", client_id="me"))
    front.put(host_item("auto"))
    watch.look(front.slot_queues[2].slot, LOST)
    assert list(front.get_history()) == ["bound"]
    event = dict(front.get_history()["bound"]["status"]["messages"])["execution_error"]
    assert event["exception_message"].startswith("it was bound to slot 2 (cuda:1), which has failed")
    assert [(name, sid) for name, data, sid in front.server.sent] == [("execution_error", "me"), ("executing", "me")]
    assert [item[1] for item in front.snapshot().unassigned] == ["auto"]
    for target in (2,):
        with pytest.raises(SlotFailed, match="slot 2"):
            front.closing.check(target)
    front.closing.check(0)
    front.closing.check(None)
    queue = front.slot_queues[2]
    queue.task_done(next(iter(queue.currently_running)), {"outputs": {}}, status=succeeded())
    assert states(front)[2] == "failed"
    front.slot_queues[2].put(host_item("put by a node"))
    assert list(front.get_history()) == ["bound", "runs 2", "put by a node"]
    queue = front.slot_queues[1]
    queue.task_done(next(iter(queue.currently_running)), {"outputs": {}}, status=succeeded())
    assert take(queue) == "auto"
    front.closing.resume([2])
    front.closing.check(2)


def test_what_lies_ready_for_it_is_given_to_another(front: Any) -> None:
    for queue in front.slot_queues[1:]:
        front._dispatcher.ask(queue._desk)
    front.put(host_item("auto"))
    assert states(front) == ["starting", "offered", "idle"]
    watcher(front, Devices("cuda:0")).look(front.slot_queues[1].slot, LOST)
    assert states(front) == ["failed", "failed", "offered"]
    assert not front.get_history()


def test_jobs_that_name_no_slot_go_anywhere_when_the_usual_one_has_failed(front: Any) -> None:
    front.default_slot = 2
    front.put(host_item("before"))
    assert len(front.snapshot().pending[2]) == 1
    watcher(front, Devices("cuda:1")).look(front.slot_queues[2].slot, LOST)
    front.put(host_item("after"))
    assert [item[1] for item in front.snapshot().unassigned] == ["after"]


def test_the_process_leaves_once_the_job_is_in_the_history(front: Any) -> None:
    devices = Devices("cuda:1")
    watch = watcher(front, devices)
    queue = front.slot_queues[2]
    seen: list[tuple[int, bool]] = []

    def ended(slot: Any, item: Any) -> None:
        watch.job_ended(slot, item)
        seen.append((devices.left, "a" in front.get_history()))

    queue.when_ended = ended
    queue.put(host_item("a"))
    take(queue)
    watch.look(queue.slot, LOST)
    assert devices.left == 0
    queue.task_done(next(iter(queue.currently_running)), {"outputs": {}}, status=succeeded())
    assert seen == [(1, True)]
    watch.job_ended(queue.slot, None)
    assert devices.left == 1, "once"


def test_a_worker_that_dies_between_jobs_tells_as_well(front: Any) -> None:
    devices = Devices("cuda:1")
    lost_devices.use(watcher(front, devices))
    assert lost_devices.look(front.slot_queues[2].slot, LOST) is not None
    assert (states(front)[2], devices.left) == ("failed", 1)


def test_the_jobs_error_says_what_became_of_its_slot(front: Any) -> None:
    lost_devices.use(watcher(front, Devices("cuda:0")))
    told: list[str] = []

    def handle(self: Any, prompt_id: Any, prompt: Any, outputs: Any, executed: Any, error: Any, ex: Any) -> None:
        told.append(error["exception_message"])

    wrapped = telling_of_lost_devices(handle)
    with entered(front.slot_queues[0].slot):
        wrapped(None, "a", {}, {}, [], {"exception_message": "no"}, ValueError("no"))
        wrapped(None, "a", {}, {}, [], {"exception_message": "boom"}, LOST)
    assert told[0] == "no"
    assert told[1].startswith(
        "boom\n\nslot 0 (cuda:0) has failed: its device is lost to this process: CUDA error: device"
    )
    assert "more" not in told[1]
    assert front.slot_queues[0].slot.state is SlotState.FAILED


def test_a_device_that_hangs_is_lost(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(lost_devices, "_ANSWERS_WITHIN_S", 0.1)
    hangs = threading.Event()
    watch = LostDevices(front.slot_queues, lambda name: hangs.wait(30) if name == "cuda:0" else None)
    assert watch.look(front.slot_queues[0].slot, UNCLEAR) is not None
    hangs.set()


def test_runs_on_a_lost_device_count_as_attempts(front: Any) -> None:
    class Journal:
        def __init__(self) -> None:
            self.put_back: list[int] = []

        def start(self, job: int, attempts: int) -> None:
            self.put_back.append(job)

        def close(self) -> None: ...

    for queue in front.slot_queues:
        queue.put(host_item(f"runs {queue.slot.index}"))
        take(queue)
    watcher(front, Devices("cuda:0")).look(front.slot_queues[0].slot, LOST)
    journal = front.ledger.journal = Journal()
    front.ledger.close()
    assert journal.put_back == [2], "the others ran where it may have been their fault"
