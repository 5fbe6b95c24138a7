"""A real Caddy with a given configuration on free ports."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.real_nginx import ALL_SLOTS, COMFYUI, SLOT_PORTS, Nginx
from tests.ports import free_port


@contextmanager
def running_caddy(
    program: str, home: Path, text: str, backend_port: int, *, slot_ports: Sequence[int] = SLOT_PORTS
) -> Iterator[Nginx]:
    """A Caddy that runs this configuration on free ports, before what listens on `backend_port`."""
    ports = {written: free_port() for written in (ALL_SLOTS, *slot_ports)} | {COMFYUI: backend_port}
    process, log = start(program, home, text, ports)
    try:
        for written in (ALL_SLOTS, *slot_ports):
            await_port(process, ports[written], log)
        yield Nginx(ports)
    finally:
        process.terminate()
        process.wait(20)


def start(program: str, home: Path, text: str, ports: dict[int, int]) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a Caddy with this configuration and other ports in it; its process and its log."""
    written = "|".join(map(str, ports))
    text = re.sub(rf"\b({written})\b", lambda found: str(ports[int(found[1])]), text)
    text = re.sub(r"(?m)^\{\n", "{\n\tadmin off\n", text, count=1)  # Its port is that of every Caddy of the machine.
    (home / "Caddyfile").write_text(text)
    log = home / "caddy.log"
    command = [program, "run", "--config", str(home / "Caddyfile"), "--adapter", "caddyfile"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment(home), stdout=stream, stderr=subprocess.STDOUT)
    return process, log


def complaints(program: str, home: Path, text: str) -> str:
    """What Caddy says against a configuration, or would write otherwise; empty if nothing."""
    path = home / "Caddyfile"
    path.write_text(text)
    command = [program, "validate", "--config", str(path), "--adapter", "caddyfile"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(home))
    tidy = subprocess.run([program, "fmt", str(path)], capture_output=True, text=True, timeout=60)
    found = "" if checked.returncode == 0 and "is not formatted" not in checked.stderr else checked.stderr
    return found or ("" if tidy.stdout == text else tidy.stdout)


def environment(home: Path) -> dict[str, str]:
    """In which Caddy keeps what it keeps in this folder."""
    return {**os.environ, "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)}


def await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
