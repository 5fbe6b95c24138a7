"""Every saved image has a file of its own, whichever slot saved it, under the name that stock ComfyUI would give."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from tests.host.jobs import held
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

NUM_SLOTS = 4
NUM_SAVES = 400
ROUNDING = 2  # The host cuts decimals off when it turns floats into bytes.


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots=",".join(["cpu"] * NUM_SLOTS))


@pytest.fixture(scope="module")
def stock(shared_server: ServerPool) -> HostServer:
    return shared_server(slots=None)


def colour(seed: int) -> tuple[int, int, int]:
    """Colours of different seeds are further apart than rounding can bring them."""
    return 5 + 10 * (seed % 24), 5 + 10 * (seed // 24 % 24), 5 + 10 * (seed // 576)


def save(seed: int, prefix: str, *, batch: int = 1) -> Workflow:
    red, green, blue = colour(seed)
    size = {"width": 16, "height": 16, "batch_size": batch}
    return {
        "image": node("EmptyImage", color=red << 16 | green << 8 | blue, **size),
        "save": node("SaveImage", images=["image", 0], filename_prefix=prefix),
    }


def preview(seed: int) -> Workflow:
    return {**save(seed, "", batch=2), "save": node("PreviewImage", images=["image", 0])}


def save_animated(seed: int, prefix: str) -> Workflow:
    animation = node("SaveAnimatedPNG", images=["image", 0], filename_prefix=prefix, fps=6.0, compress_level=4)
    return {**save(seed, prefix, batch=2), "save": animation}


def save_twice(seed: int, prefix: str) -> Workflow:
    """Two nodes save; which comes first is left to chance by the host."""
    other = save(seed, prefix, batch=2)
    again = node("SaveImage", images=["other", 0], filename_prefix=prefix)
    return {**save(seed, prefix), "other": other["image"], "again": again}


def run_all_at_once(server: HostServer, workflows: Iterable[Workflow]) -> list[JSON]:
    """Queue all jobs for any slot, then let all slots take them; the history entries in the same order."""
    with held(server, *range(NUM_SLOTS)):
        ids = [server.submit(workflow)["prompt_id"] for workflow in workflows]
    entries = server.wait(ids)
    return [entries[job_id] for job_id in ids]


def saved(entry: JSON) -> list[JSON]:
    """What the history says was saved: filename, subfolder and type of each image."""
    images: list[JSON] = entry["outputs"]["save"]["images"]
    return images


def path_of(server: HostServer, image: JSON) -> Path:
    return server.base_dir / image["type"] / image["subfolder"] / image["filename"]


def names(server: HostServer, prefix: str) -> set[str]:
    return {str(path.relative_to(server.base_dir / "output")) for path in server.output_files() if prefix in str(path)}


def number_in(name: str) -> int:
    match = re.search(r"_(\d{5,})_\.", name)
    assert match is not None, f"{name} holds no number"
    return int(match[1])


def assert_shows(path: Path, seed: int) -> None:
    """The file holds the image of the job with this seed, and that job's workflow."""
    with Image.open(path) as image:
        seen = image.convert("RGB").getpixel((8, 8))
        workflow = image.info.get("prompt")
    assert isinstance(seen, tuple)
    assert all(abs(a - b) <= ROUNDING for a, b in zip(seen, colour(seed), strict=True)), f"{path.name} shows {seen}"
    if workflow is not None:
        red, green, blue = colour(seed)
        assert json.loads(workflow)["image"]["inputs"]["color"] == red << 16 | green << 8 | blue


def assert_each_has_its_own(server: HostServer, entries: list[JSON]) -> None:
    """Job i has saved images of seed i, and no file belongs to two jobs."""
    paths = [path_of(server, image) for entry in entries for image in saved(entry)]
    assert len(set(paths)) == len(paths)
    for seed, entry in enumerate(entries):
        for image in saved(entry):
            assert_shows(path_of(server, image), seed)


