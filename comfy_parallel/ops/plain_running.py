"""Several complete ComfyUIs where processes cannot be supervised (Windows): started once, and ended together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from comfy_parallel.fleet import whole_host
from comfy_parallel.fleet.whole_host import Install, WholeHost

_LOOK_S = 0.5
_GRACE_S = 10.0


class PlainRunning:
    """Starts the ComfyUIs, each with a log file. One that ends is told of, and not started again."""

    def __init__(self, hosts: Sequence[WholeHost], install: Install, *, pause_s: float = 0.0) -> None:
        self._hosts, self._install, self._pause_s = hosts, install, pause_s
        self._running: list[tuple[WholeHost, subprocess.Popen[bytes], IO[bytes]]] = []

    def until_ended(self) -> int:
        """Start them; returns when all have ended, or Ctrl+C has ended them."""
        _say("here ComfyUIs that end are not started again, and end with this window only by Ctrl+C")
        try:
            for host in self._hosts:
                self._start(host)
                time.sleep(self._pause_s)
            while self._running:
                self._forget_ended()
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            _say("ending all")
        finally:
            self._stop()
        return 0

    def _start(self, host: WholeHost) -> None:
        command = whole_host.prepare(host, self._install)
        path = whole_host.log_file(host, self._install)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        process = subprocess.Popen(
            command.argv, env=dict(command.env), cwd=command.cwd, stdout=log, stderr=subprocess.STDOUT
        )
        self._running.append((host, process, log))
        _say(f"{host.label}: starting on {host.url}, log {path}")

    def _forget_ended(self) -> None:
        for one in list(self._running):
            host, process, log = one
            if process.poll() is not None:
                _say(f"{host.label}: ended with status {process.returncode}")
                log.close()
                self._running.remove(one)

    def _stop(self) -> None:
        for _, process, _ in self._running:
            process.terminate()
        for _, process, log in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            process.wait()
            log.close()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
