"""Loading files ahead costs a slot nothing of what it has cached, and is asked for in a form that cannot be misread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import message, outcome, quick
from tests.host.server import JSON, HostServer
from tests.host.workflows import txt2img

pytestmark = pytest.mark.host

A, B = "checkpoints/a.safetensors", "checkpoints/b.safetensors"


@pytest.fixture(scope="module", params=["", "--cache-lru 12"], ids=["host's own cache", "lru"])
def server(make_module_server: MakeServer, request: pytest.FixtureRequest) -> Iterator[HostServer]:
    server = make_module_server(args=request.param.split())
    yield server
    server.stop()


def preload(server: HostServer, *files: str, **body: Any) -> list[JSON]:
    """The jobs' entries, once the files are loaded."""
    status, reply = server.request("POST", "/parallel/preload", {"files": list(files), **body})
    assert status == 200, reply
    entries = server.wait([job["prompt_id"] for job in reply["jobs"]])
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert [entry["gpu_id"] for entry in entries.values()] == [job["gpu_id"] for job in reply["jobs"]]
    return list(entries.values())


def cached(entry: JSON) -> set[str]:
    assert outcome(entry) == "success"
    return set(message(entry, "execution_cached")["nodes"])


def test_a_repeated_workflow_is_still_cached_as_a_whole(server: HostServer) -> None:
    workflow = txt2img(11)
    server.run(workflow, 1)
    for files in ((B,), (A, B), (B,)):
        preload(server, *files)
        assert cached(server.run(workflow, 1)) == set(workflow)


def test_the_clients_next_job_comes_to_the_slot_that_has_its_outputs(server: HostServer) -> None:
    workflow = quick(12)
    with server.websocket() as client:
        first = server.submit(workflow, 1, client.client_id)["prompt_id"]
        server.wait([first])
        preload(server, B)
        again = server.submit(workflow, None, client.client_id)["prompt_id"]
        entry = server.wait([again])[again]
    assert (entry["gpu_id"], cached(entry)) == (1, set(workflow))


def test_a_workflow_finds_what_was_loaded_ahead(server: HostServer) -> None:
    server.run(quick(13), 0)
    preload(server, B, gpu_ids=[0])
    assert "ckpt" in cached(server.run(txt2img(14, ckpt="b.safetensors"), 0))


def test_what_is_not_used_any_more_is_forgotten_by_the_next_job(server: HostServer) -> None:
    """As in stock, and also after many jobs that load ahead."""
    workflow = txt2img(15)
    server.run(workflow, 0)
    preload(server, B, gpu_ids=[0])
    for number in range(16, 30):
        server.run(quick(number), 0)
    assert cached(server.run(workflow, 0)) == set()


def test_the_same_file_or_slot_twice_is_one(server: HostServer) -> None:
    (entry,) = preload(server, A, B, A, A, gpu_ids=[1, 1, 1])
    assert [node["class_type"] for node in entry["prompt"][2].values()] == ["CheckpointLoaderSimple"] * 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"files": [A], "gpu_ids": []}, "gpu_ids is no list of slots"),
        ({"files": [A], "gpu_ids": {}}, "gpu_ids is no list of slots"),
        ({"files": [A], "gpu_ids": [True]}, "gpu_ids is no list of slots"),
        ({"files": [A], "gpu_ids": [-1]}, "gpu_ids is no list of slots"),
        ({"files": [A], "gpu_ids": [0, 0.0]}, "gpu_ids is no list of slots"),
        ({"files": [f"checkpoints/{number}" for number in range(101)]}, "files names 101 files"),
        ({"files": [A, ""]}, "no such folder"),
        ({"files": [A, "checkpoints/"]}, "no such file"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_meant_is_refused(server: HostServer, body: Any, told: str) -> None:
    before = sorted(server.request("GET", "/history")[1])
    status, reply = server.request("POST", "/parallel/preload", body)
    assert (status, told in reply["error"]["message"]) == (400, True), reply
    assert reply["error"]["details"].startswith(("send ", "begin ", "files in "))
    assert server.request("GET", "/queue/all")[1]["total_pending"] == 0
    assert sorted(server.request("GET", "/history")[1]) == before


def test_many_times_one_name_is_one_file(server: HostServer) -> None:
    assert len(preload(server, *[A] * 5000, gpu_ids=[0])) == 1


def test_a_host_that_caches_nothing_loads_ahead_too(make_server: MakeServer) -> None:
    server = make_server(args=["--cache-none"])
    preload(server, A)
    assert outcome(server.run(txt2img(31), 0)) == "success"
