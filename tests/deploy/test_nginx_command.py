"""What `comfy-parallel nginx` prints, in a real nginx: any number of slots, TLS, both kinds of passwords."""

from __future__ import annotations

import base64
import http.client
import io
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest

from comfy_parallel.ops.cli import main
from tests.deploy.conftest import Need
from tests.deploy.real_nginx import ALL_SLOTS, Echo, Nginx, complaints, running_echo, running_nginx, write_config

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(120)]

TOKEN, OTHER_TOKEN = "Abcdefgh.+/12345", "0123456789abcdef0123456789abcdef"
AUTHS = ("none", "basic", "bearer")
PASSWORD = "Basic " + base64.b64encode(b"ann:open sesame").decode()


@pytest.fixture(scope="module")
def options(need: Need, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments for TLS and each kind of password, with files that exist."""
    folder = tmp_path_factory.mktemp("nginx's files")
    cert, key, passwords, tokens = (folder / name for name in ("cert.pem", "key.pem", "passwords", "tokens"))
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = [need("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*new, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    hashed = subprocess.run(
        [need("openssl"), "passwd", "-6", "open sesame"], check=True, capture_output=True, text=True
    ).stdout
    passwords.write_text(f"ann:{hashed}")
    tokens.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    auths = {"none": [], "basic": ["--auth", "basic", str(passwords)], "bearer": ["--auth", "bearer", str(tokens)]}
    return {"tls": ["--tls", str(cert), str(key)], **auths}


def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert main(["nginx", *arguments]) == 0
    return out.getvalue()


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("tls", [False, True])
def test_nginx_accepts_it_for_1_to_16_slots(
    need: Need, tmp_path: Path, options: dict[str, list[str]], tls: bool, auth: str
) -> None:
    for gpus in range(1, 17):
        more = [*(options["tls"] if tls else []), *options[auth], "--comfyui-port", "8100"]
        write_config(tmp_path, printed("--gpus", str(gpus), *more), {8100: 8100})
        assert complaints(need("nginx"), tmp_path) == "", gpus


def test_nginx_accepts_it_for_99_slots_and_on_ipv6(need: Need, tmp_path: Path) -> None:
    for more in (["--comfyui-port", "8100"], ["--port", "9000", "--listen", "::1"]):
        write_config(tmp_path, printed("--gpus", "99", *more), {8100: 8100})
        assert complaints(need("nginx"), tmp_path) == ""


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with running_echo() as heard:
        yield heard


Served = Callable[..., Nginx]


@pytest.fixture(scope="module")
def served(
    need: Need, echo: Echo, options: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """`served("basic", tls=True)` is an nginx with two slots, before the echo server."""
    running: dict[tuple[str, bool], Nginx] = {}
    with ExitStack() as started:

        def serve(auth: str, *, tls: bool = False) -> Nginx:
            if (auth, tls) not in running:
                text = printed("--gpus", "2", "--listen", "127.0.0.1", *options[auth], *(options["tls"] if tls else []))
                home = tmp_path_factory.mktemp("nginx")
                program = need("nginx")
                nginx = started.enter_context(running_nginx(program, home, text, echo.port, slot_ports=(8181, 8182)))
                nginx.certificate = Path(options["tls"][1]) if tls else None
                running[auth, tls] = nginx
            return running[auth, tls]

        yield serve


GOOD = [("basic", PASSWORD), ("bearer", f"Bearer {TOKEN}"), ("bearer", f"bearer {OTHER_TOKEN}")]
BAD = [
    ("basic", None),
    ("basic", "Basic " + base64.b64encode(b"ann:wrong").decode()),
    ("basic", f"Bearer {TOKEN}"),
    ("bearer", None),
    ("bearer", PASSWORD),
    ("bearer", f"Bearer {TOKEN.lower()}"),
    ("bearer", f"Bearer {TOKEN}x"),
    ("bearer", f"Bearer {TOKEN.replace('+', 'h')}"),
    ("bearer", f"Bearer {TOKEN}, Bearer x"),
    ("bearer", "Bearer "),
]
ADDRESSES = [(8181, "/ws"), (8182, "/queue"), (ALL_SLOTS, "/"), (ALL_SLOTS, "/gpu1/ws"), (ALL_SLOTS, "/gpu0/prompt")]


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(("auth", "header"), GOOD)
def test_who_knows_the_password_is_let_in_and_comfyui_does_not_hear_it(
    served: Served, echo: Echo, auth: str, header: str, tls: bool
) -> None:
    nginx = served(auth, tls=tls)
    for port, path in ADDRESSES:
        assert nginx.call(port, "GET", path, Authorization=header).status == 200
        assert "authorization" not in echo.requests[-1]["headers"]
        assert echo.requests[-1]["headers"]["x-forwarded-proto"] == ("https" if tls else "http")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(("auth", "header"), BAD)
def test_who_does_not_is_refused_everywhere(
    served: Served, echo: Echo, auth: str, header: str | None, tls: bool
) -> None:
    nginx, before = served(auth, tls=tls), len(echo.requests)
    for port, path in ADDRESSES:
        reply = nginx.call(port, "GET", path, **({} if header is None else {"Authorization": header}))
        assert reply.status == 401
        assert reply.headers["www-authenticate"].startswith(auth.title())
        assert auth == "basic" or reply.json["error"]["type"] == "unauthorized"
    assert len(echo.requests) == before


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_jobs_without_a_password_are_refused_and_limited_like_others(served: Served, echo: Echo, auth: str) -> None:
    before = len(echo.requests)
    statuses = {served(auth).call(8182, "POST", "/prompt", {"prompt": {}}).status for _ in range(40)}
    assert 401 in statuses
    assert statuses <= {401, 429}
    assert len(echo.requests) == before


def test_a_websocket_is_asked_for_over_tls_with_a_password(served: Served, echo: Echo) -> None:
    nginx = served("bearer", tls=True)
    nginx.call(8182, "GET", "/ws", Upgrade="websocket", Connection="Upgrade", Authorization=f"Bearer {TOKEN}")
    headers = echo.requests[-1]["headers"]
    assert (headers["upgrade"], headers["connection"], headers["x-target-gpu"]) == ("websocket", "upgrade", "1")


def test_http_on_a_port_with_tls_is_sent_to_https(served: Served) -> None:
    port = served("none", tls=True).ports[ALL_SLOTS]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/gpu1/prompt?a=b", b"{}")
    reply = connection.getresponse()
    connection.close()
    assert (reply.status, reply.headers["Location"]) == (308, f"https://127.0.0.1:{port}/gpu1/prompt?a=b")


@pytest.mark.parametrize(
    "spelling", ["X-TARGET-GPU", "x-target-gpu", "X-Target-Gpu", "X_TARGET_GPU", "x_target-gpu", "X-TARGET_GPU"]
)
@pytest.mark.parametrize(("port", "path", "slot"), [(8181, "/queue", "0"), (ALL_SLOTS, "/gpu0/queue", "0")])
def test_no_spelling_of_the_header_changes_what_a_port_or_a_path_says(
    served: Served, echo: Echo, spelling: str, port: int, path: str, slot: str
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served("none").ports[port], timeout=20)
    connection.putrequest("GET", path)
    for value in ("1", "2"):
        connection.putheader(spelling, value)
    connection.endheaders()
    assert connection.getresponse().status == 200
    connection.close()
    heard = echo.requests[-1]["headers"]
    assert {name: value for name, value in heard.items() if "target" in name} == {"x-target-gpu": slot}


def test_a_header_with_a_space_before_its_colon_is_not_passed_on(served: Served, echo: Echo) -> None:
    before = len(echo.requests)
    with socket.create_connection(("127.0.0.1", served("none").ports[8181]), timeout=20) as raw:
        raw.sendall(b"GET /queue HTTP/1.1\r\nHost: x\r\nX-TARGET-GPU : 1\r\nConnection: close\r\n\r\n")
        status = raw.makefile("rb").readline().split()[1]
    assert status in (b"200", b"400")
    assert [request["headers"]["x-target-gpu"] for request in echo.requests[before:]] in ([], ["0"])
