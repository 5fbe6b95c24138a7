"""A request that cannot be acted on is refused, says what to send instead, and changes nothing."""

from __future__ import annotations

import http.client
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.host.jobs import new_key, outcome, progress, quick, release, run_on_each, start_held
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer, parse_body
from tests.host.workflows import node

pytestmark = pytest.mark.host

NUM_SLOTS = 2
HEADER = "X-TARGET-GPU"
FIX_WORDS = ("send ", "set ", "write ", "name ")
DEEP = 100_000


@dataclass(frozen=True)
class Bad:
    """A request to refuse. `names` are words of the reply; `by_host` ones have the host's own wording."""

    name: str
    method: str
    path: str
    body: bytes | None = None
    names: tuple[str, ...] = ()
    headers: tuple[tuple[str, bytes], ...] = ()
    by_host: bool = False
    type: str = "invalid_request"

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.name}"


# Headers.

TARGETS = {
    "negative": b"-1",
    "minus zero": b"-0",
    "too high by one": b"2",
    "too high": b"99",
    "huge": b"9" * 400,
    "decimal": b"1.5",
    "decimal zero": b"1.0",
    "word": b"abc",
    "none": b"None",
    "true": b"true",
    "empty": b"",
    "blank": b"   ",
    "hexadecimal": b"0x1",
    "exponent": b"1e0",
    "plus": b"+1",
    "underscore": b"0_1",
    "list": b"0,1",
    "capitals": b"AUTO",
    "device": b"cuda:0",
    "Arabic one": "\u0661".encode(),
    "superscript one": b"\xb9",
    "fullwidth one": "\uff11".encode(),
    "bad UTF-8": b"\xff\xfe",
    "quoted": b'"1"',
}
ROUTES = (
    ("POST", "/prompt", json.dumps({"prompt": quick(1)}).encode()),
    ("GET", "/queue", None),
    ("POST", "/queue", b'{"clear": true}'),
    ("POST", "/interrupt", b"{}"),
    ("POST", "/free", b'{"unload_models": true, "free_memory": true}'),
)
BAD_HEADERS = [
    Bad(name, method, prefix + path, body, (HEADER, "0 to 1", "auto"), ((HEADER, value),), type="invalid_target_gpu")
    for prefix in ("", "/api")
    for method, path, body in ROUTES
    for name, value in TARGETS.items()
]
TWO_HEADERS = [
    Bad(
        "two headers",
        method,
        prefix + path,
        body,
        (HEADER, "once"),
        ((HEADER, b"0"), (HEADER, b"1")),
        type="invalid_target_gpu",
    )  # fmt: skip
    for prefix in ("", "/api")
    for method, path, body in ROUTES
]

# Bodies.


def raw(name: str, body: bytes, path: str, *names: str, **options: Any) -> Bad:
    return Bad(name, "POST", path, body, names, **options)


def prompt(name: str, *names: str, by_host: bool = False, type: str = "invalid_request", **body: Any) -> Bad:
    """A job that must not run: the good workflow with something wrong in it."""
    content = json.dumps({"prompt": quick(1), **body}).encode()
    return raw(name, content, "/prompt", *names, by_host=by_host, type=type)


def target(name: str, value: Any) -> Bad:
    wrong = {"target_gpu": value}
    return prompt(name, "extra_data.target_gpu", "0 to 1", type="invalid_target_gpu", extra_data=wrong)


