"""`comfy-parallel launch --gpus 0,1`: each ComfyUI computes on its own GPU what the other computes too."""

from __future__ import annotations

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
        jobs = [
            host.submit(txt2img(7, prefix=f"gpu {number}"))["prompt_id"] for number, host in enumerate(launched.hosts)
        ]
        for host, job_id in zip(launched.hosts, jobs, strict=True):
            assert ended(launched, host, job_id)["status"]["status_str"] == "success"
        first, second = (sorted((launched.base_dir / "output").glob(f"gpu {number}*")) for number in range(2))
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []
        named = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in launched.pids()]
        assert {words[words.index(b"--cuda-device") + 1] for words in named} == {b"0", b"1"}
    finally:
        launched.process.terminate()
        assert launched.process.wait(60) == 0
    assert launched.pids() == []
