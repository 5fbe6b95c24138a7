"""What any server before ComfyUI must do, whichever it is: who is let in, what a port and a path say."""

from __future__ import annotations

import base64
import http.client
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.deploy.conftest import Need
from tests.deploy.real_nginx import ALL_SLOTS, Echo, Nginx

TOKEN, OTHER_TOKEN = "Abcdefgh.+/12345", "0123456789abcdef0123456789abcdef"
PASSWORD = "Basic " + base64.b64encode(b"ann:open sesame").decode()
AUTHS = ("none", "basic", "bearer")
ADDRESSES = [(8181, "/ws"), (8182, "/queue"), (ALL_SLOTS, "/"), (ALL_SLOTS, "/gpu1/ws"), (ALL_SLOTS, "/gpu0/prompt")]
TIMEOUT_S = 60

Served = Callable[..., Nginx]


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
