"""A compressed body that does not decompress is the client's fault on every route, and nothing of it is used."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator

import pytest

from tests.host.jobs import held, outcome, queue_ids, quick, run_on_each
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer

pytestmark = pytest.mark.host

JOB = json.dumps({"prompt": quick(1)}).encode()
FORM = b"\r\n".join(
    (
        b"--XX",
        b'Content-Disposition: form-data; name="image"; filename="broken.png"',
        b"Content-Type: image/png",
        b"",
        bytes(range(256)) * 8,
        b"--XX--",
        b"",
    )
)
BODIES = {
    "/prompt": JOB,
    "/queue": b'{"clear": true}',
    "/interrupt": b"{}",
    "/free": b'{"unload_models": true}',
    "/history": b'{"clear": true}',
    "/settings": b'{"broken": true}',
    "/userdata/kept.json": b'{"broken": true}',
    "/upload/image": FORM,
    "/parallel/preload": b'{"files": ["checkpoints/a.safetensors"]}',
}
PATHS = [*BODIES, *(f"/api{path}" for path in ("/prompt", "/queue", "/interrupt"))]
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}
BREAK = {
    "garbage": lambda body: b"this was never compressed",
    "cut in the middle": lambda body: body[: len(body) // 2],
    "cut before its end": lambda body: body[:-1],
    "without its check sum": lambda body: body[:-4],
    "with a wrong check sum": lambda body: body[:-8] + bytes(8),
    "with a rest": lambda body: body + b"a rest",
}


log_before = [0]  # characters that other files' tests have left


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> Iterator[HostServer]:
    server = shared_server(slots="cpu,cpu")
    log_before[0] = len(server.log())
    server.wait([server.submit(quick(0))["prompt_id"]])
    kept = server.request("POST", "/userdata/kept.json", {"kept": True})
    assert kept[0] == 200
    with held(server, 0, 1):
        for slot in (0, 1):
            server.submit(quick(slot), slot)
        yield server
        server.request("POST", "/queue", {"clear": True})


def send(server: HostServer, path: str, encoding: str, body: bytes, *, at_once: bool) -> tuple[int, bytes]:
    """Head and body in one packet, or the body in two more, when the handler waits for it."""
    kind = "multipart/form-data; boundary=XX" if path.endswith("/image") else "application/json"
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {kind}",
        f"Content-Encoding: {encoding}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in (head + body,) if at_once else (head, body[: len(body) // 2], body[len(body) // 2 :]):
            connection.sendall(packet)
            if not at_once:
                server.request("GET", "/prompt")  # By now the host has read what was sent.
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, content = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


def state(server: HostServer) -> JSON:
    return {
        "queue": queue_ids(server),
        "history": sorted(server.request("GET", "/history")[1]),
        "settings": server.request("GET", "/settings")[1],
        "kept": server.request("GET", "/userdata/kept.json")[1],
        "input": sorted(path.name for path in (server.base_dir / "input").iterdir()),
    }


@pytest.mark.parametrize("at_once", [True, False], ids=["one packet", "later"])
@pytest.mark.parametrize("broken", BREAK)
@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_body_that_does_not_decompress_is_refused(
    server: HostServer, encoding: str, broken: str, at_once: bool
) -> None:
    before = state(server)
    for path in PATHS:
        body = BREAK[broken](COMPRESS[encoding](BODIES[path.removeprefix("/api")]))
        status, content = send(server, path, encoding, body, at_once=at_once)
        assert status == 400, (path, content)
        error = json.loads(content)["error"]
        assert "the request body" in error["message"], (path, error)
        assert error["details"].startswith("send "), (path, error)
    assert state(server) == before


def test_a_small_body_that_becomes_huge_is_refused_by_its_size(server: HostServer) -> None:
    before = state(server)
    bomb = gzip.compress(b" " * (200 << 20))
    for path in ("/prompt", "/queue", "/parallel/preload"):
        assert send(server, path, "gzip", bomb, at_once=True)[0] == 413
    assert state(server) == before


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_whole_body_is_read(server: HostServer, encoding: str) -> None:
    for at_once in (True, False):
        status, content = send(server, "/prompt", encoding, COMPRESS[encoding](JOB), at_once=at_once)
        assert (status, json.loads(content)["node_errors"]) == (200, {})
        status, content = send(server, "/upload/image", encoding, COMPRESS[encoding](FORM), at_once=at_once)
        assert status == 200
    members = gzip.compress(JOB[:20]) + gzip.compress(JOB[20:])
    assert send(server, "/prompt", "gzip", members, at_once=True)[0] == 200


def test_none_of_it_is_logged_as_an_error_of_the_server(server: HostServer) -> None:
    log = server.log()[log_before[0] :]
    assert "Error handling request" not in log
    assert "Unhandled exception" not in log


def test_the_slots_still_work(shared_server: ServerPool) -> None:
    """Another host than that of the other tests, whose slots are busy."""
    server = shared_server(slots="cpu,cpu,cpu")
    for at_once in (True, False):
        for path in PATHS:
            assert (
                send(server, path, "gzip", gzip.compress(BODIES[path.removeprefix("/api")])[:-8], at_once=at_once)[0]
                == 400
            )
    assert [outcome(entry) for entry in run_on_each(server, [quick(1), quick(2)])] == ["success"] * 2


@pytest.mark.parametrize("encoding", ["br", "zstd"])
def test_encodings_whose_library_is_missing_are_refused_too(server: HostServer, encoding: str) -> None:
    for path in PATHS:
        assert send(server, path, encoding, b"this was never compressed", at_once=True)[0] == 400, path
