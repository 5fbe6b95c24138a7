"""The examples run as they are, against a real ComfyUI: to a slot, to any, with progress, and fetch the images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Need
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
LANGUAGES = ("py", "mjs")


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    """Two pictures that nobody has made before, after a node that reports its steps."""
    image = {"width": 16, "height": 16, "batch_size": 2, "color": uuid.uuid4().int % (1 << 24)}
    prompt: dict[str, Any] = {
        "work": {"class_type": "CPTProgress", "inputs": {"steps": 4, "ms": 400, "seed": uuid.uuid4().int % 1000}},
        "shown": {"class_type": "CPTOut", "inputs": {"value": ["work", 0]}},
        "image": {"class_type": "EmptyImage", "inputs": image},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": "example"}},
    }
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(prompt))
    return path


def run(need: Need, language: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = sys.executable if language == "py" else need("node")
    command = [program, EXAMPLES / f"submit.{language}", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("gpu", ["2", "auto"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_it_submits_follows_and_fetches(
    need: Need, host: HostServer, tmp_path: Path, workflow: Path, language: str, gpu: str
) -> None:
    done = run(need, language, workflow, "--url", host.url, "--gpu", gpu, "--output", tmp_path / "images")
    assert done.returncode == 0, done.stdout + done.stderr
    (job_id,) = re.findall(r"job (\S+) is queued for", done.stdout)
    job = host.request("GET", f"/history/{job_id}")[1][job_id]
    assert f"it ran on slot {job['gpu_id']}: success" in done.stdout
    assert gpu == "auto" or job["gpu_id"] == int(gpu)
    assert re.search(rf"slot {job['gpu_id']}: .*step \d of 4", done.stdout), done.stdout
    names = [image["filename"] for image in job["outputs"]["save"]["images"]]
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "images" / name).read_bytes() == (host.base_dir / "output" / name).read_bytes()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_refusal_is_shown(need: Need, host: HostServer, workflow: Path, language: str) -> None:
    done = run(need, language, workflow, "--url", host.url, "--gpu", "99")
    assert done.returncode == 1
    assert "invalid_target_gpu" in done.stderr
