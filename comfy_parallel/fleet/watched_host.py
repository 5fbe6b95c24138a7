"""Keeps one complete ComfyUI running: started again when it ends or answers no more, with its lines in a log."""

from __future__ import annotations

import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from comfy_parallel.fleet import whole_host
from comfy_parallel.fleet.log_file import LogFile
from comfy_parallel.fleet.supervisor import Command, Supervisor, Timing
from comfy_parallel.fleet.whole_host import Install, WholeHost

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_ANSWER_S = 10.0
_NOT_READY = 503


class WatchedHost:
    """One complete ComfyUI. `echo(line)` gets its lines too; one that has not answered for `silent_s` is ended."""

    def __init__(
        self,
        host: WholeHost,
        install: Install,
        *,
        echo: Callable[[str], None] = lambda line: None,
        silent_s: float = 300.0,
        timing: Timing | None = None,
    ) -> None:
        self.host, self.install = host, install
        self.log = LogFile(whole_host.log_file(host, install))
        self.was_ready = False
        self._echo, self._silent_s = echo, silent_s
        self._stopping = threading.Event()
        self._supervisor = Supervisor(
            host.label, self._prepare, self._is_ready, say=self._say, ended=self._note_end, timing=timing
        )
        self._watch = threading.Thread(target=self._look, daemon=True, name=f"watch-{host.label}")

    @property
    def pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def state(self) -> str:
        """`starting`, `ready`, `waiting` before the next start, or `stopped`."""
        return self._supervisor.state

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def last_end(self) -> str | None:
        return self._supervisor.last_end

    def start(self) -> None:
        """Start it; returns at once."""
        self._supervisor.start()
        self._watch.start()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until it takes jobs; False when it does not within `timeout_s`."""
        return self._supervisor.wait_ready(timeout_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """End it for good: it is asked to, and killed after `grace_s`."""
        self._stopping.set()
        self._supervisor.stop(grace_s)

    def kill(self, reason: str) -> None:
        """End it at once; it is started again, unless `stop` was called."""
        self._supervisor.kill(reason)

    def _prepare(self) -> Command:
        command = whole_host.prepare(self.host, self.install)
        self._say(f"--- {self.host.label} starts on {self.host.url}")
        return command

    def _say(self, line: str) -> None:
        self.log.write(line)
        self._echo(line)

    def _note_end(self, reason: str) -> None:
        self._say(f"--- {self.host.label} {reason}")

    def _is_ready(self) -> bool:
        status = answer(f"{self.host.url}/ready")
        self.was_ready = self.was_ready or status not in (None, _NOT_READY)
        return status not in (None, _NOT_READY)

    def _look(self) -> None:
        """End it when it has not answered for too long."""
        answered_at = time.monotonic()
        while not self._stopping.wait(_LOOK_S):
            now = time.monotonic()
            if self.state != "ready" or answer(f"{self.host.url}/ready") is not None:
                answered_at = now
            elif now - answered_at > self._silent_s:
                self.kill(f"it has not answered for {self._silent_s:g} s")


def answer(url: str) -> int | None:
    """The status of the reply to a GET; None without one."""
    try:
        with _opener(url).open(url, timeout=_ANSWER_S) as reply:
            status: int = reply.status
            return status
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code
    except (OSError, ValueError):  # Nothing listens yet, or what does speaks no HTTP yet.
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """It is on this machine: no proxy is between, and its certificate is for another name."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))
    return urllib.request.build_opener(*handlers)
