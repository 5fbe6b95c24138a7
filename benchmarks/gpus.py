"""Checks and measures comfy_parallel on every visible GPU (two or more), against stock ComfyUI, in one call.

    python benchmarks/gpus.py COMFYUI_DIR

Runs the GPU tests (byte-identical images, memory on the own device only, …), which fail rather than skip, then
whole jobs over HTTP: one stock server on one GPU against one comfy_parallel server on all. Prints a table last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from tests.host.models import cached_models
from tests.host.server import HostServer, without_front_end
from tests.host.workflows import txt2img

JOBS_PER_SLOT = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    comfyui = parser.parse_args().comfyui.resolve()
    failed = run_tests(comfyui)
    measure(comfyui)
    return failed


def run_tests(comfyui: Path) -> int:
    env = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFY_PARALLEL_REQUIRE_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-s", "-p", "no:cacheprovider", "--tb=short"]
    return subprocess.run(command, cwd=REPO_DIR, env=env).returncode


def measure(comfyui: Path) -> None:
    import torch

    gpus = torch.cuda.device_count()
    cache = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
    models = cached_models(comfyui, cache)
    stock = images_per_second(comfyui, models, slots=None, jobs=JOBS_PER_SLOT)
    ours = images_per_second(comfyui, models, slots="", jobs=JOBS_PER_SLOT * gpus)
    print(f"\n{gpus} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}, small model, 512x512, 20 steps")
    print(f"{'':30}{'images/s':>10}{'ratio':>8}")
    print(f"{'stock, one GPU':30}{stock:10.2f}{1:8.2f}")
    print(f"{f'comfy_parallel, {gpus} slots':30}{ours:10.2f}{ours / stock:8.2f}")


def images_per_second(comfyui: Path, models: Path, *, slots: str | None, jobs: int) -> float:
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "models").symlink_to(models, target_is_directory=True)
        args = without_front_end(Path(base) / "front_end")
        env = {"OMP_NUM_THREADS": "4"}
        with HostServer(comfyui, Path(base), slots=slots, env=env, args=args, is_cpu=False) as server:
            warm = [server.submit(job(seed))["prompt_id"] for seed in range(4 if slots is None else 16)]
            server.wait(warm, 300)
            began = time.perf_counter()
            server.wait([server.submit(job(1000 + seed))["prompt_id"] for seed in range(jobs)], 500)
            return jobs / (time.perf_counter() - began)


def job(seed: int) -> dict[str, object]:
    return txt2img(seed, steps=20, width=512, height=512)


if __name__ == "__main__":
    sys.exit(main())