def nested(depth: int) -> Any:
    """Objects and lists by turns; a list of one item is no link."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"next": value}
    return value


def quick_with(**changes: Any) -> JSON:
    """The good workflow with one node changed."""
    workflow = quick(1)
    workflow["value"] = {**workflow["value"], **changes}
    return workflow


NO_OBJECTS = {
    "empty": b"",
    "blank": b" \n ",
    "no JSON": b"prompt=1",
    "list": b"[]",
    "string": b'"prompt"',
    "number": b"5",
    "null": b"null",
    "true": b"true",
    "truncated": b'{"prompt": {"1": {"class_type": "CPT',
    "two objects": b"{} {}",
    "bad UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": {}}'.encode("utf-16"),
    "many open lists": b"[" * DEEP,
    "many lists": b"[" * DEEP + b"]" * DEEP,
    "many objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "huge number": b'{"number": ' + b"9" * 10_000 + b"}",
}
BODY_ROUTES = ("/prompt", "/queue", "/free", "/history")
BAD_BODIES = [
    *(raw(name, body, path, "JSON") for path in BODY_ROUTES for name, body in NO_OBJECTS.items()),
    *(raw(name, body, "/interrupt", "JSON") for name, body in NO_OBJECTS.items() if body.strip()),
    *(
        raw(
            f"charset {charset}",
            b"{}",
            path,
            "JSON",
            headers=(("Content-Type", f"text/json; charset={charset}".encode()),),
        )
        for path in (*BODY_ROUTES, "/interrupt")
        for charset in ("klingon", "utf-16", "hex", "\u0661")
    ),
]
BAD_PROMPTS = [
    # The job's number.
    raw("number NaN", b'{"number": NaN, "prompt": {}}', "/prompt", "number", "finite"),
    raw("number Infinity", b'{"number": Infinity, "prompt": {}}', "/prompt", "number", "finite"),
    raw("number -Infinity", b'{"number": -Infinity, "prompt": {}}', "/prompt", "number", "finite"),
    raw("number 1e999", b'{"number": 1e999, "prompt": {}}', "/prompt", "number", "finite"),
    prompt("number 10**400", "number", "finite", number=10**400),
    prompt("number true", "number", "finite", number=True),
    prompt("number word", "number", "finite", number="abc"),
    prompt("number nan word", "number", "finite", number="nan"),
    prompt("number list", "number", "finite", number=[1]),
    prompt("number object", "number", "finite", number={}),
    prompt("number null", "number", "finite", number=None),
    # The workflow.
    raw("prompt missing", b"{}", "/prompt", "prompt", by_host=True),
    prompt("prompt list", "prompt", "an object", prompt=[]),
    prompt("prompt string", "prompt", "an object", prompt="{}"),
    prompt("prompt null", "prompt", "an object", prompt=None),
    prompt("prompt number", "prompt", "an object", prompt=1),
    prompt("prompt empty", by_host=True, prompt={}),
    prompt("node list", "prompt['value']", "class_type", prompt={**quick(1), "value": []}),
    prompt("node string", "prompt['value']", "class_type", prompt={**quick(1), "value": "CPTConstInt"}),
    prompt("node null", "prompt['value']", "class_type", prompt={**quick(1), "value": None}),
    prompt("class_type list", "class_type", "a string", prompt=quick_with(class_type=["CPTConstInt"])),
    prompt("class_type null", "class_type", "a string", prompt=quick_with(class_type=None)),
    prompt("class_type number", "class_type", "a string", prompt=quick_with(class_type=7)),
    prompt("class_type missing", by_host=True, prompt={**quick(1), "value": {"inputs": {}}}),
    prompt("class_type unknown", by_host=True, prompt=quick_with(class_type="NoSuchNode")),
    prompt("inputs list", "inputs", "an object", prompt=quick_with(inputs=[])),
    prompt("inputs string", "inputs", "an object", prompt=quick_with(inputs="value")),
    prompt("inputs null", "inputs", "an object", prompt=quick_with(inputs=None)),
    prompt("inputs missing", by_host=True, prompt={**quick(1), "value": {"class_type": "CPTConstInt"}}),
    prompt("input missing", by_host=True, prompt=quick_with(inputs={})),
    prompt("input of another type", by_host=True, prompt=quick_with(inputs={"value": "abc"})),
    prompt("input too small", by_host=True, prompt=quick_with(inputs={"value": -1})),
    prompt("link to nowhere", by_host=True, prompt=quick_with(inputs={"value": ["nobody", 0]})),
    prompt("link to no output", by_host=True, prompt=quick_with(inputs={"value": ["value", 7]})),
    prompt("link by an object", by_host=True, prompt=quick_with(inputs={"value": [{}, 0]})),
    prompt("no output node", by_host=True, prompt={"value": node("CPTConstInt", value=1)}),
    prompt("deep input", "nested", prompt={"out": node("CPTOut", value={"next": nested(500)})}),
    prompt("deep extra_data", "nested", extra_data={"extra_pnginfo": nested(500)}),
    prompt("deeper than needed", "nested", extra_data={"extra_pnginfo": nested(250)}),
    # What goes with it.
    prompt("extra_data list", "extra_data", "an object", extra_data=[]),
    prompt("extra_data null", "extra_data", "an object", extra_data=None),
    prompt("extra_data string", "extra_data", "an object", extra_data="x"),
    target("target true", True),
    target("target false", False),
    target("target decimal", 1.5),
    target("target decimal zero", 0.0),
    target("target word", "x"),
    target("target empty", ""),
    target("target negative", -1),
    target("target too high", 99),
    target("target huge", 10**30),
    target("target list", [0]),
    target("target object", {"slot": 0}),
    prompt("client_id object", "client_id", "a string", client_id={}),
    prompt("client_id list", "client_id", "a string", client_id=["a"]),
    prompt("client_id inside", "extra_data.client_id", "a string", extra_data={"client_id": [1]}),
    prompt("prompt_id list", "prompt_id", "a string", prompt_id=["a"]),
    prompt("prompt_id object", "prompt_id", "a string", prompt_id={}),
    prompt("targets number", "partial_execution_targets", "a list", partial_execution_targets=1),
    prompt("targets object", "partial_execution_targets", "a list", partial_execution_targets={"out": 1}),
]
BAD_CHANGES = [
    *(
        raw(f"delete {wrong}", f'{{"delete": {wrong}}}'.encode(), path, "delete", "a list")
        for path in ("/queue", "/api/queue", "/history")
        for wrong in ('"a"', "{}", "1", "null", "true", "[[]]", "[{}]")
    ),
    *(
        raw(f"prompt_id {wrong}", f'{{"prompt_id": {wrong}}}'.encode(), path, "prompt_id", "a string")
        for path in ("/interrupt", "/api/interrupt")
        for wrong in ("1", "0", "true", "false", "[]", '["a"]', "{}", "1.5")
    ),
]
BAD_PAGES = [
    Bad(f"{name}={value[:12]}", "GET", f"{path}?{name}={value}", names=(name, "whole number"))
    for path in ("/history", "/api/history")
    for name in ("max_items", "offset")
    for value in ("abc", "1.5", "", "--5", "1e3", "%D9%A1", "9" * 5000, "NaN", "0x1")
]


def raw_request(server: HostServer, request: Bad) -> tuple[int, Any]:
    """Send exactly these bytes; urllib would refuse or repair some of them."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(request.method, request.path)
        if not any(name == "Content-Type" for name, _ in request.headers):
            connection.putheader("Content-Type", "application/json")
        if request.body is not None:
            connection.putheader("Content-Length", str(len(request.body)))
        for name, value in request.headers:
            connection.putheader(name, value)
        connection.endheaders(request.body)
        reply = connection.getresponse()
        return reply.status, parse_body(reply.headers, reply.read())
    finally:
        connection.close()


