"""The dashboard's live data on a real host."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPResponse
from typing import Any

import pytest

from comfy_parallel.http import templates
from tests.host.jobs import outcome, progress
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer

pytestmark = pytest.mark.host

TIMEOUT_S = 60.0


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def parts_of(stream: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each message's kind and parts."""
    kind = ""
    for line in stream:
        name, _, rest = line.decode().strip().partition(": ")
        if name == "event":
            kind = rest
        elif name == "data":
            yield kind, json.loads(rest)["parts"]


def test_a_job_is_followed_from_the_queue_to_its_end_while_another_reader_does_not_read(server: HostServer) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /parallel/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        with urllib.request.urlopen(f"{server.url}/api/parallel/events", timeout=TIMEOUT_S) as stream:
            messages = parts_of(stream)
            kind, state = next(messages)
            assert kind == "snapshot"
            assert state["slot/1"]["job"] is None
            job_id = server.submit(progress(61, steps=160, ms=50), 1)["prompt_id"]
            seen: list[JSON] = []
            for kind, parts in messages:
                assert kind == "change"
                assert "slot/1" not in parts or parts["slot/1"] != state["slot/1"]
                state |= parts
                job = state["slot/1"]["job"]
                if job is not None and job["prompt_id"] == job_id:
                    seen.append(job)
                if state["recent"] and state["recent"][0]["prompt_id"] == job_id:
                    break
    assert outcome(server.wait([job_id])[job_id]) == "success"
    steps = [job["value"] for job in seen if job["value"] is not None]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert max(job["preview"] or 0 for job in seen) > 1
    ended = state["recent"][0]
    assert (ended["gpu_id"], ended["outcome"]) == (1, "succeeded")
    assert ended["ran_s"] >= 160 * 0.05


def test_the_host_offers_our_example_workflows_with_their_pictures(server: HostServer) -> None:
    expected = sorted(path.stem for path in templates.FOLDER.glob("*.json"))
    assert sorted(server.request("GET", "/workflow_templates")[1]["comfy_parallel"]) == expected
    for name in expected:
        for end in ("json", "jpg"):
            status, _ = server.request("GET", f"/api/workflow_templates/comfy_parallel/{name}.{end}")
            assert status == 200
    assert server.request("GET", "/workflow_templates/comfy_parallel/none.json")[0] == 404
