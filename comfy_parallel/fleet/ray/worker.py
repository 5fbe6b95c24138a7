"""What runs on a machine of a Ray cluster: an actor that keeps one ComfyUI and ends with it, to be started again.

Ray is sent this module's code as it is, for the machine's Python need not know this package. So all that it uses is
Python's own and Ray.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_PREFIX = "comfy_parallel-ray-"
_OURS = ("COMFY_PARALLEL_", "COMFY_MULTI_GPU_SCHED", "COMFY_NUM_GPUS")
_LIFELINE = "COMFY_PARALLEL_LIFELINE"  # fleet/lifeline.py reads it
_POLL_S = 0.1
_ANSWER_S = 5.0
_READY_WITHIN_S = 600.0
_SHORT_LIFE_S, _PAUSE_S = 30.0, 5.0
_FOLDERS = ("output", "temp", "input", "user")
# Replaces itself by ComfyUI, which the kernel ends with the thread that has started it.
_BOOT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Worker:
    """A ComfyUI on this machine, which answers only who knows its secret.

    Args:
        comfyui: its folder, unless COMFYUI_PATH on this machine says another.
        arguments: of its command line.
        env: variables that it gets besides this machine's.
    """

    def __init__(self, comfyui: str, arguments: Sequence[str], env: Mapping[str, str], secret: str) -> None:
        import ray

        self._ip, self._secret = ray.util.get_node_ip_address(), secret
        self._comfyui = Path(os.environ.get("COMFYUI_PATH") or comfyui)
        if not (self._comfyui / "main.py").is_file():
            time.sleep(_PAUSE_S)  # Ray tries again at once.
            raise FileNotFoundError(
                f"{socket.gethostname()}: no ComfyUI in {self._comfyui}; start Ray there with COMFYUI_PATH set"
            )
        _remove_left_behind()
        self._home = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._port = _free_port(self._ip)
        self._failure = ""
        threading.Thread(target=self._keep, args=(list(arguments), dict(env)), name="comfyui").start()

    def describe(self) -> tuple[str, str]:
        """Its address and the machine's name, once it answers.

        Raises:
            RuntimeError: when it cannot be used.
        """
        deadline = time.monotonic() + _READY_WITHIN_S
        while (status := self._status({})) is None:
            if time.monotonic() > deadline:
                self._give_up(f"it did not answer within {_READY_WITHIN_S:g} s")
            time.sleep(_POLL_S)
        if status != 401:
            self._give_up(f"the ComfyUI in {self._comfyui} has no comfy_parallel that is on; link it there")
        return f"http://{self._ip}:{self._port}", socket.gethostname()

    def watch(self) -> None:
        """Return never: who waits for this learns of the end."""
        threading.Event().wait()

    def fetch(self, path: str) -> bytes:
        """What its ComfyUI answers to a request, for Ray's object store."""
        with self._open(path, None) as reply:
            return bytes(reply.read())

    def bring(self, path: str, value: bytes) -> None:
        """Send its ComfyUI a value out of Ray's object store."""
        with self._open(path, value):
            return

    def _open(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(
            f"http://{self._ip}:{self._port}{path}",
            data,
            {"Authorization": f"Bearer {self._secret}", "Content-Type": "application/octet-stream"},
            method="GET" if data is None else "PUT",
        )
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_READY_WITHIN_S)

    def _status(self, headers: Mapping[str, str]) -> int | None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://{self._ip}:{self._port}/queue", headers=dict(headers))
        try:
            with opener.open(request, timeout=_ANSWER_S) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError:
            return None

    def _give_up(self, reason: str) -> None:
        logger.error("%s", reason)
        threading.Timer(_PAUSE_S, self._end).start()
        raise RuntimeError(f"{socket.gethostname()}: {reason}")

    def _keep(self, arguments: list[str], env: dict[str, str]) -> None:
        """Run ComfyUI, on the thread with which it ends; afterwards this process ends, too."""
        began = time.monotonic()
        lifeline, held = os.pipe()
        os.set_inheritable(lifeline, True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        command = [sys.executable, "main.py", *arguments, *self._own_arguments()]
        boot = [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid())]
        process = subprocess.Popen(
            [*boot, *command],
            cwd=self._comfyui,
            env={**kept, **env, _LIFELINE: str(lifeline)},
            stdin=subprocess.DEVNULL,
            pass_fds=(lifeline,),
            start_new_session=True,
        )
        os.close(lifeline)
        status = process.wait()
        logger.error("ComfyUI ended with status %d", status)
        os.close(held)
        if time.monotonic() - began < _SHORT_LIFE_S:
            time.sleep(_PAUSE_S)
        self._end()

    def _own_arguments(self) -> list[str]:
        found = ["--listen", self._ip, "--port", str(self._port), "--disable-auto-launch"]
        for name in _FOLDERS:
            (self._home / name).mkdir()
            found += [f"--{name}-directory", str(self._home / name)]
        return found

    def _end(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        os._exit(1)  # To Ray that is a crash, so it starts this actor again.


def _free_port(ip: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def _remove_left_behind() -> None:
    """Remove the folders of actors that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
