"""A launcher that runs, and what it has started."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.free_ports import free_ports
from tests.host.server import JSON, REPO_DIR, HostServer, clean_environment

LIMIT_S = 180.0


class Launched:
    """A running launcher with two ComfyUIs; `hosts` talk to these and start nothing themselves."""

    def __init__(
        self,
        host_dir: Path,
        base_dir: Path,
        models_dir: Path,
        checkpoint: str = "a.safetensors",
        *,
        gpus: str = "cpu,cpu",
        args: Sequence[str] = (),
    ) -> None:
        self.base_dir, self.port = base_dir, free_ports(2)
        base_dir.mkdir(exist_ok=True)
        (base_dir / "models").symlink_to(models_dir, target_is_directory=True)
        self.hosts = [HostServer(host_dir, base_dir) for _ in range(2)]
        for index, host in enumerate(self.hosts):
            host.port = self.port + index
        self.log_path = base_dir / "launcher.log"
        arguments = ["--gpus", gpus, "--base-port", str(self.port), "--comfyui", str(host_dir)]
        arguments += ["--checkpoint", checkpoint, "--", "--base-directory", str(base_dir), "--disable-api-nodes", *args]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "comfy_parallel", "launch", *arguments],
                cwd=REPO_DIR,
                env={**clean_environment(), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        """Of the ComfyUIs that run now."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_one(path)]

    def _is_one(self, process: Path) -> bool:
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return b"main.py" in words and str(self.base_dir).encode() in words

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def eventually(holds: Callable[[], object], launched: Launched) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert launched.process.poll() is None, launched.log()[-5000:]
        assert time.monotonic() < deadline, launched.log()[-5000:]
        time.sleep(0.1)


def ended(launched: Launched, host: HostServer, job_id: str) -> JSON:
    """A job's history entry, once it is there."""
    found: JSON = {}

    def is_there() -> bool:
        found.update(host.request("GET", f"/history/{job_id}")[1])
        return job_id in found

    eventually(is_there, launched)
    entry: JSON = found[job_id]
    return entry


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