def assert_all_slots_took_part(entries: list[JSON]) -> None:
    assert {entry["gpu_id"] for entry in entries} == set(range(NUM_SLOTS))


def test_400_saves_with_one_prefix_make_400_files(server: HostServer) -> None:
    entries = run_all_at_once(server, (save(seed, "shared") for seed in range(NUM_SAVES)))
    assert_all_slots_took_part(entries)
    assert_each_has_its_own(server, entries)
    assert names(server, "shared") == {saved(entry)[0]["filename"] for entry in entries}
    assert len(names(server, "shared")) == NUM_SAVES


def test_batches_and_single_images_with_one_prefix(server: HostServer) -> None:
    sizes = [(1, 4, 2)[seed % 3] for seed in range(60)]
    entries = run_all_at_once(server, (save(seed, "mixed", batch=size) for seed, size in enumerate(sizes)))
    assert_all_slots_took_part(entries)
    assert [len(saved(entry)) for entry in entries] == sizes
    assert_each_has_its_own(server, entries)
    assert len(names(server, "mixed")) == sum(sizes)


def test_a_batch_counts_upwards(server: HostServer) -> None:
    entries = run_all_at_once(server, (save(seed, "upwards", batch=3) for seed in range(20)))
    for entry in entries:
        numbers = [number_in(image["filename"]) for image in saved(entry)]
        assert numbers == sorted(set(numbers))


def test_two_kinds_of_nodes_with_one_prefix(server: HostServer) -> None:
    makers = [save, save_animated]
    entries = run_all_at_once(server, (makers[seed % 2](seed, "kinds") for seed in range(60)))
    assert_all_slots_took_part(entries)
    assert_each_has_its_own(server, entries)
    assert len(names(server, "kinds")) == 60


def test_numbering_continues_after_existing_files(server: HostServer) -> None:
    existing = server.base_dir / "output" / "kept_00041_.png"
    existing.write_bytes(b"somebody's picture")
    entries = run_all_at_once(server, (save(seed, "kept") for seed in range(40)))
    assert existing.read_bytes() == b"somebody's picture"
    assert_each_has_its_own(server, entries)
    assert min(number_in(saved(entry)[0]["filename"]) for entry in entries) == 42


def test_different_prefixes_count_on_their_own(server: HostServer) -> None:
    prefixes = ["one", "two/three", "two/four"]
    entries = run_all_at_once(server, (save(seed, prefixes[seed % 3]) for seed in range(30)))
    assert_each_has_its_own(server, entries)
    for index, prefix in enumerate(prefixes):
        mine = [saved(entry)[0] for entry in entries[index::3]]
        assert {image["subfolder"] for image in mine} == {str(Path(prefix).parent).replace(".", "")}
        assert min(number_in(image["filename"]) for image in mine) == 1


def test_previews_make_temporary_files_of_their_own(server: HostServer) -> None:
    entries = run_all_at_once(server, (preview(seed) for seed in range(40)))
    assert_all_slots_took_part(entries)
    assert {image["type"] for entry in entries for image in saved(entry)} == {"temp"}
    assert_each_has_its_own(server, entries)


def serial(first: int) -> list[Workflow]:
    """Jobs to run one by one. Other seeds make other images, which no slot has cached."""
    return [
        save(first + 1, "serial"),
        save(first + 2, "serial"),
        save(first + 3, "serial", batch=4),
        save(first + 4, "serial"),
        save(first + 5, "folder/within/serial"),
        save(first + 6, "folder/within/serial", batch=2),
        save(first + 7, "size_%width%x%height%"),
        save(first + 8, "size_%width%x%height%"),
        save(first + 9, "each_%batch_num%", batch=3),
        save(first + 10, "each_%batch_num%", batch=2),
        save(first + 11, "serial_00007_"),
        save(first + 12, "serial"),
        save(first + 13, "umlaut ä"),
        save(first + 14, "umlaut ä"),
        save_twice(first + 15, "twice"),
        save_twice(first + 16, "twice"),
    ]


