"""A slot on another machine does what a slot of the front does, to the byte and to the event."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.host.comparing import comparable, is_status
from tests.host.conftest import MakeServer
from tests.host.jobs import (
    eventually,
    hold,
    interrupt,
    outcome,
    progress,
    quick,
    release,
    shown,
    slots_shown,
    start_held,
)
from tests.host.server import JSON, NODES_DIR, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.host

HERE, STOCK, OURS = 0, 1, 2  # the slots of the front: its own, on a stock ComfyUI, on one with this package
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def stock(make_module_server: MakeServer, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HostServer:
    """A stock ComfyUI without this package, and with one checkpoint only."""
    home = tmp_path_factory.mktemp("stock")
    checkpoints = home / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "a.safetensors").symlink_to(models_dir / "checkpoints" / "a.safetensors")
    return make_module_server(home, slots=None, link=False, packs=[NODES_DIR])


@pytest.fixture(scope="module")
def servers(make_module_server: MakeServer, stock: HostServer) -> tuple[HostServer, HostServer]:
    """The front, and a ComfyUI with this package."""
    ours = make_module_server(slots="cpu")
    addresses = f"{stock.url},{ours.url}/"
    front = make_module_server(slots="cpu", env={"COMFY_PARALLEL_REMOTE": addresses})
    eventually(
        lambda: [slot["worker"]["state"] for slot in slots_shown(front)[1:]] == ["ready"] * 2, "no remote is ready"
    )
    return front, ours


@pytest.fixture(scope="module")
def front(servers: tuple[HostServer, HostServer]) -> HostServer:
    return servers[0]


def told_of(server: HostServer, workflow: Workflow, slot: int, features: dict[str, bool]) -> list[Any]:
    """All that a client receives of a job, and its entry in the history, without what tells times, ids and slots."""
    with server.websocket(**features) as client:
        if features:
            client.wait_for(lambda event: event["type"] == "feature_flags")
        job_id = server.submit(workflow, slot, client.client_id)["prompt_id"]
        client.wait_for_end(job_id, LIMIT_S)
        client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] is None, LIMIT_S)
        told = [comparable(one, job_id, slot) for one in client.messages if not is_status(one)]
        return [*told, comparable(server.wait([job_id])[job_id], job_id, slot)]


def on_all(server: HostServer, make: Callable[[], Workflow], **features: bool) -> list[list[Any]]:
    return [told_of(server, make(), slot, features) for slot in (HERE, STOCK, OURS)]


def new_files(server: HostServer, before: set[Path]) -> list[Path]:
    return sorted(set(server.output_files()) - before)


def test_it_says_what_it_is(front: HostServer, stock: HostServer) -> None:
    told = slots_shown(front)
    assert [(slot["kind"], slot["device"]) for slot in told] == [
        ("thread", "cpu"),
        ("remote", "remote0"),
        ("remote", "remote1"),
    ]
    assert told[STOCK]["worker"]["address"] == stock.url
    assert told[STOCK]["device_name"] == "cpu"
    assert told[STOCK]["vram"]["total_bytes"] > 0


def test_its_images_are_the_same_and_so_is_all_that_is_told(front: HostServer) -> None:
    seed = random.getrandbits(60)
    before = set(front.output_files())
    workflow = {"extra_pnginfo": {"workflow": {"nodes": [], "id": "of the page"}}}
    ids = [
        front.submit(txt2img(seed, prefix="all/of them"), slot, extra_data=workflow)["prompt_id"]
        for slot in (HERE, STOCK, OURS)
    ]
    entries = front.wait(ids)
    assert [outcome(entry) for entry in entries.values()] == ["success"] * 3
    files = new_files(front, before)
    assert [file.name for file in files] == [f"of them_{number:05}_.png" for number in (1, 2, 3)]
    assert len({file.read_bytes() for file in files}) == 1
    assert Image.open(files[0]).info["workflow"] == '{"nodes": [], "id": "of the page"}'
    here, there, ours = on_all(front, lambda: txt2img(seed + 1, prefix="told"))
    assert there == here
    assert ours == here


JOBS: dict[str, Workflow] = {
    "values": quick(7),
    "error": {"fail": node("CPTFail", message="as nodes do"), "end": node("CPTOut", value=["fail", 0])},
    "images": {
        "image": node("EmptyImage", width=8, height=8, batch_size=2, color=7),
        "out": node("PreviewImage", images=["image", 0]),
    },
}


@pytest.mark.parametrize("kind", JOBS)
def test_its_events_and_results_are_the_same(front: HostServer, kind: str) -> None:
    here, there, ours = on_all(front, lambda: JOBS[kind])
    assert there == here
    assert ours == here


@pytest.mark.parametrize("features", [{}, {"supports_preview_metadata": True}], ids=["plain", "with metadata"])
def test_previews_come_as_the_client_takes_them(front: HostServer, features: dict[str, bool]) -> None:
    seed = random.getrandbits(60)
    here, there, ours = on_all(front, lambda: progress(seed), **features)
    assert [type(one) for one in here].count(bytes) == 3
    assert there == here
    assert ours == here


def test_inputs_are_sent_and_none_is_overwritten(front: HostServer, stock: HostServer) -> None:
    def load(name: str) -> Workflow:
        return {
            "load": node("LoadImage", image=name),
            "out": node("SaveImage", images=["load", 0], filename_prefix="in"),
        }

    def pixel(entry: JSON) -> Any:
        image = entry["outputs"]["out"]["images"][0]
        return Image.open(front.base_dir / "output" / image["subfolder"] / image["filename"]).getpixel((0, 0))

    names = ["red.png", "a b/grün.png"]
    for name, colour in zip(names, ("red", "green"), strict=True):
        path = front.base_dir / "input" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    theirs = stock.base_dir / "input" / "blue.png"
    Image.new("RGB", (8, 8), "white").save(theirs)
    white = theirs.read_bytes()
    Image.new("RGB", (8, 8), "blue").save(front.base_dir / "input" / "blue.png")
    found = [pixel(front.run(load(name), STOCK)) for name in (*names, "blue.png", "blue.png [input]")]
    assert found == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 255)]
    assert theirs.read_bytes() == white
    before = {path: path.stat().st_mtime_ns for path in (stock.base_dir / "input").rglob("*") if path.is_file()}
    Image.new("RGB", (8, 8), "black").save(front.base_dir / "input" / "red.png")
    assert pixel(front.run(load("red.png"), STOCK)) == (0, 0, 0)
    assert pixel(front.run(load("blue.png"), STOCK)) == (0, 0, 255)
    after = {path: path.stat().st_mtime_ns for path in (stock.base_dir / "input").rglob("*") if path.is_file()}
    assert len(after) == len(before) + 1  # the other red.png, and nothing twice
    assert before.items() <= after.items()


def test_a_job_goes_only_where_it_can_run(front: HostServer) -> None:
    lacking = txt2img(random.getrandbits(60), ckpt="b.safetensors", prefix="lacking")
    status, reply = front.request("POST", "/prompt", {"prompt": lacking}, headers={"X-TARGET-GPU": str(STOCK)})
    assert (status, reply["error"]["type"]) == (400, "cannot_run_there")
    assert reply["error"]["message"] == "cannot run on remote0: no model b.safetensors"
    with front.websocket() as watcher:
        kept = [start_held(front, watcher, slot) for slot in (HERE, OURS)]
        job_id = front.submit(lacking)["prompt_id"]
        reasons = slots_shown(front)[STOCK]["cannot_run"]
        assert reasons == {job_id: "cannot run on remote0: no model b.safetensors"}
        assert slots_shown(front)[OURS]["cannot_run"] == {}
        release(front, *kept)
    assert front.wait([job_id])[job_id]["gpu_id"] in (HERE, OURS)


def test_a_node_class_that_is_missing_there_is_named(front: HostServer, stock: HostServer) -> None:
    known = stock.request("GET", "/object_info")[1]
    here = front.request("GET", "/object_info")[1]
    more = sorted(kind for kind in here.keys() - known.keys() if not here[kind]["output_node"])
    assert more, "this package has nodes of its own"
    workflow = {**quick(4), "more": node(more[0])}
    refused = front.request("POST", "/prompt", {"prompt": workflow}, headers={"X-TARGET-GPU": str(STOCK)})
    assert refused[0] == 400
    assert refused[1]["error"]["message"] == f"cannot run on remote0: no node class {more[0]}"
    assert outcome(front.run(workflow, OURS)) == "success"


def test_interrupts_reach_the_job_that_they_name(front: HostServer, stock: HostServer) -> None:
    with front.websocket() as watcher:
        ids = [start_held(front, watcher, slot) for slot in (HERE, STOCK, OURS)]
        for slot, job_id in list(enumerate(ids))[1:]:
            interrupt(front, job_id)
            entry = front.wait([job_id])[job_id]
            assert (outcome(entry), entry["gpu_id"]) == ("interrupted", slot)
        assert ids[HERE] not in front.request("GET", "/history")[1]
        release(front, ids[HERE])
    assert stock.request("GET", "/queue")[1] == {"queue_running": [], "queue_pending": []}
    assert shown(front.run(quick(3), STOCK)) == 3


def test_a_job_that_waits_there_behind_anothers_is_taken_out(front: HostServer, stock: HostServer) -> None:
    with stock.websocket() as theirs:
        other = start_held(stock, theirs, None)
        job_id = front.submit(quick(11), STOCK)["prompt_id"]
        eventually(lambda: stock.request("GET", "/queue")[1]["queue_pending"], "it was not sent")
        interrupt(front, job_id)
        assert outcome(front.wait([job_id])[job_id]) == "interrupted"
        assert other not in stock.request("GET", "/history")[1]
        release(stock, other)


def test_one_that_is_killed_loses_no_job_and_is_used_again_when_it_returns(
    front: HostServer, stock: HostServer
) -> None:
    with front.websocket() as watcher:
        lost = front.submit(hold(seed=5), client_id=watcher.client_id)["prompt_id"]
        eventually(lambda: slots_shown(front)[HERE]["running"] == [lost], "an idle front runs its jobs itself")
        moved = front.submit(hold(seed=6), client_id=watcher.client_id)["prompt_id"]
        eventually(lambda: slots_shown(front)[STOCK]["running"] == [moved], "the second job is not on the stock host")
        watcher.wait_for(lambda event: event["type"] == "executing" and event["data"].get("prompt_id") == moved)
        stock.stop(signal_number=signal.SIGKILL)
        eventually(lambda: slots_shown(front)[STOCK]["worker"]["state"] == "unreachable", "its end was not noticed")
        eventually(lambda: slots_shown(front)[OURS]["running"] == [moved], "no other slot took its job")
        bound = front.submit(quick(21), STOCK)["prompt_id"]
        assert slots_shown(front)[STOCK]["pending"] == [bound]
        stock.start()
        assert shown(front.wait([bound])[bound]) == 21
        assert slots_shown(front)[STOCK]["worker"]["restarts"] == 1
        assert [outcome(entry) for entry in release(front, lost, moved).values()] == ["interrupted"] * 2


def test_jobs_of_all_slots_save_under_one_name_and_overwrite_nothing(front: HostServer) -> None:
    def save(colour: int) -> Workflow:
        image = node("EmptyImage", width=8, height=8, batch_size=2, color=colour)
        return {"image": image, "save": node("SaveImage", images=["image", 0], filename_prefix="one/name")}

    before = set(front.output_files())
    front.request("POST", "/parallel/pause", {})
    ids = [front.submit(save(colour))["prompt_id"] for colour in range(30)]
    front.request("POST", "/parallel/resume", {})
    entries = front.wait(ids)
    assert [outcome(entry) for entry in entries.values()] == ["success"] * 30
    images = {image["filename"]: entry for entry in entries.values() for image in entry["outputs"]["save"]["images"]}
    assert len(images) == 60
    assert len(new_files(front, before)) == 60
    assert {entry["gpu_id"] for entry in images.values()} == {HERE, STOCK, OURS}
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(lambda path: Image.open(path).size, new_files(front, before))) == {(8, 8)}
    colours = {
        colour: {
            Image.open(front.base_dir / "output" / "one" / image["filename"]).getpixel((0, 0))
            for image in entries[job_id]["outputs"]["save"]["images"]
        }
        for colour, job_id in enumerate(ids)
    }
    assert colours == {colour: {(0, 0, colour)} for colour in range(30)}
