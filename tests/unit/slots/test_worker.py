"""A slot's worker: restarted when it dies, its job ended as an error, nothing of it kept alive."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.errors import DeviceError
from comfy_parallel.slots import device, worker
from comfy_parallel.slots.pool import check_devices
from comfy_parallel.slots.slot import Run, current_slot
from comfy_parallel.slots.worker import Worker, start_from_call, start_workers
from tests.fakes import PromptQueue, failed, host_item, in_thread, make_front, succeeded

pytestmark = pytest.mark.timeout(120)

SOON_S = 60.0
PAUSES = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


class Ended(BaseException):
    """Ends a worker's endless loop from its pause."""


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The devices that threads were bound to."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(device, "bind", lambda name, num_slots: calls.append((name, num_slots)))
    return calls


@pytest.fixture(autouse=True)
def own_time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a worker on the test's own thread sees of `time`; those that earlier tests have left see the real one."""
    own, thread = SimpleNamespace(sleep=time.sleep, monotonic=time.monotonic), threading.current_thread()

    class Time:
        def __getattr__(self, name: str) -> Any:
            return getattr(own if threading.current_thread() is thread else time, name)

    monkeypatch.setattr(worker, "time", Time())
    return own


@pytest.fixture
def pauses(own_time: SimpleNamespace) -> list[float]:
    """The pauses before each restart; the worker ends where it would make more than there are in PAUSES."""
    made: list[float] = []

    def sleep(seconds: float) -> None:
        made.append(seconds)
        if len(made) >= len(PAUSES):
            raise Ended

    own_time.sleep = sleep
    return made


@pytest.fixture
def one_pause(own_time: SimpleNamespace) -> None:
    """The worker ends at its first pause."""

    def sleep(seconds: float) -> None:
        raise Ended

    own_time.sleep = sleep


def run_worker(front: Any, prompt_worker: Callable[[Any, Any], None], index: int = 0) -> None:
    queue = front.slot_queues[index]
    with pytest.raises(Ended):
        Worker(queue.slot, queue, lambda own: prompt_worker(own, front.server)).run()


@pytest.fixture
def front() -> Iterator[Any]:
    """Two slots; the thread that runs a worker gets its name back."""
    thread = threading.current_thread()
    name = thread.name
    yield make_front("cuda:0", "cuda:1")
    thread.name = name


# Restarting.


def test_it_runs_the_hosts_worker_with_the_slots_queue_in_the_slot(
    front: Any, one_pause: None, bound: list[Any]
) -> None:
    seen: list[Any] = []

    def prompt_worker(queue: Any, server: Any) -> None:
        seen.extend([queue, server, current_slot(), threading.current_thread().name])

    run_worker(front, prompt_worker, index=1)
    queue = front.slot_queues[1]
    assert seen == [queue, front.server, queue.slot, "slot-1-cuda:1"]
    assert bound == [("cuda:1", 2)]
    assert current_slot() is None


@pytest.mark.parametrize("error", [None, RuntimeError("died"), SystemExit(3), KeyboardInterrupt()])
def test_it_is_started_again_however_it_ends(front: Any, pauses: list[float], error: BaseException | None) -> None:
    starts = []

    def prompt_worker(queue: Any, server: Any) -> None:
        starts.append(queue)
        if error is not None:
            raise error

    run_worker(front, prompt_worker)
    assert len(starts) == len(PAUSES)
    assert front.slot_queues[0].slot.stats.worker_restarts == len(PAUSES) - 1
    assert front.history == {}


def test_a_worker_that_cannot_start_is_tried_less_and_less_often(front: Any, pauses: list[float]) -> None:
    run_worker(front, lambda queue, server: None)
    assert pauses == pytest.approx(PAUSES)


def test_after_a_long_healthy_run_the_pause_is_short_again(
    front: Any, pauses: list[float], own_time: SimpleNamespace
) -> None:
    now, starts = [0.0], []
    own_time.monotonic = lambda: now[0]

    def prompt_worker(queue: Any, server: Any) -> None:
        starts.append(now[0])
        now[0] += 3600 if len(starts) == 4 else 1

    run_worker(front, prompt_worker)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])


