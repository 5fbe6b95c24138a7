"""Jobs that save over files that other slots have mapped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import outcome
from tests.host.server import HostServer
from tests.host.test_weights import image_of, slots
from tests.host.workflows import node, txt2img

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

PATIENCE_S = 15  # The kernel's is 45 s, after which the file is cut off under its users.


@pytest.fixture
def path(models_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    shutil.copytree(models_dir, tmp_path / "base" / "models")
    return tmp_path / "base" / "models" / "checkpoints" / "a.safetensors"


@pytest.fixture
def server(make_server: MakeServer, path: Path) -> HostServer:
    return make_server(path.parents[2], slots=slots(2))


@pytest.mark.parametrize("how", ["torch.save", "safetensors", "native"])
def test_a_job_that_saves_over_a_model_in_use_is_not_kept_waiting(server: HostServer, path: Path, how: str) -> None:
    expected = image_of(server, txt2img(1), 1)
    assert image_of(server, txt2img(1), 0) == expected
    entry = server.run({"save": node("CPTOverwrite", path=str(path), how=how)}, 0)
    assert outcome(entry) == "success", entry["status"]
    assert entry["outputs"]["save"]["value"][0] < PATIENCE_S
    assert image_of(server, txt2img(1, prefix="again"), 1) == expected
    assert path.stat().st_size < 10_000
