"""Lists and tiles whose items are handed out: each slot that is free takes the next one, and the order is kept."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from PIL import Image

from tests.host.jobs import await_idle, new_key, outcome
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

STARTS = {
    "DistributedListSplitter": {"mode": "dynamic"},
    "DistributedImageListStart": {},
}


@pytest.fixture
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu,cpu,cpu")


def run(server: HostServer, workflow: Workflow) -> JSON:
    job_id = server.submit(workflow, 0)["prompt_id"]
    entry: JSON = server.wait([job_id], 300)[job_id]
    assert outcome(entry) == "success", entry["status"]
    return entry


def images(server: HostServer, entry: JSON) -> list[Image.Image]:
    names = [image["filename"] for image in entry["outputs"]["save"]["images"]]
    return [Image.open(server.base_dir / "output" / name) for name in names]


def listed(count: int, start: str = "DistributedImageListStart", **inputs: Any) -> Workflow:
    """A list of images of two sizes in turn, each of which a slot works on."""
    workflow = {f"image{size}": node("EmptyImage", width=size, height=8, batch_size=1, color=0) for size in (8, 16)}
    return workflow | {
        "list": node("CPTList", first=["image8", 0], second=["image16", 0], count=count),
        "start": node(start, images=["list", 0], **STARTS.get(start, {})),
        "work": node("CPTMet", images=["start", 0], key=new_key(), parties=min(count, 4)),
        "end": node("DistributedImageListEnd", images=["work", 0], **inputs),
        "save": node("SaveImage", images=["end", 0], filename_prefix="pulled"),
    }


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [9, 1])
def test_all_slots_take_images_of_a_list_until_none_is_left(server: HostServer, count: int, start: str) -> None:
    entry = run(server, listed(count, start))
    assert [image.width for image in images(server, entry)] == ([8, 16] * 5)[:count]


def test_a_list_that_was_cached_is_handed_out_again(server: HostServer) -> None:
    """Only what is behind it has changed."""
    workflow = listed(6)
    run(server, workflow)
    workflow["work"]["inputs"] |= {"key": new_key(), "parties": 1}
    assert [image.width for image in images(server, run(server, workflow))] == [8, 16] * 3
    await_idle(server)


def test_slots_that_take_no_jobs_leave_a_list_to_the_jobs_own(server: HostServer) -> None:
    server.request("POST", "/parallel/pause", {"gpu_ids": [1, 2, 3]})
    try:
        workflow = listed(5)
        workflow["work"]["inputs"]["parties"] = 1
        assert [image.width for image in images(server, run(server, workflow))] == [8, 16, 8, 16, 8]
    finally:
        server.request("POST", "/parallel/resume", {"gpu_ids": [1, 2, 3]})


def test_a_batch_and_other_things_are_handed_out_too(server: HostServer) -> None:
    workflow = {
        "batch": node("EmptyImage", width=8, height=8, batch_size=5, color=7),
        "start": node("ParallelListStart", value=["batch", 0]),
        "work": node("CPTMet", images=["start", 0], key=new_key(), parties=4),
        "end": node("ParallelCollector", value=["work", 0]),
        "save": node("SaveImage", images=["end", 0], filename_prefix="pulled"),
    }
    assert len(images(server, run(server, workflow))) == 5


def tiled(batch: int, **inputs: Any) -> Workflow:
    """Plain pictures that are sampled in four tiles with soft seams."""
    workflow = {name: one for name, one in txt2img(0).items() if name in ("ckpt", "positive", "negative", "save")}
    workflow["canvas"] = node("EmptyImage", width=96, height=88, batch_size=batch, color=0x4080C0)
    workflow["tiles"] = node(
        "UltimateSDUpscaleDistributed",
        upscaled_image=["canvas", 0],
        model=["ckpt", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["ckpt", 2],
        seed=500,
        steps=1,
        cfg=7.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=0.5,
        tile_width=64,
        tile_height=64,
        padding=8,
        mask_blur=4,
        **{"force_uniform_tiles": True, "tiled_decode": False, **inputs},
    )
    workflow["save"]["inputs"]["images"] = ["tiles", 0]
    return workflow


def pixels(server: HostServer, entry: JSON) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images(server, entry)]


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [({"force_uniform_tiles": False, "tiled_decode": True}, 2), ({"dynamic_threshold": 1}, 3)],
    ids=["a tile each", "an image each"],
)
def test_tiles_of_all_slots_are_those_of_one(server: HostServer, inputs: JSON, batch: int) -> None:
    alone, together = (tiled(batch, participants=participants, **inputs) for participants in (1, 4))
    before = shares(server)
    expected = pixels(server, run(server, alone))
    assert shares(server) == before
    assert pixels(server, run(server, together)) == expected
    assert shares(server) > before
    assert len(expected) == batch


def shares(server: HostServer) -> int:
    await_idle(server)
    return sum(queue["metrics"]["shares"] for queue in server.request("GET", "/queue/all")[1]["queues"])