def test_a_job_that_kills_the_worker_does_not_make_the_next_one_wait(front: Any, pauses: list[float]) -> None:
    def prompt_worker(queue: Any, server: Any) -> None:
        queue.put(host_item("job"))
        queue.get(timeout=0)
        raise SystemExit

    run_worker(front, prompt_worker)
    assert pauses == pytest.approx([0.1] * len(PAUSES))


def test_a_dead_worker_is_not_ready(front: Any, one_pause: None) -> None:
    slot = front.slot_queues[0].slot

    def prompt_worker(queue: Any, server: Any) -> None:
        queue.get(timeout=0)
        assert slot.state == "idle"

    run_worker(front, prompt_worker)
    assert slot.state == "starting"


# The job of a dead worker.


def take_and(raised: BaseException | None) -> Callable[[Any, Any], None]:
    """A worker that takes one job and dies of it."""

    def prompt_worker(queue: Any, server: Any) -> None:
        queue.get(timeout=0)
        if raised is not None:
            raise raised

    return prompt_worker


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ValueError("a bad value"), "ValueError", "a bad value"),
        (SystemExit("killed"), "SystemExit", "killed"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (None, "RuntimeError", "the host's worker returned"),
    ],
)
def test_its_job_ends_as_an_error(
    front: Any, one_pause: None, raised: BaseException | None, kind: str, message: str
) -> None:
    front.put(host_item("job", client_id="c"))
    run_worker(front, take_and(raised))
    entry = front.history["job"]
    assert (entry["status"]["status_str"], entry["status"]["completed"], entry["gpu_id"]) == ("error", False, 0)
    ((kind_of_message, data),) = entry["status"]["messages"]
    assert kind_of_message == "execution_error"
    assert data["prompt_id"] == "job"
    assert data["exception_type"] == kind
    assert data["exception_message"].endswith(message)
    assert (front.get_tasks_remaining(), front.slot_queues[0].slot.run) == (0, None)
    assert front.slot_queues[0].slot.stats.failed == 1


def test_its_client_is_told_that_the_job_failed_and_then_that_it_ended(front: Any, one_pause: None) -> None:
    front.put(host_item("job", client_id="c"))
    run_worker(front, take_and(SystemExit("killed")))
    (error, error_client), (end, end_client) = [(data, client) for _, data, client in front.server.sent]
    assert [event for event, _, _ in front.server.sent] == ["execution_error", "executing"]
    assert (error_client, end_client) == ("c", "c")
    assert (error["prompt_id"], error["exception_type"], error["gpu_id"]) == ("job", "SystemExit", 0)
    assert end == {"node": None, "prompt_id": "job", "gpu_id": 0}


def test_jobs_that_wait_are_left_for_the_restarted_worker(front: Any, own_time: SimpleNamespace) -> None:
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(list(front.history))
        if len(seen) == 2:
            raise Ended

    own_time.sleep = sleep
    for name in ("first", "second"):
        front.slot_queues[0].put(host_item(name))
    run_worker(front, take_and(SystemExit()))
    assert seen == [["first"], ["first", "second"]]


def test_a_job_that_has_ended_keeps_its_result_though_the_worker_dies_after(front: Any, one_pause: None) -> None:
    def prompt_worker(queue: Any, server: Any) -> None:
        _, item_id = queue.get(timeout=0)
        queue.task_done(item_id, {"outputs": {"1": "image"}}, status=succeeded())
        raise RuntimeError("while it tidied up")

    front.put(host_item("job"))
    run_worker(front, prompt_worker)
    assert front.history["job"]["status"]["status_str"] == "success"
    assert front.slot_queues[0].slot.stats.failed == 0


