"""The search for unknown globals of a host: what it finds, and that it is made once per state of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel.patching import unknown
from comfy_parallel.patching.unknown import Search

SOURCE = "seen = {}\n\ndef note(name):\n    seen[name] = 1\n"


@pytest.fixture
def host_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "comfy" / "notes.py").write_text(SOURCE)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(unknown, "__file__", str(own / "unknown.py"))
    return host


def starts(search: Search) -> bool:
    """Whether the sources are looked at anew."""
    return search._process is not None


def test_what_was_found_is_told_again_without_another_look(host_dir: Path) -> None:
    first = Search(host_dir)
    found = first.found()
    assert starts(first)
    assert [sentence.partition(":")[0] for sentence in found] == ["unknown global seen (comfy/notes.py"]
    again = Search(host_dir)
    assert not starts(again)
    assert again.found() == found


def test_a_changed_source_is_looked_at_again(host_dir: Path) -> None:
    Search(host_dir).found()
    (host_dir / "comfy" / "notes.py").write_text("seen = {}\n")
    search = Search(host_dir)
    assert starts(search)
    assert search.found() == []


def test_a_kept_file_that_cannot_be_read_costs_another_look_only(host_dir: Path) -> None:
    found = Search(host_dir).found()
    for kept in Path(unknown.__file__).parent.rglob("unknown-globals-*"):
        kept.write_text("{")
    assert Search(host_dir).found() == found


def test_where_nothing_can_be_kept_it_is_looked_for_each_time(host_dir: Path) -> None:
    (Path(unknown.__file__).parent / "__pycache__").write_text("no folder")
    assert len(Search(host_dir).found()) == 1
    second = Search(host_dir)
    assert starts(second)
    second.stop()
