"""What cannot be sent fails its job, or nothing; a client that does not read holds up nobody's events."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.host.jobs import message, outcome, progress, quick, shown
from tests.host.pool import ServerPool
from tests.host.server import POLL_S, HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

KINDS = ("bytes", "tensor", "set", "class", "endless", "deep", "key")
JSON_EVENTS, PREVIEWS, SIZE = 1_500, 600, 100_000  # of 100 kB: the kernel takes some megabytes, an outbox 32 MiB


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def no_json(kind: str, how: str) -> Workflow:
    return {"bad": node("CPTNoJson", kind=kind, how=how)}


def send(kind: str, count: int) -> Workflow:
    return {"send": node("CPTEvents", kind=kind, count=count, size=SIZE), "out": node("CPTOut", value=["send", 0])}


def check_alive(server: HostServer, number: int) -> None:
    """Another client's job runs, and it hears of that; the history can be read."""
    with server.websocket() as client:
        job_id = server.submit(quick(number), client_id=client.client_id)["prompt_id"]
        assert client.wait_for_end(job_id, 60)["type"] == "execution_success"
        server.wait([job_id])
    status, history = server.request("GET", "/history")
    assert (status, job_id in history) == (200, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_client", [True, False])
def test_an_output_that_is_no_json_fails_its_job_only(server: HostServer, kind: str, has_client: bool) -> None:
    with server.websocket() as client:
        job_id = server.submit(no_json(kind, "ui"), client_id=client.client_id if has_client else None)["prompt_id"]
        entry = server.wait([job_id])[job_id]
        if has_client:
            assert client.wait_for_end(job_id, 60)["type"] == "execution_error"
    assert outcome(entry) == "error"
    error = message(entry, "execution_error")
    assert (error["node_id"], error["exception_type"]) == ("bad", "TypeError")
    assert "what the node shows" in error["exception_message"]
    check_alive(server, 900 + KINDS.index(kind))


@pytest.mark.parametrize(
    ("kind", "how"),
    [("tensor", "event"), ("endless", "event"), ("set", "own_executed"), ("tensor", "progress")],
)
def test_an_event_that_is_no_json_fails_its_job_only(server: HostServer, kind: str, how: str) -> None:
    with server.websocket() as client:
        job_id = server.submit(no_json(kind, how), 1, client.client_id)["prompt_id"]
        assert client.wait_for_end(job_id, 60)["type"] == "execution_error"
        entry = server.wait([job_id])[job_id]
    assert message(entry, "execution_error")["exception_type"] == "TypeError"
    assert "is no JSON" in message(entry, "execution_error")["exception_message"]
    check_alive(server, 920)


@pytest.mark.parametrize(
    ("how", "said"), [("binary", "cpt.binary"), ("preview", "cannot be sent"), ("route", "cpt.event")]
)
def test_what_no_job_can_be_blamed_for_is_logged(server: HostServer, how: str, said: str) -> None:
    with server.websocket() as client:
        job_id = server.submit(no_json("tensor", how), 0, client.client_id)["prompt_id"]
        assert client.wait_for_end(job_id, 60)["type"] == "execution_success"
    check_alive(server, 930)
    assert said in server.log()


@contextmanager
def deaf(server: HostServer) -> Iterator[tuple[str, socket.socket]]:
    """A WebSocket client that never reads; its id, and its connection."""
    client_id = uuid.uuid4().hex
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        lines = [
            f"GET /ws?clientId={client_id} HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        yield client_id, connection


def ends_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection; what it has sent is read."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_does_not_read_holds_up_nobody_and_misses_only_previews(server: HostServer) -> None:
    with deaf(server) as (deaf_id, connection), server.websocket() as client:
        flood = server.submit(send("preview", PREVIEWS), 0, deaf_id)["prompt_id"]
        while deaf_id and not server.request("GET", f"/history/{flood}")[1]:
            job_id = server.submit(progress(int(time.monotonic() * 1000)), 1, client.client_id)["prompt_id"]
            assert client.wait_for_end(job_id, 60)["type"] == "execution_success"
        check_alive(server, 940)
        connection.settimeout(60)
        got = b""
        while b'"execution_success"' not in got:  # It reads on in the end: texts were not dropped.
            got = got[-100:] + connection.recv(1 << 20)
    deadline = time.monotonic() + 60
    while f"client {deaf_id} takes its events slowly: it missed" not in server.log():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def test_a_client_that_never_reads_is_closed_with_a_reason(server: HostServer) -> None:
    with deaf(server) as (deaf_id, connection), server.websocket() as client:
        entry = server.run(quick(950), 1)
        flood = server.submit(send("json", JSON_EVENTS), 0, deaf_id)["prompt_id"]
        for number in range(5):
            job_id = server.submit(progress(number + 77), 1, client.client_id)["prompt_id"]
            assert client.wait_for_end(job_id, 60)["type"] == "execution_success"
        assert outcome(server.wait([flood])[flood]) == "success"
        assert ends_within(connection, 60)
        assert shown(entry) == 950
    assert f"client {deaf_id} takes its events too slowly" in server.log()
    check_alive(server, 951)


def test_events_reach_a_client_in_their_order(server: HostServer) -> None:
    with server.websocket() as client:
        job_id = server.submit({**send("json", 300)}, 0, client.client_id)["prompt_id"]
        client.wait_for_end(job_id)
        numbers = [event["data"]["number"] for event in client.of_type("cpt.event")]
    assert numbers == list(range(300))
    assert json.dumps(client.events)