@pytest.mark.parametrize("broken", ["task_done", "send_sync"])
def test_the_worker_survives_what_nodes_have_put_around_the_hosts_methods(
    front: Any, pauses: list[float], broken: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a node's mistake")

    setattr(front if broken == "task_done" else front.server, broken, fail)
    front.put(host_item("job", client_id="c"))
    run_worker(front, take_and(SystemExit()))
    assert front.history["job"]["status"]["status_str"] == "error"
    assert front.get_tasks_remaining() == 0
    assert len(pauses) == len(PAUSES)


def test_a_job_that_a_nodes_task_done_took_out_before_it_failed_ends_as_an_error(front: Any, one_pause: None) -> None:
    def broken(item_id: int, *args: Any, **kwargs: Any) -> None:
        front.currently_running.pop(item_id, None)
        raise ValueError("a node's mistake")

    def prompt_worker(queue: Any, server: Any) -> None:
        _, item_id = queue.get(timeout=0)
        queue.task_done(item_id, {"outputs": {}}, status=succeeded())

    front.task_done = broken
    front.put(host_item("job", client_id="c"))
    run_worker(front, prompt_worker)
    assert front.history["job"]["status"]["status_str"] == "error"
    assert (front.get_tasks_remaining(), front.slot_queues[0].slot.run) == (0, None)
    assert front.slot_queues[0].slot.state == "starting"


class Unshowable(BaseException):
    def __str__(self) -> str:
        raise SystemExit

    __repr__ = __str__

    def __setattr__(self, name: str, value: Any) -> None:
        raise self


def test_a_job_ends_whatever_its_errors_own_code_does(front: Any, one_pause: None) -> None:
    front.put(host_item("job", client_id="c"))
    run_worker(front, take_and(Unshowable()))
    ((_, data),) = front.history["job"]["status"]["messages"]
    assert (data["exception_type"], data["exception_message"].rpartition(": ")[2]) == (
        "Unshowable",
        "Unshowable, which cannot be shown as text",
    )
    assert front.slot_queues[0].slot.state == "starting"


def test_a_job_that_cannot_be_copied_ends_as_an_error(front: Any, one_pause: None) -> None:
    front.put(host_item("job", lock=threading.Lock()))
    run_worker(front, lambda queue, server: queue.get(timeout=0))
    assert front.history["job"]["status"]["status_str"] == "error"
    assert front.slot_queues[0].slot.run is None


# What a dead worker leaves behind.


class Tensor:
    """Stands for device memory: it must be gone before the next job."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def raise_plainly(tensor: Tensor) -> None:
    raise RuntimeError("out of memory")


def raise_from(tensor: Tensor) -> None:
    try:
        raise_plainly(tensor)
    except RuntimeError as error:
        raise ValueError("the node failed") from error


def raise_while_handling(tensor: Tensor) -> None:
    try:
        raise_plainly(tensor)
    except RuntimeError:
        raise_plainly(tensor)


def raise_holding(tensor: Tensor) -> None:
    raise RuntimeError(tensor)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("fail", [raise_plainly, raise_from, raise_while_handling, raise_holding])
@pytest.mark.parametrize("has_job", [True, False])
def test_what_the_dead_worker_held_is_freed_before_the_pause(
    front: Any,
    monkeypatch: pytest.MonkeyPatch,
    own_time: SimpleNamespace,
    fail: Callable[[Tensor], None],
    has_job: bool,
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def sleep(seconds: float) -> None:
        assert [reference() for reference in held] == [None, None]
        raise Ended

    def prompt_worker(queue: Any, server: Any) -> None:
        executor, tensor = Tensor(), Tensor()
        held.extend([weakref.ref(executor), weakref.ref(tensor)])
        if has_job:
            queue.get(timeout=0)
        fail(tensor)

    own_time.sleep = sleep
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own keep every record with its arguments.
    front.put(host_item("job"))
    run_worker(front, prompt_worker)
    assert ("job" in front.history) is has_job


# All slots.


def test_every_slot_gets_a_worker_and_the_hosts_thread_is_the_first(bound: list[Any]) -> None:
    front = make_front("cuda:0", "cuda:1", "cuda:2")
    all_run = threading.Barrier(4)
    threads: dict[int, threading.Thread] = {}

    def prompt_worker(queue: Any, server: Any) -> None:
        threads[queue.slot.index] = threading.current_thread()
        all_run.wait(SOON_S)
        threading.Event().wait()

    def host_thread() -> None:
        start_workers(front, lambda own: prompt_worker(own, front.server))

    thread = threading.Thread(target=host_thread, daemon=True)
    thread.start()
    all_run.wait(SOON_S)
    assert threads[0] is thread
    assert len(set(threads.values())) == 3
    assert [threads[index].name for index in range(3)] == ["slot-0-cuda:0", "slot-1-cuda:1", "slot-2-cuda:2"]
    assert all(one.daemon for one in threads.values())
    assert sorted(bound) == [("cuda:0", 3), ("cuda:1", 3), ("cuda:2", 3)]


def test_garbage_collections_do_not_look_at_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host collects after jobs, on every slot; what the imports made is most of the heap, and stays."""
    told: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: told.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: told.append("freeze"))
    monkeypatch.setattr(Worker, "run", lambda self: told.append("run"))
    front = make_front("cpu")
    start_workers(front, lambda queue: None)
    assert told == ["collect", "freeze", "run"]


