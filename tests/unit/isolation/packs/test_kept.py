"""What was found in a pack is kept until one of its files changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import CodeType

import pytest

from comfy_parallel.isolation.packs import kept
from comfy_parallel.isolation.packs.kept import kept_code, kept_plan
from comfy_parallel.isolation.packs.plans import PackPlan, plan_of
from comfy_parallel.isolation.packs.rewrite import Plan

SHARED = "rows = []\nlast = None\nclass Store:\n    images = {}\n"
PACK = """
from .shared import rows as mine, Store
import comfy.sample
class Node:
    @classmethod
    def INPUT_TYPES(cls):
        return {}
    def run(self, value):
        mine.append(value)
        Store.images[value] = 1
        comfy.sample.noise = value
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACK)
    (folder / "shared.py").write_text(SHARED)
    return folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packs that were looked at."""
    looked: list[Path] = []

    def look(root: Path) -> PackPlan:
        looked.append(root)
        return plan_of(root)

    monkeypatch.setattr(kept, "plan_of", look)
    return looked


def test_a_plan_is_read_as_it_was_made(pack: Path, looks: list[Path]) -> None:
    made, read = kept_plan(pack), kept_plan(pack)
    assert made == read
    assert read.files["__init__.py"].imported
    assert read.files["shared.py"].attributes == {"Store": {"images"}}
    assert {found.kind for found in read.findings} == {"module state", "class state", "host write"}
    assert looks == [pack]


@pytest.mark.parametrize("change", ["text", "new file", "no file", "broken"])
def test_a_change_is_noticed(pack: Path, looks: list[Path], change: str) -> None:
    kept_plan(pack)
    if change == "text":
        (pack / "shared.py").write_text(SHARED + "more = []\n")
    elif change == "new file":
        (pack / "new.py").write_text("")
    elif change == "no file":
        (pack / "shared.py").unlink()
    else:
        (place,) = (pack / "__pycache__").iterdir()
        place.write_text("{")
    assert kept_plan(pack) == plan_of(pack)
    assert looks == [pack, pack]


def test_a_pack_of_one_file_keeps_a_plan_of_its_own(tmp_path: Path, looks: list[Path]) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f"# {name}\n" + SHARED)
    roots = [tmp_path / "one.py", tmp_path / "two.py"]
    for root in (*roots, *roots):
        kept_plan(root)
    assert looks == roots


def test_a_folder_that_cannot_be_written_to(pack: Path, looks: list[Path]) -> None:
    (pack / "__pycache__").write_text("in the way")
    assert kept_plan(pack) == kept_plan(pack)
    assert looks == [pack, pack]


def test_code_is_made_once_for_each_plan(pack: Path) -> None:
    made: list[str] = []

    def make(name: str) -> CodeType:
        made.append(name)
        return compile(f"x = {name!r}", "f", "exec")

    def value(plan: Plan, name: str) -> object:
        code, namespace = kept_code(pack / "shared.py", plan, lambda: make(name)), {}
        assert code is not None
        exec(code, namespace)
        return namespace["x"]

    assert [value(Plan(), "a"), value(Plan(), "b"), value(Plan(names={"rows"}), "c")] == ["a", "a", "c"]
    os.utime(pack / "shared.py", (1, 1))
    assert value(Plan(names={"rows"}), "d") == "d"
    assert made == ["a", "c", "d"]


def test_that_nothing_is_to_be_rewritten_is_kept_too(pack: Path) -> None:
    made: list[None] = []
    for _ in range(2):
        assert kept_code(pack / "shared.py", Plan(), lambda: made.append(None)) is None
    assert made == [None]
    shutil.rmtree(pack / "__pycache__")
    kept_code(pack / "shared.py", Plan(), lambda: made.append(None))
    assert made == [None, None]
