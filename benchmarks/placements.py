"""Jobs with placed models on several slots at once, against stock ComfyUI's bytes.

    python benchmarks/placements.py COMFYUI_DIR [--slots cpu,cpu] [--jobs 100] [--seed 1]

Each job takes its model, with or without LoRAs or a hook, by a placement drawn at random; neighbours on the other slot
have another. Prints how many images are stock's, and the jobs whose images are not. Ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from tests.host.models import cached_models
from tests.host.server import HostServer, without_front_end
from tests.host.test_device_nodes import KINDS, PLACEMENTS, spread
from tests.host.test_weights import images_of
from tests.host.workflows import Workflow, txt2img

SEEDS = 5  # different jobs of each kind
TIMEOUT_S = 1800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--slots", default="cpu,cpu")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    comfyui = options.comfyui.resolve()
    models = cached_models(comfyui, Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache/comfy_parallel")))
    drawn = random.Random(options.seed)
    placements = [*PLACEMENTS, "cpu,33%;slot,67%", "slot,77mb;cpu,*"]
    chosen = [
        (drawn.choice(list(KINDS)), drawn.randrange(SEEDS), drawn.choice(placements)) for _ in range(options.jobs)
    ]
    needed = sorted({(kind, seed) for kind, seed, _ in chosen})
    with tempfile.TemporaryDirectory() as work_dir:
        expected = run(comfyui, models, Path(work_dir) / "stock", None, list(map(plain, needed)))
        stock = dict(zip(needed, expected, strict=True))
        jobs = [spread(plain((kind, seed)), placement) for kind, seed, placement in chosen]
        began = time.monotonic()
        found = run(comfyui, models, Path(work_dir) / "ours", options.slots, jobs)
        seconds = time.monotonic() - began
    wrong = [one for one, image in zip(chosen, found, strict=True) if image != stock[one[:2]]]
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} images are stock's bytes, in {seconds:.0f} s; placements:")
    for placement in placements:
        print(f"  {sum(one[2] == placement for one in chosen):4} jobs  {placement}")
    for one in wrong:
        print("differs:", *one)
    return int(bool(wrong))


def plain(which: tuple[str, int]) -> Workflow:
    kind, seed = which
    return KINDS[kind](txt2img(seed))


def run(comfyui: Path, models: Path, base: Path, slots: str | None, jobs: list[Workflow]) -> list[bytes]:
    """The image of each job, all of them submitted at once."""
    base.mkdir()
    (base / "models").symlink_to(models, target_is_directory=True)
    args = without_front_end(base.with_name(f"{base.name}_front_end"))
    is_cpu = slots is None or slots.startswith("cpu")
    with HostServer(comfyui, base, slots=slots, args=args, is_cpu=is_cpu) as server:
        ids = [server.submit(job)["prompt_id"] for job in jobs]
        entries = server.wait(ids, TIMEOUT_S)
        return images_of(server, [entries[job_id] for job_id in ids])


if __name__ == "__main__":
    sys.exit(main())
