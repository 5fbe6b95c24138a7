"""A real nginx with a given configuration on free ports, and a server that remembers what nginx sends to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.ports import free_port

ALL_SLOTS, SLOT_PORTS, COMFYUI = 8180, (8181, 8182, 8183, 8184), 8188
MAIN_CONFIG = """
{user}
daemon off;
pid {home}/pid;
error_log {home}/error.log info;
events {{}}
http {{
    # An operator may have allowed what nginx drops by default.
    underscores_in_headers on;
    ignore_invalid_headers off;
    access_log {home}/access.log;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    include {home}/comfy_parallel.conf;
}}
"""


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Nginx:
    """A running nginx: the port that stands in for each of its configuration's; TLS by the certificate it trusts."""

    ports: dict[int, int]
    certificate: Path | None = None

    def call(self, port: int, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = self._connection(self.ports[port])
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, sent)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def _connection(self, port: int) -> http.client.HTTPConnection:
        if self.certificate is None:
            return http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        trusted = ssl.create_default_context(cafile=self.certificate)
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusted)


@dataclass
class Echo:
    """Stands in for ComfyUI where only what nginx sends to it matters."""

    server: ThreadingHTTPServer
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])


@contextmanager
def running_nginx(
    program: str, home: Path, text: str, backend_port: int, *, slot_ports: Sequence[int] = SLOT_PORTS
) -> Iterator[Nginx]:
    """An nginx that runs this configuration on free ports, before what listens on `backend_port`."""
    ports = {written: free_port() for written in (ALL_SLOTS, *slot_ports)} | {COMFYUI: backend_port}
    write_config(home, text, ports)
    command = [program, "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")]
    process = subprocess.Popen(command)
    try:
        await_port(process, ports[slot_ports[-1]], home)
        yield Nginx(ports)
    finally:
        process.terminate()
        process.wait(20)


def write_config(home: Path, text: str, ports: dict[int, int]) -> None:
    """Write a whole configuration of nginx around this text, with other ports in it."""
    written = "|".join(map(str, ports))
    text = re.sub(rf"\b({written})\b", lambda found: str(ports[int(found[1])]), text)
    (home / "comfy_parallel.conf").write_text(text)
    # nginx run by root hands its work to another user, who may not enter this folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (home / "nginx.conf").write_text(MAIN_CONFIG.format(user=user, home=home))


def await_port(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, (home / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)


def complaints(program: str, home: Path) -> str:
    """What `nginx -t` says against the configuration that `write_config` wrote; empty if nothing."""
    command = [program, "-t", "-p", str(home), "-e", str(home / "error.log"), "-c", "nginx.conf"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 and "[warn]" not in done.stderr else done.stderr


@contextmanager
def running_echo() -> Iterator[Echo]:
    """A server that answers everything with 200 and remembers what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            heard.requests.append({"path": self.path, "peer": self.client_address[1], "headers": headers})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    self.rfile.read(size + 2)
                while self.rfile.readline().strip():
                    """Trailers, and the empty line after them."""
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    heard = Echo(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    heard.server.daemon_threads = True
    thread = threading.Thread(target=heard.server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield heard
    finally:
        heard.server.shutdown()
        thread.join()
        heard.server.server_close()
