"""The script that looks at every release in a git history, without a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import releases
from tests.conftest import REPO_DIR


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A history of two releases; the second changes a global that nobody knows of."""
    commit(tmp_path, "init", "-q")
    for version, source in (
        ("0.3.9", "A = 1\n"),
        ("0.3.60", "A = 1\n"),
        ("0.4.0", "SEEN = {}\ndef f(): SEEN[1] = 1\n"),
    ):
        (tmp_path / "comfyui_version.py").write_text(f'# of this release\n__version__ = "{version}"\n')
        (tmp_path / "nodes.py").write_text(source)
        commit(tmp_path, "add", "-A")
        commit(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", version)
    return tmp_path


def commit(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, text=True).stdout


def test_every_release_is_found_in_order(repository: Path) -> None:
    found = releases.History(repository).releases()
    assert [release.version for release in found] == ["0.3.9", "0.3.60", "0.4.0"]


def test_a_row_per_release_says_whether_it_fits_and_what_is_unknown(repository: Path) -> None:
    command = [sys.executable, str(REPO_DIR / "benchmarks" / "releases.py"), str(repository)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1, "these are no ComfyUI"
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| 0.")]
    assert [row[0] for row in rows] == ["| 0.3.60", "| 0.4.0"]
    assert [row[2:4] for row in rows] == [["does not fit", "0"], ["does not fit", "1"]]
    assert "execution:PromptQueue: not found in this host" in rows[0][4]
    assert "nodes.py:SEEN" in rows[1][4]
    assert run.stdout.endswith("0 of 2 releases fit\n")


def test_a_file_that_the_clone_lacks_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = releases.History(repository)
    release = history.releases()[-1]
    read = history.read
    lacked = history.tree(release.commit)["nodes.py"]

    def without(name: str) -> Any:
        return None if name == lacked else read(name)

    monkeypatch.setattr(history, "read", without)
    tree = releases.Tree(history, release)
    assert tree.read("nodes.py") is None
    assert tree.read("nowhere.py") is None
    assert tree.lacking == ["nodes.py"]


def test_an_object_that_is_missing_is_none_and_the_next_is_read(repository: Path) -> None:
    history = releases.History(repository)
    assert history.read("0" * 40) is None
    assert history.read("HEAD:nowhere.py") is None
    assert history.read("HEAD:nodes.py") == "SEEN = {}\ndef f(): SEEN[1] = 1\n"
