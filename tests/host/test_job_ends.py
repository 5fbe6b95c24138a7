"""What is told of a job's end beside its events, and nodes that run one at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from comfy_parallel.http.webhooks import SIGNATURE, TIMESTAMP, sign
from tests.host.conftest import MakeServer
from tests.host.jobs import hold, interrupt, meet, message, new_key, outcome, quick, release, start_held
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.workflows import node

pytestmark = pytest.mark.host

SECRET = "a key of the operator's"
WAIT_S = 90.0


class Receiver:
    """Takes webhooks, and fails the first attempts as it is told."""

    def __init__(self) -> None:
        self.received: list[tuple[str, JSON]] = []
        self.problems: list[str] = []
        self.statuses: list[int] = []
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.take(self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        with self._changed:
            if headers.get(SIGNATURE) != sign(SECRET, headers.get(TIMESTAMP, ""), body):
                self.problems.append(f"{path}: {headers}")
            status = self.statuses.pop(0) if self.statuses else 200
            if status == 200:
                self.received.append((path, json.loads(body)))
            self._changed.notify_all()
        return status

    def await_statuses_used(self) -> None:
        """Return when every answer that was prepared has been given."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self.statuses, WAIT_S), f"nobody came for {self.statuses}"

    def of(self, job_id: str) -> tuple[str, JSON]:
        """Path and body of what was told of this job."""
        found: list[tuple[str, JSON]] = []

        def is_there() -> bool:
            found[:] = [one for one in self.received if one[1]["prompt_id"] == job_id]
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(is_there, WAIT_S), f"no webhook of {job_id}"
        assert len(found) == 1, "told once"
        return found[0]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    assert made.problems == []
    made.server.shutdown()


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer, receiver: Receiver) -> HostServer:
    """Tells the receiver of each job, and runs two kinds of nodes one at a time."""
    env = {
        "COMFY_PARALLEL_WEBHOOK": f"{receiver.url}/all",
        "COMFY_PARALLEL_WEBHOOK_HOSTS": receiver.url.removeprefix("http://"),
        "COMFY_PARALLEL_WEBHOOK_SECRET": SECRET,
        "COMFY_PARALLEL_SERIAL_NODES": "CPTRendez*, CPTSleep, NoSuchNode",
    }
    return make_module_server(slots="cpu,cpu,cpu", env=env)


def test_each_end_is_told_once(server: HostServer, receiver: Receiver) -> None:
    done = server.submit(quick(1), 1, "a client")["prompt_id"]
    path, told = receiver.of(done)
    assert (path, told["status"], told["gpu_id"], told["client_id"]) == ("/all", "success", 1, "a client")
    assert told["outputs"] == server.wait([done])[done]["outputs"]
    failed = server.submit({"fail": node("CPTFail", message="as it should"), "out": node("CPTOut", value=["fail", 0])})
    told = receiver.of(failed["prompt_id"])[1]
    assert told["status"] == "error"
    assert told["messages"][0][0] == "execution_error"
    with server.websocket() as client:
        held = start_held(server, client, 0)
        release(server, held)
    assert receiver.of(held)[1]["messages"][0][0] == "execution_interrupted"


def test_a_job_names_an_address_of_its_own(server: HostServer, receiver: Receiver) -> None:
    job = server.submit(quick(2), extra_data={"webhook": f"{receiver.url}/own?job=2"})["prompt_id"]
    assert receiver.of(job)[0] == "/own?job=2"


def test_what_fails_for_a_while_is_sent_again(server: HostServer, receiver: Receiver) -> None:
    receiver.statuses[:] = [503, 429]
    assert receiver.of(server.submit(quick(3))["prompt_id"])[1]["status"] == "success"


def test_what_is_refused_or_sent_elsewhere_is_given_up(server: HostServer, receiver: Receiver) -> None:
    for status in (404, 307):
        receiver.statuses[:] = [status]
        refused = server.submit(quick(status))["prompt_id"]
        receiver.await_statuses_used()  # Else the next job's webhook might come first.
        await_line(server, f"webhook of job {refused}: given up: answered with {status}")
        receiver.of(server.submit(quick(1000 + status))["prompt_id"])
        assert refused not in [told["prompt_id"] for _, told in receiver.received]


def await_line(server: HostServer, line: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while line not in server.log():
        assert time.monotonic() < deadline, f"the log lacks: {line}"
        time.sleep(POLL_S)


@pytest.mark.parametrize(
    "url", ["http://example.com/", "file:///etc/passwd", "http://127.0.0.1:1/", "http://a@127.0.0.1:9/", 5, "http://["]
)
def test_other_addresses_are_refused(server: HostServer, url: object) -> None:
    status, reply = server.request("POST", "/prompt", {"prompt": quick(4), "extra_data": {"webhook": url}})
    assert (status, reply["error"]["type"]) == (400, "invalid_request")
    assert "webhook" in reply["error"]["message"]


# Nodes that run one at a time.


def test_nodes_of_a_named_kind_are_never_inside_together(server: HostServer) -> None:
    key = new_key()
    jobs = [server.submit(meet(key, 2, timeout=1.0), slot)["prompt_id"] for slot in (0, 1)]
    entries = server.wait(jobs)
    errors = [message(entry, "execution_error")["exception_message"] for entry in entries.values()]
    assert all("1 of 2 jobs" in error for error in errors)


def test_a_job_that_waits_for_its_turn_can_be_interrupted(server: HostServer) -> None:
    with server.websocket() as client:
        first = start_held(server, client, 0)
        second = server.submit(hold(1), 1, client.client_id)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "executing" and event["data"].get("prompt_id") == second)
        beside = server.submit(quick(5), 2)["prompt_id"]
        assert outcome(server.wait([beside])[beside]) == "success"
        interrupt(server, second)
        assert outcome(server.wait([second])[second]) == "interrupted"
        release(server, first)


def test_a_name_that_is_no_nodes_is_told(server: HostServer) -> None:
    assert "NoSuchNode: no node is called so" in server.log()
    assert "node CPTSleep runs one at a time" in server.log()
