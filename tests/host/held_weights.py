"""What a server tells of the weights that it holds, and hashes of the images that its jobs make."""

from __future__ import annotations

import hashlib
import time

from PIL import Image

from tests.host.jobs import outcome
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.workflows import Workflow

LIMIT_S = 120.0


def slots(count: int) -> str:
    return ",".join(["cpu"] * count)


def image_of(server: HostServer, workflow: Workflow, slot: int | None = None) -> str:
    entry = server.run(workflow, slot)
    assert outcome(entry) == "success", entry["status"]
    return images_of(server, [entry])[0]


def images_of(server: HostServer, entries: list[JSON]) -> list[str]:
    """A hash of each job's pixels."""
    for entry in entries:
        assert outcome(entry) == "success", entry["status"]
    names = [entry["outputs"]["save"]["images"][0]["filename"] for entry in entries]
    images = [Image.open(server.base_dir / "output" / name) for name in names]
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def run_on_all(server: HostServer, workflows: list[Workflow]) -> list[JSON]:
    ids = [server.submit(workflow)["prompt_id"] for workflow in workflows]
    entries = server.wait(ids, 500)
    return [entries[prompt_id] for prompt_id in ids]


def weights(server: HostServer) -> JSON:
    status, reply = server.request("GET", "/parallel/weights")
    assert status == 200
    found: JSON = reply
    return found


def file_of(server: HostServer, name: str) -> JSON:
    (found,) = [file for file in weights(server)["files"] if file["name"] == name]
    entry: JSON = found
    return entry


def digests(server: HostServer) -> dict[str, list[str]]:
    status, reply = server.request("GET", "/test/weights")
    assert status == 200
    return dict(reply)


def await_slots(server: HostServer, name: str, expected: list[int] | None) -> None:
    deadline = time.monotonic() + LIMIT_S
    while (seen := {file["name"]: file["slots"] for file in weights(server)["files"]}.get(name)) != expected:
        assert time.monotonic() < deadline, f"{name} is held by slots {seen}, not {expected}"
        time.sleep(POLL_S)
