"""Every shell script of the repository is free of shellcheck's findings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import Need

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]


def shell_scripts() -> list[Path]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.sh"]
    names = subprocess.run(listed, cwd=REPO_DIR, check=True, capture_output=True, text=True).stdout.split()
    return [REPO_DIR / name for name in sorted(names)]


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path, need: Need) -> None:
    done = subprocess.run([need("shellcheck"), "--external-sources", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["start_multi_gpu.sh", "quick_test.sh"])
def test_script_can_be_run_and_explains_itself(name: str) -> None:
    done = subprocess.run([REPO_DIR / name, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert name in done.stdout
