"""Hosts that test files share: one per way of starting it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.host.server import HostServer, HostServerError

SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.05


class ServerPool:
    """`pool(slots="cpu,cpu", env=…, args=…)` is a running host with an empty queue, the same one for the same options.

    Its history, files and counters are those of all tests before; what a test expects, it compares with before. A
    host that has died or whose jobs do not end is replaced.
    """

    def __init__(self, start: Callable[..., HostServer]) -> None:
        self._start = start
        self._servers: dict[str, HostServer] = {}

    def __call__(self, **options: Any) -> HostServer:
        key = json.dumps(options, sort_keys=True)
        if key in self._servers and not _settles(self._servers[key]):
            self._servers.pop(key).stop()
        if key not in self._servers:
            self._servers[key] = self._start(**options)
        return self._servers[key]


def _settles(server: HostServer) -> bool:
    """Whether the host ends what earlier tests have left in it."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while server.is_running and time.monotonic() < deadline:
        try:
            queue = server.request("GET", "/queue")[1]
            if not queue["queue_running"] and not queue["queue_pending"]:
                return True
            server.request("POST", "/queue", {"clear": True})
            server.request("POST", "/interrupt", {})
        except (OSError, HostServerError):
            return False
        time.sleep(POLL_S)
    return False


@contextmanager
def server_pool(host_dir: Path, make_base_dir: Callable[[], Path], models: Path) -> Iterator[ServerPool]:
    """A pool whose hosts are stopped at the end."""
    with ExitStack() as started:

        def start(**options: Any) -> HostServer:
            home = make_base_dir()
            (home / "models").symlink_to(models, target_is_directory=True)
            return started.enter_context(HostServer(host_dir, home, **options))

        yield ServerPool(start)
