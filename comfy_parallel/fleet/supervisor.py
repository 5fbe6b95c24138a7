"""Keeps one command running: ready check, log lines with a label, restarts with growing pauses, and no orphans.

It knows nothing of the host nor of the queue. A command ends with the process that supervises it, however that ends:
the kernel kills it when the supervising thread is gone (Linux), and `lifeline` ends it when a pipe closes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from comfy_parallel.fleet.lifeline import LIFELINE

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
# Replaces itself by the command, which keeps the request to be killed when the supervising thread ends.
_BOOT = f"""
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is to be started. `env` is the whole environment; `pass_fds` are closed here once it has started."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None = None
    pass_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds. A command that is not ready in time is ended; one that ran long enough starts again at once."""

    ready_within_s: float = 600.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    healthy_after_s: float = 60.0


class Supervisor:
    """Keeps one command running until `stop`.

    `prepare()` gives the command, anew for each start; `is_ready()` is asked until it says yes; `say(line)` gets each
    line that the command writes; `ended(reason)` is called after each end, when no process of it is left.
    """

    def __init__(
        self,
        label: str,
        prepare: Callable[[], Command],
        is_ready: Callable[[], bool],
        *,
        say: Callable[[str], None] | None = None,
        ended: Callable[[str], None] = lambda reason: None,
        timing: Timing | None = None,
    ) -> None:
        self.label = label
        self.restarts = 0
        self.last_end: str | None = None
        self._prepare, self._is_ready, self._ended = prepare, is_ready, ended
        self._say = say or (lambda line: logger.info("[%s] %s", label, line))
        self._timing = timing or Timing()
        self._process: subprocess.Popen[str] | None = None
        self._has_worked = False
        self._killed_because: str | None = None
        self._lock = threading.Lock()
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"supervisor-{label}")

    @property
    def pid(self) -> int | None:
        """The command's process id; None while it does not run."""
        with self._lock:
            return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether the command runs and has said that it is ready."""
        return self._ready.is_set()

    @property
    def state(self) -> str:
        """`stopped`, `ready`, `starting`, or `waiting` between two starts."""
        if self._stopping.is_set():
            return "stopped"
        return "ready" if self.is_ready else "waiting" if self.pid is None else "starting"

    def note_work(self) -> None:
        """The command has done what it is for: should it end, it starts again after the shortest pause."""
        self._has_worked = True

    def expect_end(self) -> None:
        """The command is not ready any more, for it is about to end."""
        self._ready.clear()

    def start(self) -> None:
        """Start the command, on a thread of its own; returns at once."""
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the command is ready; False when it is not within `timeout_s`."""
        return self._ready.wait(timeout_s)

    def kill(self, reason: str) -> None:
        """End the command at once, with all that it has started; it is started again."""
        with self._lock:
            if self._process is not None:
                self._killed_because = reason
                _kill_group(self._process.pid, signal.SIGKILL)

    def stop(self, grace_s: float = 5.0) -> None:
        """End the command for good: it is asked to, and killed after `grace_s`. Safe to call twice."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                _kill_group(self._process.pid, signal.SIGTERM)
        if self._thread.is_alive():
            self._thread.join(grace_s)
        if self._thread.is_alive():
            self.kill(f"it did not end within {grace_s:g} s")
            self._thread.join(grace_s)

    def _run(self) -> None:
        pause_s = self._timing.first_pause_s
        while not self._stopping.is_set():
            began = time.monotonic()
            self.last_end = reason = self._run_once()
            self._ended(reason)
            if self._stopping.is_set():
                return
            if self._has_worked or time.monotonic() - began > self._timing.healthy_after_s:
                self._has_worked = False
                pause_s = self._timing.first_pause_s
            logger.error("[%s] %s; it is started again in %.1f s", self.label, reason, pause_s)
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, self._timing.longest_pause_s)
            self.restarts += 1

    def _run_once(self) -> str:
        """Start the command and wait for its end; returns why it ended."""
        lifeline, held = os.pipe()
        try:
            process = self._spawn(lifeline)
        except OSError as error:
            os.close(lifeline)
            os.close(held)
            return f"could not be started: {error}"
        os.close(lifeline)
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True, name=f"log-{self.label}")
        reader.start()
        try:
            if not self._await_ready(process):
                self.kill(f"not ready within {self._timing.ready_within_s:g} s")
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self._ready.clear()
            with self._lock:  # Its number stays taken until it is waited for, so no stranger is killed.
                _kill_group(process.pid, signal.SIGKILL)
                self._process = None
                status = process.wait()
                because, self._killed_because = self._killed_because, None
        finally:
            os.close(held)
        reader.join(1.0)
        return _why(status) if because is None else f"was ended by force: {because}"

    def _spawn(self, lifeline: int) -> subprocess.Popen[str]:
        command = self._prepare()
        boot = [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid())]
        try:
            with self._lock:
                process = self._process = subprocess.Popen(
                    [*boot, *command.argv],
                    env={**command.env, LIFELINE: str(lifeline)},
                    cwd=command.cwd,
                    pass_fds=(*command.pass_fds, lifeline),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl+C is for the supervising process, which ends this one in order.
                )
        finally:
            for fd in command.pass_fds:
                os.close(fd)
        if self._stopping.is_set():  # `stop` may have come before there was anything to stop.
            _kill_group(process.pid, signal.SIGKILL)
        return process

    def _await_ready(self, process: subprocess.Popen[str]) -> bool:
        """Whether it was ready, or has ended, in time."""
        deadline = time.monotonic() + self._timing.ready_within_s
        while time.monotonic() < deadline:
            if self._is_ready():
                self._ready.set()
                return True
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return True
            time.sleep(_POLL_S)
        return False

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            text = line.rstrip("\n").rpartition("\r")[2]
            if text:
                self._say(text)


def _kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _why(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
