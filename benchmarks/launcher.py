"""What two ComfyUIs of `comfy-parallel launch` cost in RAM beside two plain ones, with one model on the CPU.

usage: python benchmarks/launcher.py HOST [--model wide.safetensors]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.launched import Launched, ended, eventually, is_ready
from tests.host.models import cached_models
from tests.host.server import HostServer
from tests.host.workflows import txt2img

CACHE = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
MIB = 1 << 20


def pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def plain(host: Path, home: Path, models: Path, model: str) -> list[int]:
    """The proportional set sizes of two ComfyUIs that know nothing of each other, after an image each."""
    servers = []
    for name in ("one", "two"):
        (home / name).mkdir()
        (home / name / "models").symlink_to(models, target_is_directory=True)
        servers.append(HostServer(host, home / name, slots=None, link=False))
    with servers[0], servers[1]:
        for number, server in enumerate(servers):
            server.run(txt2img(number, ckpt=model))
        return [server.pss_bytes for server in servers]


def launched(host: Path, home: Path, models: Path, model: str) -> tuple[list[int], int]:
    """The same of two that are launched, and the launcher's own."""
    began = Launched(host, home, models, model)
    try:
        eventually(lambda: all(is_ready(server.port) for server in began.hosts), began)
        for number, server in enumerate(began.hosts):
            job_id = server.submit(txt2img(number, ckpt=model))["prompt_id"]
            ended(began, server, job_id)
        return [pss(pid) for pid in began.pids()], pss(began.process.pid)
    finally:
        began.process.terminate()
        began.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", type=Path)
    parser.add_argument("--model", default="wide.safetensors")
    given = parser.parse_args()
    models = cached_models(given.host, CACHE)
    size = (models / "checkpoints" / given.model).stat().st_size
    print(f"{given.model}: {size / MIB:.0f} MiB")
    with tempfile.TemporaryDirectory() as home:
        two_plain = plain(given.host, Path(home), models, given.model)
        two_launched, launcher = launched(given.host, Path(home, "launched"), models, given.model)
    for what, found in (("plain", two_plain), ("launched", two_launched)):
        print(f"two {what}: {' + '.join(f'{one / MIB:.0f}' for one in found)} = {sum(found) / MIB:.0f} MiB PSS")
    print(f"the launcher itself: {launcher / MIB:.0f} MiB PSS")
    print(f"launched / plain: {(sum(two_launched) + launcher) / sum(two_plain):.2f}")


if __name__ == "__main__":
    main()
