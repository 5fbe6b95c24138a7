"""Several complete ComfyUIs at a terminal: their lines together, and an end that leaves nobody."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from comfy_parallel.fleet.supervisor import Timing
from comfy_parallel.fleet.watched_host import WatchedHost
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.weights.files import group
from comfy_parallel.weights.files.group_server import GroupServer

GRACE_S = 10.0
STARTS = 5  # One that was never ready is not started more often.
_LOOK_S = 0.2
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Running:
    """Starts the ComfyUIs and keeps them running; what one of them converts of its weights, the others share.

    Args:
        one_by_one: each when the one before is ready, or has failed.
        pause_s: between two starts.
        grace_s: what they have to end in, before they are killed.
    """

    def __init__(
        self,
        hosts: Sequence[WholeHost],
        install: Install,
        *,
        silent_s: float = 300.0,
        one_by_one: bool = False,
        pause_s: float = 0.0,
        grace_s: float = GRACE_S,
        timing: Timing | None = None,
    ) -> None:
        self._terminal = Terminal()
        self._group = GroupServer()
        install = replace(install, env={**install.env, group.VARIABLE: self._group.name})
        self._hosts = [
            WatchedHost(host, install, echo=self._labelled(host.label), silent_s=silent_s, timing=timing)
            for host in hosts
        ]
        self._one_by_one, self._pause_s, self._grace_s = one_by_one, pause_s, grace_s
        self._ending, self._at_once = threading.Event(), threading.Event()
        self._told: set[str] = set()

    def until_ended(self) -> int:
        """Start them; returns 0 when a signal has ended all of them, 1 when one of them cannot be started."""
        logging.basicConfig(level=logging.INFO, format="comfy-parallel: %(message)s", stream=sys.stderr)
        before = {number: signal.signal(number, self._end) for number in _SIGNALS}
        try:
            self._start()
            return self._watch()
        finally:
            self._stop()
            self._group.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: Any) -> None:
        if self._ending.is_set():
            self._at_once.set()
        self._ending.set()

    def _start(self) -> None:
        for host in self._hosts:
            if self._ending.is_set():
                return
            self._terminal.write(f"{host.host.label}: starting on {host.host.url}, log {host.log.path}")
            host.start()
            while self._one_by_one and not self._ending.is_set() and host.state != "ready" and not _fails(host):
                self._ending.wait(_LOOK_S)
            self._ending.wait(self._pause_s)

    def _watch(self) -> int:
        while not self._ending.wait(_LOOK_S):
            self._tell_ready()
            failing = next((host for host in self._hosts if _fails(host)), None)
            if failing is not None:
                self._terminal.write(
                    f"{failing.host.label}: could not be started {STARTS} times, it {failing.last_end}; all are ended. "
                    f"Its last words are in {failing.log.path}"
                )
                return 1
        self._terminal.write("ending all")
        return 0

    def _tell_ready(self) -> None:
        for host in self._hosts:
            if host.state == "ready" and host.host.label not in self._told:
                self._told.add(host.host.label)
                self._terminal.write(f"{host.host.label}: ready on {host.host.url}")

    def _stop(self) -> None:
        threads = [threading.Thread(target=host.stop, args=(self._grace_s,)) for host in self._hosts]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self._at_once.wait(_LOOK_S):
                for host in self._hosts:
                    host.kill("it was to end at once")
                time.sleep(_LOOK_S)

    def _labelled(self, label: str) -> Callable[[str], None]:
        return lambda line: self._terminal.write(f"[{label}] {line}")


class Terminal:
    """Standard output, for threads. One that is closed is written to no more; what runs goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False

    def write(self, line: str) -> None:
        """Write a line."""
        with self._lock:
            if self._is_closed:
                return
            try:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            except (OSError, ValueError):
                self._is_closed = True


def _fails(host: WatchedHost) -> bool:
    return not host.was_ready and host.restarts >= STARTS
