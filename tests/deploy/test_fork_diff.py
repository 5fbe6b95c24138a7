"""patches/main.diff: a fork that carries it needs no custom node."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import Need
from tests.host.server import HostServer

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]
DIFF = REPO_DIR / "patches" / "main.diff"


@pytest.fixture
def fork(host_dir: Path, tmp_path: Path, need: Need) -> Path:
    """The host, with the diff applied to a copy of its main.py."""
    home = tmp_path / "fork"
    home.mkdir()
    for entry in host_dir.iterdir():
        if entry.name not in ("main.py", ".git"):
            (home / entry.name).symlink_to(entry)
    (home / "main.py").write_bytes((host_dir / "main.py").read_bytes())
    git(need, home, "apply", "--check", str(DIFF))
    git(need, home, "apply", str(DIFF))
    return home


def git(need: Need, home: Path, *args: str) -> None:
    """Git in a folder that is no repository, whatever lies around it."""
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(home.parent)}
    done = subprocess.run([need("git"), *args], cwd=home, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_diff_applies_and_can_be_taken_back(fork: Path, host_dir: Path, need: Need) -> None:
    assert (fork / "main.py").read_bytes() != (host_dir / "main.py").read_bytes()
    git(need, fork, "apply", "--reverse", str(DIFF))
    assert (fork / "main.py").read_bytes() == (host_dir / "main.py").read_bytes()


def test_install_runs_before_anything_else_of_the_start_scripts(fork: Path) -> None:
    tree = ast.parse((fork / "main.py").read_text())
    function = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "execute_prestartup_script")
    assert isinstance(function, ast.FunctionDef)
    assert [ast.unparse(line) for line in function.body[:2]] == ["import comfy_parallel", "comfy_parallel.install()"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("is_linked", "args"),
    [(False, ["--disable-all-custom-nodes"]), (True, [])],
    ids=["custom nodes disabled", "custom node there too"],
)
def test_a_fork_runs_jobs_on_its_slots(fork: Path, tmp_path: Path, is_linked: bool, args: list[str]) -> None:
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    env = {"PYTHONPATH": str(REPO_DIR)}
    with HostServer(fork, tmp_path / "base", env=env, args=args, link=is_linked) as host:
        assert host.run(workflow, slot=1)["gpu_id"] == 1
        assert host.request("GET", "/queue/all")[1]["num_gpus"] == 2
