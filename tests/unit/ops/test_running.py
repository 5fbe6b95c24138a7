"""Complete ComfyUIs at a terminal, with small programs in their place: lines with labels, restarts, an end for all."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from comfy_parallel.fleet.supervisor import Timing
from comfy_parallel.fleet.watched_host import WatchedHost
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.ops.running import Running
from tests.free_ports import free_ports

LIMIT_S = 60.0
QUICK = Timing(first_pause_s=0.01, longest_pause_s=0.02)
READY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("up", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY


@pytest.fixture
def hosts() -> list[WholeHost]:
    first = free_ports(2)
    return [WholeHost(label=f"host {index}", device="cpu", port=first + index) for index in range(2)]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    return Install(
        comfyui=tmp_path, python=sys.executable, folder=tmp_path / "own", has_database=False, env={}, visible=None
    )


def when(holds: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Do this as soon as that holds, while the main thread waits for the end."""

    def watch() -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_signal_ends_all(
    hosts: list[WholeHost], install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(READY)
    running = Running(hosts, install, one_by_one=True, timing=QUICK)
    watching = when(lambda: len(running._told) == 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert running.until_ended() == 0
    watching.join()
    out = capsys.readouterr().out
    assert out.index("[host 0] up") < out.index("host 1: starting on"), "the second waits until the first is ready"
    assert "[host 1] up" in out
    assert all(host.pid is None for host in running._hosts)
    assert "up" in (install.folder / "logs" / f"comfyui-{hosts[0].port}.log").read_text()


def test_a_second_signal_ends_those_that_do_not_listen(
    hosts: list[WholeHost], install: Install, tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(DEAF)
    running = Running(hosts[:1], install, timing=QUICK, grace_s=10 * LIMIT_S)
    began = time.monotonic()
    first = when(lambda: running._told, lambda: os.kill(os.getpid(), signal.SIGINT))
    second = when(running._ending.is_set, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert running.until_ended() == 0
    first.join()
    second.join()
    assert time.monotonic() - began < 5 * LIMIT_S
    assert running._hosts[0].pid is None


def test_one_that_never_starts_ends_all_with_the_reason(
    hosts: list[WholeHost], install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text("import sys; print('no such argument'); sys.exit(2)")
    assert Running(hosts, install, timing=QUICK).until_ended() == 1
    out = capsys.readouterr().out
    assert "no such argument" in out
    assert "could not be started 5 times, it ended with status 2; all are ended" in out


def test_one_that_answers_no_more_is_started_again(
    hosts: list[WholeHost], install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comfy_parallel.fleet.watched_host._LOOK_S", 0.05)
    monkeypatch.setattr("comfy_parallel.fleet.watched_host._ANSWER_S", 0.2)
    (tmp_path / "main.py").write_text(READY)
    watched = WatchedHost(hosts[0], install, silent_s=0.5, timing=QUICK)
    watched.start()
    try:
        assert watched.wait_ready(LIMIT_S)
        pid = watched.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + LIMIT_S
        while not watched.restarts:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert watched.last_end == "was ended by force: it has not answered for 0.5 s"
    finally:
        watched.stop()
