"""What the front does of a slot whose process runs, says things, and ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.errors import JobLost
from comfy_parallel.fleet.process_slot import ProcessSlot
from comfy_parallel.fleet.supervisor import Command, Timing
from comfy_parallel.slots.slot import Run, Slot

LIMIT_S = 60.0
REPO = Path(__file__).resolve().parents[3]
# A worker that does what a job's prompt says.
WORKER = """
import os, sys, time
from comfy_parallel.fleet.link import Link, pack, unpack
link = Link(int(sys.argv[1]))
link.send("ready")
interrupted = False
while True:
    kind, *rest = link.receive()
    if kind != "job":
        continue
    number, packed = rest
    job = unpack(packed)
    link.send("event", number, pack(("executing", {"node": "1"}, job["extra_data"].get("client_id"))))
    if job["prompt"] == "die":
        os.kill(os.getpid(), 9)
    if job["prompt"] == "hang":
        time.sleep(600)
    if job["prompt"] == "interrupted":
        assert link.receive() == ("interrupt", number)
    status = {"status_str": "success", "completed": True, "messages": [("told", {})]}
    outcome = {"history_result": {"outputs": {"1": job}}, "status": status, "error": None, "memory_retries": 1}
    link.send("done", number, pack(outcome))
    link.send("event", number, pack(("too late", {}, None)))
"""


class Executor:
    def __init__(self, server: Any) -> None:
        self.server = server
        self.success = True
        self.status_messages: list[Any] = []
        self.history_result: dict[str, Any] = {}

    def add_message(self, event: str, data: dict[str, Any], broadcast: bool) -> None:
        self.status_messages.append((event, data))


class Served:
    def __init__(self, silent_s: float, requeues: bool) -> None:
        self.told: list[Any] = []
        self.slot = Slot(1, "cpu")
        self.server = SimpleNamespace(send_sync=lambda *told: self.told.append(told), client_id=None, last_node_id=None)
        self.process = ProcessSlot(
            self.slot,
            self.server,
            lambda fd: Command(
                argv=(sys.executable, "-c", WORKER, str(fd)),
                env={**os.environ, "PYTHONPATH": str(REPO)},
                pass_fds=(fd,),
            ),
            silent_s=silent_s,
            requeues=requeues,
            timing=Timing(first_pause_s=0.01, longest_pause_s=0.05),
        )
        self.process.start()

    def run(self, prompt: str) -> Executor:
        executor = Executor(self.server)
        self.slot.run = self.slot.run or Run("id")
        self.process.await_ready()
        try:
            self.process.execute(executor, prompt, "id", {"client_id": "me"}, ["1"])
        finally:
            self.slot.run = None
        return executor


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(silent_s: float = LIMIT_S, requeues: bool = True) -> Served:
        made.append(Served(silent_s, requeues))
        return made[-1]

    yield make
    for one in made:
        one.process.stop()


def test_a_job_runs_there_and_its_outcome_is_the_executors(serve: Callable[..., Served]) -> None:
    one = serve()
    executor = one.run("as usual")
    assert executor.success
    assert executor.status_messages == [("told", {})]
    assert executor.history_result["outputs"]["1"]["outputs"] == ["1"]
    assert one.slot.stats.memory_retries == 1
    assert one.told == [("executing", {"node": "1"}, "me")]
    assert one.server.client_id == "me"
    assert one.server.last_node_id is None
    one.slot.run = None
    one.run("another")
    assert [event for event, *_ in one.told] == ["executing", "executing"]


def test_an_interrupt_is_passed_on(serve: Callable[..., Served]) -> None:
    one = serve()
    one.slot.run = Run("id", interrupted=True)
    assert one.run("interrupted").success


@pytest.mark.parametrize("requeues", [True, False])
def test_a_job_whose_process_ends_is_lost_and_the_next_one_runs(serve: Callable[..., Served], requeues: bool) -> None:
    one = serve(requeues=requeues)
    with pytest.raises(JobLost, match="its process was ended by SIGKILL") as lost:
        one.run("die")
    assert (lost.value.has_begun, lost.value.may_run_again) == (True, requeues)
    assert one.run("as usual").success
    assert one.process.restarts == 1


def test_a_process_that_says_nothing_is_ended(serve: Callable[..., Served]) -> None:
    one = serve(silent_s=0.5)
    with pytest.raises(JobLost, match="was ended by force: it said nothing for 0.5 s"):
        one.run("hang")


def test_a_job_that_was_to_be_interrupted_does_not_run_again(serve: Callable[..., Served]) -> None:
    one = serve(silent_s=1.0)
    one.slot.run = Run("id", interrupted=True)
    executor = one.run("hang")
    assert not executor.success
    assert [event for event, _ in executor.status_messages] == ["execution_interrupted"]


def test_a_job_that_comes_before_the_process_is_there_has_not_begun(serve: Callable[..., Served]) -> None:
    one = serve()
    one.process.await_ready()
    one.process.stop()
    with pytest.raises(JobLost) as lost:
        one.process.execute(Executor(one.server), "as usual", "id", {}, [])
    assert not lost.value.has_begun


def test_flags_for_a_process_that_has_ended_are_no_fault(serve: Callable[..., Served]) -> None:
    one = serve()
    one.process.await_ready()
    one.process.stop()
    one.process.set_flags({"free_memory": True})


def test_waiting_for_a_process_ends_when_it_is_ready(serve: Callable[..., Served]) -> None:
    one = serve()
    waiting = threading.Thread(target=one.process.await_ready, daemon=True)
    waiting.start()
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()
    deadline = time.monotonic() + LIMIT_S
    while one.process.state != "ready":
        assert time.monotonic() < deadline
