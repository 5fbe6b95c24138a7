"""`comfy_parallel.ops.link`: what `comfy-parallel link` and `unlink` do to a ComfyUI folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from comfy_parallel.errors import ComfyParallelError
from comfy_parallel.ops import link as linking
from comfy_parallel.ops.link import link, unlink

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    home = tmp_path / "ComfyUI"
    (home / "custom_nodes").mkdir(parents=True)
    (home / "main.py").touch()
    return home


@pytest.fixture
def entry(comfyui: Path) -> Path:
    return comfyui / "custom_nodes" / "comfy_parallel"


@pytest.fixture
def by_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package lay in site-packages, without the rest of the repository."""
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(linking, "ROOT", tmp_path / "site-packages")


def tree(folder: Path) -> dict[str, str | None]:
    return {str(path): path.read_text() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_clone_is_linked_once(comfyui: Path, entry: Path) -> None:
    assert link(comfyui) == entry
    assert link(str(comfyui)) == entry
    assert entry.readlink() == REPO_DIR
    assert (entry / "prestartup_script.py").is_file()


def test_unlink_takes_the_link_out_again_and_leaves_the_clone(comfyui: Path, entry: Path) -> None:
    link(comfyui)
    assert unlink(comfyui) is True
    assert list(entry.parent.iterdir()) == []
    assert unlink(comfyui) is False
    assert (REPO_DIR / "prestartup_script.py").is_file()


def test_a_clone_already_there_under_another_name_is_not_linked_twice(comfyui: Path, entry: Path) -> None:
    other = entry.with_name("my-clone")
    other.symlink_to(REPO_DIR)
    assert link(comfyui) == other
    assert not entry.exists()


def test_a_disabled_clone_does_not_count(comfyui: Path, entry: Path) -> None:
    entry.with_name("my-clone.disabled").symlink_to(REPO_DIR)
    assert link(comfyui) == entry
    assert entry.is_symlink()


@pytest.mark.usefixtures("by_pip")
def test_an_installed_package_gets_a_folder_that_installs_it(comfyui: Path, entry: Path) -> None:
    assert link(comfyui) == entry
    before = tree(entry)
    assert link(comfyui) == entry
    assert tree(entry) == before
    fake = entry.parent.parent / "comfy_parallel.py"
    fake.write_text("def install():\n    print('installed')\n")
    done = subprocess.run(
        [sys.executable, entry / "prestartup_script.py"],
        env={"PYTHONPATH": str(fake.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "installed\n")
    names: dict[str, object] = {}
    exec((entry / "__init__.py").read_text(), names)
    assert (names["NODE_CLASS_MAPPINGS"], names["WEB_DIRECTORY"]) == ({}, None)


@pytest.mark.usefixtures("by_pip")
def test_unlink_removes_the_folder_it_made_with_what_python_left_in_it(comfyui: Path, entry: Path) -> None:
    link(comfyui)
    (entry / "__pycache__").mkdir()
    assert unlink(comfyui) is True
    assert not entry.exists()


@pytest.mark.usefixtures("by_pip")
def test_a_folder_with_a_users_file_in_it_is_left_alone(comfyui: Path, entry: Path) -> None:
    link(comfyui)
    (entry / "notes.txt").write_text("mine")
    before = tree(entry)
    with pytest.raises(ComfyParallelError, match="delete it yourself"):
        unlink(comfyui)
    assert tree(entry) == before


def test_a_clone_replaces_the_folder_of_an_earlier_installation(
    comfyui: Path, entry: Path, by_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(comfyui)
    monkeypatch.setattr(linking, "ROOT", REPO_DIR)
    assert link(comfyui) == entry
    assert entry.readlink() == REPO_DIR


@pytest.mark.parametrize("make", ["file", "folder", "link", "broken link"])
@pytest.mark.parametrize("action", [link, unlink])
def test_what_someone_else_put_there_is_left_alone(
    comfyui: Path, entry: Path, tmp_path: Path, make: str, action: object
) -> None:
    (tmp_path / "elsewhere").mkdir()
    if make == "file":
        entry.write_text("mine")
    elif make == "folder":
        entry.mkdir()
        (entry / "prestartup_script.py").write_text("mine")
    else:
        entry.symlink_to(tmp_path / "elsewhere" if make == "link" else tmp_path / "gone")
    before, was_link = tree(comfyui), entry.is_symlink()
    with pytest.raises(ComfyParallelError, match="move it away"):
        action(comfyui)  # type: ignore[operator]
    assert (tree(comfyui), entry.is_symlink()) == (before, was_link)


@pytest.mark.parametrize("action", [link, unlink])
@pytest.mark.parametrize("missing", ["main.py", "custom_nodes", "everything"])
def test_refuses_a_folder_that_is_no_comfyui(comfyui: Path, missing: str, action: object) -> None:
    if missing == "main.py":
        (comfyui / "main.py").unlink()
    elif missing == "custom_nodes":
        (comfyui / "custom_nodes").rmdir()
    else:
        comfyui = comfyui / "nowhere"
    with pytest.raises(ComfyParallelError, match="is no ComfyUI"):
        action(comfyui)  # type: ignore[operator]


def test_a_clone_that_lies_in_custom_nodes_is_never_removed(
    comfyui: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry.mkdir()
    (entry / "prestartup_script.py").touch()
    monkeypatch.setattr(linking, "ROOT", entry)
    assert link(comfyui) == entry
    with pytest.raises(ComfyParallelError, match="not made by"):
        unlink(comfyui)
    assert (entry / "prestartup_script.py").exists()