def test_one_by_one_the_names_are_stocks(server: HostServer, stock: HostServer) -> None:
    ours, stocks = ([run_and_name(host, workflow) for workflow in serial(100)] for host in (server, stock))
    assert ours == stocks
    assert ours[0] == ["/serial_00001_.png"]


def test_one_by_one_on_changing_slots_the_names_are_stocks(server: HostServer, stock: HostServer) -> None:
    for host in (server, stock):
        for path in host.output_files():
            path.unlink()
    ours = [run_and_name(server, workflow, number % NUM_SLOTS) for number, workflow in enumerate(serial(200))]
    assert ours == [run_and_name(stock, workflow) for workflow in serial(200)]
    assert ours[0] == ["/serial_00001_.png"]


def run_and_name(server: HostServer, workflow: Workflow, slot: int | None = None) -> list[str]:
    outputs = server.run(workflow, slot)["outputs"]
    return sorted(
        f"{image['subfolder']}/{image['filename']}" for output in outputs.values() for image in output["images"]
    )


# Node packs, which do with a number whatever they like.

WAYS = [
    *("add one", "add index", "percent", "percent of one", "format", "str", "str of int", "f-string of int"),
    *("index", "range", "numpy", "copy", "pickle", "thread", "int in thread"),
]


def save_texts(
    prefix: str, way: str, *, count: int = 2, parties: int = NUM_SLOTS, text: str = "", **how: str
) -> Workflow:
    """A job that asks for a number when all parties do, and writes in a later node."""
    return {
        "names": node("CPTNames", way=way, count=count, parties=parties, prefix=prefix, key=prefix),
        "write": node("CPTWrite", paths=["names", 0], text=text, **{"how": "at once", "beside": "", **how}),
    }


def files_of(entry: JSON) -> list[str]:
    files: list[str] = entry["outputs"]["write"]["files"]
    return files


@pytest.mark.parametrize("how", [{}, {"how": "in a thread"}, {"beside": ".json .wav"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_files_of_packs_are_never_overwritten(server: HostServer, way: str, how: dict[str, str]) -> None:
    """What would overwrite a file fails."""
    prefix = f"{way} {' '.join(how.values())}".replace(".", "").strip()
    workflows = [save_texts(prefix, way, text=f"job {number}", **how) for number in range(NUM_SLOTS)]
    entries = server.wait([server.submit(workflow, slot)["prompt_id"] for slot, workflow in enumerate(workflows)])
    assert [entry["status"]["status_str"] for entry in entries.values()] == ["success"] * NUM_SLOTS
    for number, entry in enumerate(entries.values()):
        assert len(files_of(entry)) == 2
        for name in files_of(entry):
            assert (server.base_dir / "output" / name).read_text() == f"job {number}"
    endings = 1 + len(how.get("beside", "").split())
    mine = [name for name in names(server, prefix) if name.startswith(f"{prefix}_")]
    assert len(mine) == NUM_SLOTS * 2 * endings


@pytest.mark.parametrize("way", WAYS)
def test_alone_files_of_packs_are_named_as_on_stock(server: HostServer, stock: HostServer, way: str) -> None:
    def named(host: HostServer) -> list[str]:
        sizes = [2, 1, 3]
        workflows = [save_texts(f"alone {way}", way, count=size, parties=1) for size in sizes]
        return [name for workflow in workflows for name in files_of(host.run(workflow, None if host is stock else 1))]

    assert named(server) == named(stock)


def test_a_number_that_was_not_used_is_free_after_its_job(server: HostServer) -> None:
    names_only = {
        "names": node("CPTNames", way="str of int", count=1, parties=1, prefix="unused", key="unused"),
        "out": node("CPTOut", value=["names", 0]),
    }
    assert "unused_00001_.txt" in str(server.run(names_only, 0)["outputs"])
    assert files_of(server.run(save_texts("unused", "add one", parties=1), 1)) == [
        "unused_00001_.txt",
        "unused_00002_.txt",
    ]
