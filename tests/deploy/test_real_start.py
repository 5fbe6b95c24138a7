"""The first three steps of a new user, on a real ComfyUI: start, check, stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


@pytest.fixture
def ctrl_c_reaches_children() -> Iterator[None]:
    """What a shell's script starts in the background ignores Ctrl+C, and so does whatever that starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def await_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except OSError:
            ended = process.poll() is not None
        assert not ended, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ctrl_c_reaches_children")
def test_starts_a_real_comfyui_that_passes_the_quick_test_and_stops_on_ctrl_c(
    plain_env: dict[str, str], tmp_path: Path, host_dir: Path
) -> None:
    (tmp_path / "base" / "custom_nodes").mkdir(parents=True)
    (tmp_path / "base" / "custom_nodes" / "comfy_parallel").symlink_to(REPO_DIR)
    env = {**plain_env, "COMFYUI_PYTHON": sys.executable}
    port, log = free_port(), tmp_path / "it.log"
    command: list[str | Path] = [
        REPO_DIR / "start_multi_gpu.sh",
        "--comfyui",
        host_dir,
        "--devices",
        "cpu,cpu",
        "--log-file",
        log,
    ]
    command += ["--base-directory", tmp_path / "base", "--port", str(port)]
    command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            await_answer(process, f"http://127.0.0.1:{port}/queue", log)
            checked = subprocess.run(
                [REPO_DIR / "quick_test.sh", "--url", f"http://127.0.0.1:{port}"],
                capture_output=True,
                text=True,
                timeout=240,
            )
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=TIMEOUT_S)  # returns when the log is complete, too
        finally:
            process.kill()
    assert checked.returncode == 0, checked.stdout + checked.stderr + log.read_text()[-4000:]
    assert "passed: 2 slots" in checked.stdout
    assert process.returncode == 0
    assert "Stopped server" in log.read_text()
