"""One workflow over all slots gives, in order, the images that each seed gives alone on stock ComfyUI."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from PIL import Image

from tests.host.conftest import MakeServer
from tests.host.jobs import outcome
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

SEED = 300


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu,cpu,cpu")


def shared(seed: int, *, batch: int = 1, collector: str = "DistributedCollector", **inputs: Any) -> Workflow:
    """A text-to-image job whose images come from all participants, each with its own seed."""
    workflow = txt2img(seed, batch=batch)
    workflow["seed"] = node("DistributedSeed", seed=seed)
    workflow["sampler"]["inputs"]["seed"] = ["seed", 0]
    workflow["all"] = node(collector, images=["decode", 0], **inputs)
    workflow["save"]["inputs"]["images"] = ["all", 0]
    return workflow


def pixels(server: HostServer, entry: JSON) -> list[str]:
    """A hash of each image that the job saved, in its order."""
    assert outcome(entry) == "success", entry["status"]
    names = [image["filename"] for image in entry["outputs"]["save"]["images"]]
    images = [Image.open(server.base_dir / "output" / name) for name in names]
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def run(server: HostServer, workflow: Workflow, slot: int | None = None) -> JSON:
    job_id = server.submit(workflow, slot)["prompt_id"]
    entry: JSON = server.wait([job_id], 300)[job_id]
    return entry


def alone(server: HostServer, count: int, batch: int = 1, seed: int = SEED) -> list[str]:
    """What each participant's seed gives as a job of its own."""
    entries = [run(server, txt2img(seed + participant, batch=batch)) for participant in range(count)]
    return [image for entry in entries for image in pixels(server, entry)]


def test_four_slots_give_stocks_images_in_order(server: HostServer, make_server: MakeServer) -> None:
    stock = make_server(slots=None)
    expected = alone(stock, 4, batch=2)
    stock.stop()
    assert len(set(expected)) == 8
    entry = run(server, shared(SEED, batch=2))
    assert pixels(server, entry) == expected
    assert pixels(server, run(server, shared(SEED, batch=2), slot=2)) == expected
    assert "participant 3" not in server.log()
