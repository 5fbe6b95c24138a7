"""`comfy-parallel launch`: complete ComfyUIs beside each other, that come back and leave nobody."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.launched import Launched, ended, eventually, is_ready
from tests.host.server import HostServer
from tests.host.workflows import node

pytestmark = [pytest.mark.host, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def launched(host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(host_dir, tmp_path_factory.mktemp("launch"), models_dir)
    yield launched
    launched.process.kill()
    launched.process.wait()


def test_each_runs_jobs_of_its_own_and_none_overwrites_anothers_files(launched: Launched) -> None:
    eventually(lambda: all(is_ready(host.port) for host in launched.hosts), launched)
    # As a node that counts its files itself would be late in writing them, each job saves many.
    colours = range(6)
    jobs = []
    for colour in colours:
        host = launched.hosts[colour % 2]
        image = node("EmptyImage", width=8, height=8, batch_size=5, color=colour)
        save = node("SaveImage", images=["image", 0], filename_prefix="one/name")
        jobs.append((host, host.submit({"image": image, "save": save})["prompt_id"]))
    names = []
    for host, job_id in jobs:
        entry = ended(launched, host, job_id)
        assert entry["status"]["status_str"] == "success"
        names += [image["filename"] for image in entry["outputs"]["save"]["images"]]
    assert len(set(names)) == len(names) == 30
    assert {path.name for path in (launched.base_dir / "output" / "one").iterdir()} == set(names)


def test_the_named_weights_were_read_before_they_were_asked_for(launched: Launched) -> None:
    def is_mapped(host: HostServer) -> bool:
        return "checkpoints/a.safetensors" in str(host.request("GET", "/parallel/weights")[1])

    eventually(lambda: all(is_mapped(host) for host in launched.hosts), launched)


def test_one_that_is_killed_comes_back_and_the_other_goes_on(launched: Launched) -> None:
    before = launched.pids()
    assert len(before) == 2
    victim = next(pid for pid in before if str(launched.port).encode() in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: victim not in launched.pids() and is_ready(launched.port), launched)
    assert set(before) - {victim} < set(launched.pids())
    folder = launched.base_dir / "user" / "__comfy_parallel" / "launch"
    assert "was ended by SIGKILL" in (folder / "logs" / f"comfyui-{launched.port}.log").read_text()
    assert f"[{launched.port + 1} cpu] " in launched.log()


def test_the_end_leaves_nobody(launched: Launched) -> None:
    pids = launched.pids()
    assert len(pids) == 2
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait(60) == 0
    assert launched.pids() == []
