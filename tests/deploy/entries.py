"""What any server before ComfyUI must do, whichever it is: who is let in, what a port and a path say."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import websocket

from tests.deploy.conftest import Need
from tests.deploy.real_nginx import ALL_SLOTS, SLOT_PORTS, Echo, Nginx, Reply
from tests.host.jobs import progress
from tests.host.server import HostServer

TOKEN, OTHER_TOKEN = "Abcdefgh.+/12345", "0123456789abcdef0123456789abcdef"
PASSWORD = "Basic " + base64.b64encode(b"ann:open sesame").decode()
AUTHS = ("none", "basic", "bearer")
ADDRESSES = [(8181, "/ws"), (8182, "/queue"), (ALL_SLOTS, "/"), (ALL_SLOTS, "/gpu1/ws"), (ALL_SLOTS, "/gpu0/prompt")]
TIMEOUT_S = 60

Served = Callable[..., Nginx]

WEBSOCKETS = [
    *((port, "/ws", slot) for slot, port in enumerate(SLOT_PORTS)),
    (ALL_SLOTS, "/ws", None),
    (ALL_SLOTS, "/gpu1/ws", 1),
    (ALL_SLOTS, "/gpu3/api/ws", 3),
]
LARGEST_BYTES = 100 << 20  # of a body, ComfyUI's own limit

# Requests by which a client could try to say another slot than 0, which port 8181 and the path /gpu0/ say.
SPOOFS = {
    "HTTP/1.0": "GET {path} HTTP/1.0\r\nX-TARGET-GPU: 1\r\n\r\n",
    "twice, with spaces": "GET {path} HTTP/1.1\r\n{end}X-TARGET-GPU:   1  \r\nx-target-gpu:\t2\t\r\n\r\n",
    "in one line": "GET {path} HTTP/1.1\r\n{end}X-Target-Gpu: 1, 2\r\n\r\n",
    "folded": "GET {path} HTTP/1.1\r\n{end}X-TARGET-GPU:\r\n 1\r\n\r\n",
    "folded into another": "GET {path} HTTP/1.1\r\n{end}X-Other: a\r\n X-TARGET-GPU: 1\r\n\r\n",
    "empty": "GET {path} HTTP/1.1\r\n{end}X-TARGET-GPU:\r\n\r\n",
    "a bare line feed": "GET {path} HTTP/1.1\r\n{end}X-Other: a\nX-TARGET-GPU: 1\r\n\r\n",
    "named by Connection": (
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close, X-TARGET-GPU\r\nX-TARGET-GPU: 1\r\n\r\n"
    ),
    "named by a second Connection": "GET {path} HTTP/1.1\r\n{end}Connection: x-target-gpu\r\n\r\n",
    "an address with a host": "GET http://x{path} HTTP/1.1\r\n{end}X-TARGET-GPU: 1\r\n\r\n",
    "chunked": (
        "POST {path} HTTP/1.1\r\n{end}X-TARGET-GPU: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
    ),
    "a trailer": (
        "POST {path} HTTP/1.1\r\n{end}Trailer: X-TARGET-GPU\r\nTransfer-Encoding: chunked\r\n\r\n"
        "2\r\n{{}}\r\n0\r\nX-TARGET-GPU: 1\r\n\r\n"
    ),
    "a method of one's own": "GET {path} HTTP/1.1\r\n{end}X-TARGET-GPU: 1\r\nX-HTTP-Method-Override: POST\r\n\r\n",
}


def make_options(need: Need, folder: Path, hashing: list[str]) -> dict[str, list[str]]:
    """The arguments for TLS and each kind of password, with files that exist.

    Args:
        hashing: the command that hashes `open sesame` for this server.
    """
    cert, key, passwords, tokens = (folder / name for name in ("cert.pem", "key.pem", "passwords", "tokens"))
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = [need("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*new, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    hashed = subprocess.run(hashing, check=True, capture_output=True, text=True).stdout
    passwords.write_text(f"ann:{hashed}")
    tokens.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    auths = {"none": [], "basic": ["--auth", "basic", str(passwords)], "bearer": ["--auth", "bearer", str(tokens)]}
    return {"tls": ["--tls", str(cert), str(key)], **auths}


def assert_let_in(entry: Nginx, echo: Echo, header: str, *, tls: bool) -> None:
    """With this header everywhere, and ComfyUI does not hear it."""
    for port, path in ADDRESSES:
        assert entry.call(port, "GET", path, Authorization=header).status == 200
        assert "authorization" not in echo.requests[-1]["headers"]
        assert echo.requests[-1]["headers"]["x-forwarded-proto"] == ("https" if tls else "http")


def assert_refused(
    entry: Nginx, echo: Echo, auth: str, header: str | None, addresses: Sequence[tuple[int, str]] = ADDRESSES
) -> None:
    """With this header everywhere, and ComfyUI hears nothing."""
    before = len(echo.requests)
    for port, path in addresses:
        reply = entry.call(port, "GET", path, **({} if header is None else {"Authorization": header}))
        assert reply.status == 401
        assert reply.headers["www-authenticate"].startswith(auth.title())
        assert auth == "basic" or reply.json["error"]["type"] == "unauthorized"
    assert len(echo.requests) == before


def assert_sent_to_https(entry: Nginx) -> None:
    """Plain HTTP on a port that speaks TLS."""
    port = entry.ports[ALL_SLOTS]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", "/gpu1/prompt?a=b", b"{}")
    reply = connection.getresponse()
    connection.close()
    assert (reply.status, reply.headers["Location"]) == (308, f"https://127.0.0.1:{port}/gpu1/prompt?a=b")


def assert_says(entry: Nginx, echo: Echo, spelling: str, port: int, path: str, slot: str) -> None:
    """A port or a path says which slot, whatever a client's header of this spelling says, twice."""
    connection = http.client.HTTPConnection("127.0.0.1", entry.ports[port], timeout=TIMEOUT_S)
    connection.putrequest("GET", path)
    for value in ("1", "2"):
        connection.putheader(spelling, value)
    connection.endheaders()
    assert connection.getresponse().status == 200
    connection.close()
    heard = echo.requests[-1]["headers"]
    assert {name: value for name, value in heard.items() if "target" in name} == {"x-target-gpu": slot}


