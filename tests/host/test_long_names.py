"""Names and ids of any length fill neither the log nor the replies, and stock's answers to them stay."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.host.jobs import held, outcome, queue_ids, quick
from tests.host.pool import ServerPool
from tests.host.server import HostServer
from tests.host.workflows import node

pytestmark = pytest.mark.host

LONG = "n" * 10_000_000
LINES = "a\n" * 5_000_000
MOST_LOGGED = 50_000  # characters a request, with all that the host says of an invalid job
MOST_REPLIED = 50_000


def with_value(**changes: Any) -> Any:
    return {**quick(1), "value": {**quick(1)["value"], **changes}}


REFUSED = {
    "node id": {"prompt": {**quick(1), "NAME": node("CPTOut", value=["value", 0])}},
    "node id, no node": {"prompt": {**quick(1), "NAME": None}},
    "class": {"prompt": with_value(class_type="NAME")},
    "link": {"prompt": {**quick(1), "out": node("CPTOut", value=["NAME", 0])}},
    "value": {"prompt": with_value(inputs={"value": "NAME"})},
    "prompt_id": {"prompt": quick(1), "prompt_id": "NAME"},
    "client_id": {"prompt": quick(1), "client_id": "NAME"},
    "client_id inside": {"prompt": quick(1), "extra_data": {"client_id": "NAME"}},
    "number": {"prompt": quick(1), "number": "NAME"},
    "target": {"prompt": quick(1), "extra_data": {"target_gpu": "NAME"}},
    "targets": {"prompt": quick(1), "partial_execution_targets": {"NAME": 1}},
    "extra_data": {"prompt": quick(1), "extra_data": "NAME"},
    "the prompt": {"prompt": "NAME"},
}
ELSEWHERE: list[tuple[str, str, Any]] = [
    ("file to preload", "/parallel/preload", {"files": ["NAME"]}),
    ("file to preload, in a folder", "/parallel/preload", {"files": ["checkpoints/NAME"]}),
    ("slots to preload on", "/parallel/preload", {"files": ["checkpoints/a.safetensors"], "gpu_ids": ["NAME"]}),
    ("interrupt", "/interrupt", {"prompt_id": "NAME"}),
    ("interrupt, object", "/interrupt", {"prompt_id": {"NAME": 1}}),
    ("delete", "/queue", {"delete": ["NAME"] * 2}),
    ("delete, no list", "/queue", {"delete": "NAME"}),
    ("delete, objects", "/queue", {"delete": [{"NAME": 1}]}),
    ("history", "/history", {"delete": ["NAME"]}),
    ("free", "/free", {"NAME": True}),
    ("no JSON", "/queue", None),
    ("cancel", "/api/jobs/cancel", {"job_ids": ["NAME", {"NAME": 1}]}),
]


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def post(server: HostServer, path: str, body: Any, name: str) -> tuple[int, int, int]:
    """The status, and how long the reply is and what was logged meanwhile."""
    data = name.encode() if body is None else json.dumps(body).replace('"NAME', '"' + json.dumps(name)[1:-1]).encode()
    data = data.replace(b"/NAME", b"/" + json.dumps(name)[1:-1].encode())
    before = len(server.log())
    status, reply = server.request("POST", path, data=data, headers={"Content-Type": "application/json"})
    server.request("GET", "/prompt")
    return status, len(json.dumps(reply)), len(server.log()) - before


@pytest.mark.parametrize("name", [LONG, LINES], ids=["one line", "many lines"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_job_with_a_long_name_is_refused_in_few_words(server: HostServer, kind: str, name: str) -> None:
    status, replied, logged = post(server, "/prompt", REFUSED[kind], name)
    assert status == 400
    assert replied < MOST_REPLIED
    assert logged < MOST_LOGGED
    assert queue_ids(server) == ([], [])


@pytest.mark.parametrize("name", [LONG, LINES], ids=["one line", "many lines"])
@pytest.mark.parametrize(("path", "body"), [each[1:] for each in ELSEWHERE], ids=[each[0] for each in ELSEWHERE])
def test_long_names_elsewhere(server: HostServer, path: str, body: Any, name: str) -> None:
    with held(server, 0) as running:
        status, replied, logged = post(server, path, body, name)
        assert queue_ids(server) == (running, [])
    assert status < 500
    assert replied < MOST_REPLIED
    assert logged < MOST_LOGGED


def test_names_as_long_as_anybody_needs_them_work(server: HostServer) -> None:
    name = "n" * 1000
    workflow = {**quick(1), name: node("CPTOut", value=["value", 0])}
    with server.websocket("c" * 1000) as client:
        job_id = server.submit(workflow, 1, client.client_id)["prompt_id"]
        client.wait_for_end(job_id)
    entry = server.wait([job_id])[job_id]
    assert (outcome(entry), set(entry["outputs"])) == ("success", {"out", name})
