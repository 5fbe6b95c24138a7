"""Files that another ComfyUI has saved come here under names that overwrite nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.errors import RemoteError
from comfy_parallel.fleet.remote.outputs import Fetched, Outputs


class Wire:
    """Another ComfyUI's files: by kind, folder and name, their bytes; the tag is of these."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.fetched: list[str] = []

    @asynccontextmanager
    async def file(self, *place: str) -> AsyncIterator[Any]:
        if place not in self.files:
            raise RemoteError("GET /view answered 404", status=404)
        data = self.files[place]  # type: ignore[index]

        async def write_to(write: Callable[[bytes], object]) -> None:
            self.fetched.append(place[2])
            write(data)

        yield SimpleNamespace(tag=data.hex(), write_to=write_to)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders; numbers count on from the highest that a name begins with."""

    def number(prefix: str, base: str) -> tuple[str, str, int, str, str]:
        folder, name = (Path(base) / prefix).parent, Path(prefix).name
        folder.mkdir(parents=True, exist_ok=True)
        found = [path.name.removeprefix(f"{name}_").split("_")[0] for path in folder.glob(f"{name}_*_*")]
        return str(folder), name, max((int(one) for one in found if one.isdigit()), default=0) + 1, "", prefix

    folders = SimpleNamespace(
        get_directory_by_type=lambda kind: str(tmp_path / kind) if kind in ("input", "output", "temp") else None,
        get_save_image_path=number,
    )
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    (tmp_path / "output").mkdir()
    return tmp_path


def bring(wire: Wire, shown: Any, fetched: Fetched | None = None) -> Any:
    return asyncio.run(Outputs(wire, fetched or Fetched()).bring(shown))  # type: ignore[arg-type]


def image(name: str, subfolder: str = "", kind: str = "output") -> dict[str, str]:
    return {"filename": name, "subfolder": subfolder, "type": kind}


def test_numbers_count_on_from_those_here(home: Path) -> None:
    (home / "output" / "x_00004_.png").write_bytes(b"mine")
    wire = Wire()
    wire.files = {("output", "", f"x_0001{n}_.png"): bytes([n]) for n in range(3)}
    shown = {"images": [image(f"x_0001{n}_.png") for n in range(3)], "text": ["as it is"], "animated": [True]}
    told = bring(wire, shown)
    assert [one["filename"] for one in told["images"]] == ["x_00005_.png", "x_00006_.png", "x_00007_.png"]
    assert (told["text"], told["animated"]) == (["as it is"], [True])
    assert [(home / "output" / one["filename"]).read_bytes() for one in told["images"]] == [b"\0", b"\1", b"\2"]
    assert (home / "output" / "x_00004_.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("there", "before", "here"),
    [
        ("plain.txt", [], "plain.txt"),
        ("plain.txt", ["plain.txt", "plain (1).txt"], "plain (2).txt"),
        ("clip_00001.mp4", ["clip_00001.mp4", "clip_00002.mp4"], "clip_00003.mp4"),
        ("clip_00007-audio.mp4", [], "clip_00001-audio.mp4"),
        ("name_123456_.png", ["name_00009_.png"], "name_000010_.png"),
        ("_00001_.png", [], "_00001_.png"),
    ],
)
def test_no_name_is_taken_twice(home: Path, there: str, before: list[str], here: str) -> None:
    for name in before:
        (home / "output" / name).write_bytes(b"mine")
    wire = Wire()
    wire.files["output", "", there] = b"new"
    assert bring(wire, {"files": [image(there)]})["files"][0]["filename"] == here
    assert (home / "output" / here).read_bytes() == b"new"
    assert all((home / "output" / name).read_bytes() == b"mine" for name in before)


def test_folders_and_whole_paths_are_told_anew(home: Path) -> None:
    wire = Wire()
    wire.files["output", "a/b", "clip_00001.mp4"] = b"film"
    told = bring(wire, [{**image("clip_00001.mp4", "a\\b"), "fullpath": "C:\\there\\clip_00001.mp4"}])
    path = home / "output" / "a" / "b" / "clip_00001.mp4"
    assert told == [{**image("clip_00001.mp4", "a/b"), "fullpath": str(path)}]
    assert path.read_bytes() == b"film"


def test_what_was_fetched_is_not_fetched_again_while_it_is_here_and_the_same(home: Path) -> None:
    wire, fetched = Wire(), Fetched()
    place = ("output", "", "x_00001_.png")
    wire.files[place] = b"one"
    first = bring(wire, image(place[2]), fetched)
    assert bring(wire, image(place[2]), fetched) == first
    assert len(wire.fetched) == 1
    wire.files[place] = b"two"
    assert bring(wire, image(place[2]), fetched)["filename"] == "x_00002_.png"
    (home / "output" / "x_00002_.png").unlink()
    bring(wire, image(place[2]), fetched)
    assert len(wire.fetched) == 3


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [("../x.png", ""), ("a/b.png", ""), ("x.png", "../.."), ("x.png", "/etc"), ("..", ""), ("a\\b.png", "")],
)
def test_nothing_is_written_elsewhere(home: Path, name: str, subfolder: str) -> None:
    wire = Wire()
    wire.files["output", subfolder, name] = b"bad"
    with pytest.raises(RemoteError):
        bring(wire, [image(name, subfolder)])
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_file_that_cannot_be_fetched_leaves_nothing(home: Path) -> None:
    with pytest.raises(RemoteError, match="404"):
        bring(Wire(), [image("x_00001_.png")])
    assert [path for path in home.rglob("*") if path.is_file()] == []
