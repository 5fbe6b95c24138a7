"""A supervised command: started, ready, restarted, ended with its supervisor however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comfy_parallel.fleet.supervisor import Command, Supervisor, Timing

LIMIT_S = 60.0
QUICK = Timing(first_pause_s=0.01, longest_pause_s=0.05)
SLEEPS = "import time; print('up', flush=True); time.sleep(600)"


def eventually(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Watched:
    """A supervisor of a Python script that is ready when it has written a line."""

    def __init__(self, script: str, timing: Timing = QUICK) -> None:
        self.lines: list[str] = []
        self.ends: list[str] = []
        self.supervisor = Supervisor(
            "slot 1",
            lambda: Command(argv=(sys.executable, "-c", script), env=os.environ),
            lambda: bool(self.lines),
            say=self.lines.append,
            ended=self.ends.append,
            timing=timing,
        )


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(script: str, timing: Timing = QUICK) -> Watched:
        made.append(Watched(script, timing))
        made[-1].supervisor.start()
        return made[-1]

    yield make
    for one in made:
        one.supervisor.stop()


def test_a_command_is_ready_when_it_says_so_and_its_lines_are_passed_on(watch: Callable[..., Watched]) -> None:
    one = watch(SLEEPS)
    assert one.supervisor.wait_ready(LIMIT_S)
    assert one.lines == ["up"]
    assert one.supervisor.state == "ready"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_command_that_dies_is_started_again(watch: Callable[..., Watched], number: signal.Signals) -> None:
    one = watch(SLEEPS)
    assert one.supervisor.wait_ready(LIMIT_S)
    first = one.supervisor.pid
    assert first is not None
    os.kill(first, number)
    eventually(lambda: one.supervisor.restarts == 1 and one.supervisor.is_ready, "no second start")
    assert one.supervisor.pid != first
    assert one.ends == [f"was ended by {number.name}"]


def test_a_command_that_is_never_ready_is_ended_and_tried_again(watch: Callable[..., Watched]) -> None:
    one = watch("import time; time.sleep(600)", Timing(ready_within_s=0.2, first_pause_s=0.01))
    eventually(lambda: one.supervisor.restarts >= 2, "not started again")
    assert set(one.ends) == {"was ended by force: not ready within 0.2 s"}


def test_a_command_that_cannot_be_started_says_so() -> None:
    ends: list[str] = []
    command = Command(argv=(sys.executable,), env=os.environ, cwd="/no/such/folder")
    one = Supervisor("slot 1", lambda: command, lambda: True, ended=ends.append, timing=QUICK)
    one.start()
    eventually(lambda: ends, "it never ended")
    one.stop()
    assert ends[0].startswith("could not be started: ")


def test_what_a_command_has_started_ends_with_it(watch: Callable[..., Watched]) -> None:
    one = watch(
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    assert one.supervisor.wait_ready(LIMIT_S)
    child = int(one.lines[0])
    one.supervisor.stop()
    eventually(lambda: not is_there(child), "the command's own child is still there")


SUPERVISES = """
import os, sys, threading, time
from comfy_parallel.fleet.supervisor import Command, Supervisor
one = Supervisor("a", lambda: Command(argv=(sys.executable, "-c", sys.argv[1]), env=os.environ), lambda: True)
one.start()
assert one.wait_ready(60)
print(one.pid, flush=True)
time.sleep(600)
"""
HOLDS = (
    "import ctypes, os, time; from comfy_parallel.fleet import lifeline; lifeline.hold(os.environ);"
    "ctypes.CDLL(None).prctl(1, 0); time.sleep(600)"
)


@pytest.mark.parametrize("script", [SLEEPS, HOLDS], ids=["by the kernel", "by its lifeline alone"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_no_command_outlives_its_supervisor(script: str, number: signal.Signals) -> None:
    argv = [sys.executable, "-c", SUPERVISES, script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        time.sleep(0.2)  # The script takes hold of its lifeline; without that time its end is the kernel's doing.
        supervisor.send_signal(number)
    eventually(lambda: not is_there(pid), "it is still there")