@dataclass
class Busy:
    """A host with a job that must not end on every slot, and jobs that wait."""

    server: HostServer
    running: list[str]
    waiting: list[str]
    finished: str
    known: set[str]  # jobs of the tests of other files, and these here
    log_start: int  # in characters; what is before is those tests'

    def state(self) -> JSON:
        """Everything a refused request might have changed."""
        queue = self.server.request("GET", "/queue/all")[1]
        for slot in queue["queues"]:
            slot.pop("vram")
        history = self.server.request("GET", "/history")[1]
        return {"queue": queue, "history": sorted(history)}


@pytest.fixture(scope="module")
def busy(shared_server: ServerPool) -> Iterator[Busy]:
    server = shared_server(slots=",".join(["cpu"] * NUM_SLOTS))
    known, log_start = set(server.request("GET", "/history")[1]), len(server.log())
    finished = server.submit(quick(0))["prompt_id"]
    server.wait([finished])
    watcher = server.websocket()
    running = [start_held(server, watcher, slot) for slot in range(NUM_SLOTS)]
    waiting = [server.submit(progress(slot), slot)["prompt_id"] for slot in range(NUM_SLOTS)]
    waiting.append(server.submit(progress(NUM_SLOTS))["prompt_id"])
    known |= {finished, *running, *waiting}
    yield Busy(server, running, waiting, finished, known, log_start)
    server.request("POST", "/queue", {"clear": True})
    release(server, *running)
    watcher.close()


def assert_refused(busy: Busy, request: Bad) -> None:
    before = busy.state()
    status, reply = raw_request(busy.server, request)
    assert busy.state() == before, (status, reply)
    assert 400 <= status < 500, (status, reply)
    assert set(reply) >= {"error", "node_errors"}, reply
    error = reply["error"]
    assert set(error) == {"type", "message", "details", "extra_info"}, reply
    assert all(isinstance(error[part], str) for part in ("type", "message", "details"))
    text = f"{error['message']}; {error['details']}"
    assert all(name in text for name in request.names), text
    if not request.by_host:
        assert (status, error["type"]) == (400, request.type)
        assert error["details"].startswith(FIX_WORDS), error["details"]
        assert (error["extra_info"], reply["node_errors"]) == ({}, {})