class Jobs:
    """Runs jobs as the host's worker does; a job called `hold …` waits for `release`."""

    def __init__(self) -> None:
        self.running: dict[str, threading.Event] = {}
        self.changed = threading.Condition()
        self.release = threading.Event()

    def worker(self, queue: Any, server: Any) -> None:
        while True:
            taken = queue.get(timeout=1000.0)
            if taken is None:
                continue
            item, item_id = taken
            status = self.execute(item[1])
            queue.task_done(item_id, {"outputs": {}}, status=status)
            server.queue_updated()

    def execute(self, name: str) -> Any:
        with self.changed:
            self.running[name] = threading.Event()
            self.changed.notify_all()
        slot = current_slot()
        assert slot is not None
        if name.startswith("hold"):
            self.release.wait(SOON_S)
        if name.startswith("kill"):
            raise SystemExit(name)
        return failed() if name.startswith("fail") else succeeded()

    def wait_for(self, *names: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) <= self.running.keys(), SOON_S)


def start(*devices: str) -> tuple[Any, Jobs]:
    """A front whose slots run jobs, started as the host does: by the first `get`."""
    jobs = Jobs()
    front = make_front(*devices, host_class=PromptQueue, on_first_get=start_from_call)
    in_thread(run_host, front, jobs)
    return front, jobs


def prompt_worker(queue: Any, server: Any) -> None:
    """Found by its name when it first asks the front for a job."""
    if not hasattr(queue, "slot"):
        queue.get(timeout=1000.0)
    server.jobs.worker(queue, server)


def run_host(front: Any, jobs: Jobs) -> None:
    front.server.jobs = jobs
    prompt_worker(front, front.server)


def wait_until_done(front: Any, *names: str) -> None:
    done = threading.Event()
    while not set(names) <= set(front.history):
        assert not done.wait(0.002)


def test_slots_run_at_the_same_time() -> None:
    front, jobs = start("cpu", "cpu")
    for name in ("hold 1", "hold 2", "after"):
        front.put(host_item(name))
    jobs.wait_for("hold 1", "hold 2")
    assert front.get_tasks_remaining() == 3
    assert "after" not in jobs.running
    jobs.release.set()
    wait_until_done(front, "hold 1", "hold 2", "after")
    assert {front.history[name]["gpu_id"] for name in ("hold 1", "hold 2")} == {0, 1}


def test_a_job_that_kills_one_slots_worker_leaves_the_other_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_FIRST_PAUSE_S", 0.01)
    front, jobs = start("cpu", "cpu")
    front.slot_queues[0].put(host_item("hold"))
    jobs.wait_for("hold")
    for name in ("kill", "fail", "next"):
        front.slot_queues[1].put(host_item(name))
    wait_until_done(front, "kill", "fail", "next")
    jobs.release.set()
    wait_until_done(front, "hold")
    outcomes = {name: entry["status"]["status_str"] for name, entry in front.history.items()}
    assert outcomes == {"kill": "error", "fail": "error", "next": "success", "hold": "success"}
    assert [queue.slot.stats.worker_restarts for queue in front.slot_queues] == [0, 1]


# Devices.


def test_every_device_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(device, "check", checked.append)
    monkeypatch.setattr(device, "load_linear_algebra", checked.append)
    check_devices(["cuda:0", "cuda:1", "cuda:0"])
    assert checked == ["cuda:0", "cuda:1", ["cuda:0", "cuda:1", "cuda:0"]]


def test_the_first_broken_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str) -> None:
        if name != "cuda:0":
            raise DeviceError(f"{name} cannot be initialised")

    monkeypatch.setattr(device, "check", check)
    with pytest.raises(DeviceError, match="cuda:1"):
        check_devices(["cuda:0", "cuda:1", "cuda:2"])


def test_a_run_is_compared_by_identity() -> None:
    assert Run("a") != Run("a")
