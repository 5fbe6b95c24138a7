"""`comfy-parallel launch --gpus 0,1`: each ComfyUI computes on its own GPU what the other computes too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.host.launched import Launched, ended, eventually, is_ready
from tests.host.server import without_front_end
from tests.host.workflows import txt2img

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(500)]


def test_each_computes_the_same_on_a_gpu_of_its_own(
    num_gpus: int, host_dir: Path, gpu_models: Path, tmp_path: Path
) -> None:
    no_front_end = without_front_end(tmp_path / "front_end")
    launched = Launched(host_dir, tmp_path / "launched", gpu_models, gpus="0,1", args=no_front_end)
    try:
        eventually(lambda: all(is_ready(host.port) for host in launched.hosts), launched)
        jobs = [host.submit(txt2img(7))["prompt_id"] for host in launched.hosts]  # Files say what made them.
        entries = [ended(launched, host, job_id) for host, job_id in zip(launched.hosts, jobs, strict=True)]
        assert [entry["status"]["status_str"] for entry in entries] == ["success"] * 2
        names = [entry["outputs"]["save"]["images"][0]["filename"] for entry in entries]
        first, second = ((launched.base_dir / "output" / name).read_bytes() for name in names)
        assert names[0] != names[1]
        assert first == second
        named = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in launched.pids()]
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").encode().split(b",")[:2]
        assert {words[words.index(b"--cuda-device") + 1] for words in named} == set(visible)
    finally:
        launched.process.terminate()
        assert launched.process.wait(60) == 0
    assert launched.pids() == []