@pytest.mark.parametrize("request_", [*BAD_HEADERS, *TWO_HEADERS], ids=str)
def test_bad_headers_are_refused(busy: Busy, request_: Bad) -> None:
    assert_refused(busy, request_)


@pytest.mark.parametrize("request_", BAD_BODIES, ids=str)
def test_bodies_that_are_no_object_are_refused(busy: Busy, request_: Bad) -> None:
    assert_refused(busy, request_)


@pytest.mark.parametrize("request_", BAD_PROMPTS, ids=str)
def test_bad_jobs_are_refused(busy: Busy, request_: Bad) -> None:
    assert_refused(busy, request_)


@pytest.mark.parametrize("request_", [*BAD_CHANGES, *BAD_PAGES], ids=str)
def test_bad_changes_and_pages_are_refused(busy: Busy, request_: Bad) -> None:
    assert_refused(busy, request_)


@pytest.mark.parametrize("value", ["0", " 1 ", "01"])
def test_what_is_unusual_but_means_a_slot_is_accepted(busy: Busy, value: str) -> None:
    status, reply = busy.server.request("GET", "/queue", headers={HEADER: value})
    assert status == 200, reply
    assert [item[1] for item in reply["queue_running"]] == [busy.running[int(value)]]


def test_the_same_header_twice_is_one(busy: Busy) -> None:
    request = Bad("twice", "GET", "/queue", headers=((HEADER, b"1"), (HEADER, b"1")))
    status, reply = raw_request(busy.server, request)
    assert status == 200, reply
    assert [item[1] for item in reply["queue_running"]] == [busy.running[1]]


@pytest.mark.parametrize("depth", [20, 90])
def test_jobs_as_deep_as_real_ones_are_accepted(busy: Busy, depth: int) -> None:
    extra_data = {"extra_pnginfo": {"workflow": nested(depth)}}
    reply = busy.server.submit(quick(depth), 0, extra_data=extra_data)
    busy.waiting.append(reply["prompt_id"])
    assert reply["gpu_id"] == 0
    assert busy.server.request("GET", "/queue")[0] == 200


def test_unknown_ids_change_nothing(busy: Busy) -> None:
    before = busy.state()
    for path, body in (
        ("/interrupt", {"prompt_id": new_key()}),
        ("/queue", {"delete": [new_key(), 1, None, True, 1.5]}),
        ("/queue", {"delete": []}),
        ("/queue", {"clear": False}),
        ("/queue", {}),
        ("/history", {"delete": [new_key(), 1, None]}),
        ("/history", {}),
        ("/free", {}),
    ):
        status, reply = busy.server.request("POST", path, body)
        assert status == 200, reply
    assert busy.state() == before


@pytest.mark.parametrize("path", ["/queue", "/queue/all", "/debug/queues", "/metrics", "/history", "/prompt"])
def test_every_page_still_answers(busy: Busy, path: str) -> None:
    assert busy.server.request("GET", path)[0] == 200


def test_at_the_end_every_job_has_run_and_every_slot_works(busy: Busy) -> None:
    server = busy.server
    assert {outcome(entry) for entry in release(server, *busy.running).values()} == {"interrupted"}
    entries = server.wait(busy.waiting)
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert [entries[job_id]["gpu_id"] for job_id in busy.waiting[:NUM_SLOTS]] == list(range(NUM_SLOTS))
    again = run_on_each(server, [progress(random.getrandbits(60)) for _ in range(NUM_SLOTS)])
    assert [outcome(entry) for entry in again] == ["success"] * NUM_SLOTS
    known = busy.known | set(busy.waiting)  # Tests have let more jobs wait.
    assert len(set(server.request("GET", "/history")[1]) - known) == NUM_SLOTS
    assert server.request("GET", "/queue")[1] == {"queue_running": [], "queue_pending": []}
    log = server.log()[
        busy.log_start :
    ]  # The host itself may log tracebacks, of a database session collected on another thread.
    assert "Error handling request" not in log
    assert not re.search(r'File ".*comfy_parallel/comfy_parallel/', log)
