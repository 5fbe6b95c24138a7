"""Which ComfyUIs become slots besides the GPUs of this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.config import Config
from comfy_parallel.fleet import places
from comfy_parallel.fleet.remote import hosts
from comfy_parallel.host import facts

ON = {"COMFY_MULTI_GPU_SCHED": "1"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the remotes that hosts are made of. A remote worker is in the usual file."""
    names: list[str] = []
    file = tmp_path / "gpu_config.json"
    file.write_text(
        json.dumps({"workers": [{"id": "1", "name": "far", "host": "10.0.0.2", "port": 8188, "enabled": True}]})
    )
    monkeypatch.setattr(facts, "gpu_config_file", lambda: file)
    monkeypatch.setattr(hosts, "Hosts", lambda remotes: names.extend(remote.name for remote in remotes))
    monkeypatch.chdir(tmp_path)
    return names


def hosts_of(**env: Any) -> None:
    places._hosts(Config.from_env({**ON, **env}))


def test_workers_of_the_usual_file_are_remotes(made: list[str]) -> None:
    hosts_of()
    assert made == ["far"]


def test_no_file_is_read_where_that_is_off(made: list[str]) -> None:
    Path("off").write_text("this is no configuration")
    hosts_of(COMFY_PARALLEL_GPU_CONFIG="off")
    assert made == []
    hosts_of(COMFY_PARALLEL_GPU_CONFIG="off", COMFY_PARALLEL_REMOTE="http://10.0.0.3:8188")
    assert made == ["remote0"]