def assert_not_passed_on_with_a_space(entry: Nginx, echo: Echo) -> None:
    """A header with a space before its colon."""
    before = len(echo.requests)
    with socket.create_connection(("127.0.0.1", entry.ports[8181]), timeout=TIMEOUT_S) as raw:
        raw.sendall(b"GET /queue HTTP/1.1\r\nHost: x\r\nX-TARGET-GPU : 1\r\nConnection: close\r\n\r\n")
        status = raw.makefile("rb").readline().split()[1]
    assert status in (b"200", b"400")
    assert [request["headers"]["x-target-gpu"] for request in echo.requests[before:]] in ([], ["0"])


def assert_raw_request_says(entry: Nginx, echo: Echo, request: str, port: int, path: str, slot: str) -> None:
    """Slot `slot` is what ComfyUI hears of a request of SPOOFS; or nothing, when it is refused."""
    before = len(echo.requests)
    text = request.format(path=path, end="Host: x\r\nConnection: close\r\n")
    with socket.create_connection(("127.0.0.1", entry.ports[port]), timeout=TIMEOUT_S) as raw:
        raw.sendall(text.encode())
        status = int(raw.makefile("rb").readline().split()[1])
    heard = [
        {name: value for name, value in each["headers"].items() if "target" in name} for each in echo.requests[before:]
    ]
    assert (status, heard) in ((200, [{"x-target-gpu": slot}]), (400, []))


def assert_hears_its_own_job(entry: Nginx, host: HostServer, port: int, path: str, slot: int | None) -> None:
    """A WebSocket through this port and path hears the events and previews of the job that came the same way."""
    client_id = uuid.uuid4().hex
    url = f"ws://127.0.0.1:{entry.ports[port]}{path}?clientId={client_id}"
    heard = websocket.create_connection(url, timeout=TIMEOUT_S)
    try:
        body = {"prompt": progress(uuid.uuid4().int % 10**6, steps=6, ms=30), "client_id": client_id}
        reply = entry.call(port, "POST", path.replace("/ws", "/prompt"), body)
        assert (reply.status, reply.json["gpu_id"]) == (200, slot)
        kinds, previews = [], 0
        while "execution_success" not in kinds:
            message = heard.recv()
            if isinstance(message, bytes):
                previews += b"JFIF" in message[:64]
            elif json.loads(message)["data"].get("prompt_id") == reply.json["prompt_id"]:
                kinds.append(json.loads(message)["type"])
    finally:
        heard.close()
    assert {"execution_start", "executing", "progress", "executed"} <= set(kinds)
    assert previews
    ended = host.wait([reply.json["prompt_id"]])[reply.json["prompt_id"]]
    assert slot in (None, ended["gpu_id"])


def upload(entry: Nginx, port: int, path: str, size: int) -> tuple[Reply, str, int]:
    """The answer to a body of so many bytes with a file, that file's name and its size."""
    name, mark = f"upload {uuid.uuid4().hex}.png", uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    tail = f"\r\n--{mark}--\r\n".encode()
    file_size = size - len(head) - len(tail)
    body = head + bytes(file_size) + tail
    return entry.call(port, "POST", path, body, Content_Type=f"multipart/form-data; boundary={mark}"), name, file_size


def assert_takes_files_as_large_as_comfyui_does(entry: Nginx, host: HostServer) -> None:
    """Neither the entry nor ComfyUI loses a byte of the largest upload; a file of one byte more is refused."""
    for port, path in [(SLOT_PORTS[0], "/upload/image"), (ALL_SLOTS, "/gpu1/api/upload/image")]:
        reply, name, size = upload(entry, port, path, LARGEST_BYTES)
        assert (reply.status, reply.json["name"]) == (200, name)
        file = host.base_dir / "input" / name
        assert file.stat().st_size == size
        file.unlink()
    for too_much in (300, 1 << 20, 2 << 20):  # Of the first two it is ComfyUI that says so.
        reply, name, _ = upload(entry, SLOT_PORTS[0], "/upload/image", LARGEST_BYTES + too_much)
        assert reply.status == 413
        assert not (host.base_dir / "input" / name).exists()
