"""Jobs of ten kinds on one GPU: two slots in threads, two in processes, and one of each that are chosen between.

usage: python benchmarks/auto_choice.py HOST [--device cuda:0] [--models-dir DIR] [--jobs 40] [--rounds 2]
           [--budget-s 170]

SD1.5 of full size with random weights, 512x512, 20 steps. Steps of eight of the kinds are recorded, those of two
(FreeU, PAG) run in Python. All servers start at once and take turns; each has run every kind on every slot before. It
prints jobs per hour of the mixed list and of the two sorts of kinds alone, where COMFY_PARALLEL_WORKERS=auto sent the
jobs, and whether the images are the same. `--device cpu --tiny` proves on a laptop that all of it works.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budget import Deadline
from full_size import start_making
from scaling import started

from tests.host import graph_cases as cases
from tests.host.jobs import await_idle, outcome
from tests.host.models import cached_models
from tests.host.server import HostServer, without_front_end
from tests.host.workflows import Workflow, node

RECORDED: dict[str, Callable[[int], Workflow]] = {
    "txt2img": cases.sd15,
    "img2img": lambda seed: cases.sd15(seed, kind="img2img"),
    "batch of 4": lambda seed: cases.sd15(seed, batch=4),
    "CFG 1": lambda seed: cases.sd15(seed, cfg=1.0),
    "area": cases.area,
    "mask": cases.mask,
    "inpainting": cases.inpainting,
    "hires fix": cases.hires_fix,
}
EAGER: dict[str, Callable[[int], Workflow]] = {
    "FreeU": lambda seed: cases.other_model(cases.sd15(seed), "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "PAG": lambda seed: cases.other_model(cases.sd15(seed), "PerturbedAttentionGuidance", scale=3.0),
}
SORTS = {"mixed": {**RECORDED, **EAGER}, "recorded": RECORDED, "in Python": EAGER}
SLOTS = {"threads": "{0}=thread,{0}=thread", "processes": "{0}=process,{0}=process", "auto": "{0}=thread,{0}=process"}


def grown(workflow: Workflow, ckpt: str, times: int, steps: int) -> Workflow:
    """A test's small job with another model and size, and with an image as its result."""
    for one in workflow.values():
        inputs = one["inputs"]
        inputs |= {name: inputs[name] * times for name in ("width", "height", "x", "y") if name in inputs}
        if "ckpt_name" in inputs:
            inputs["ckpt_name"] = ckpt
        if "steps" in inputs:
            inputs["steps"] = steps
    workflow["decode"] = node("VAEDecode", samples=workflow["save"]["inputs"]["samples"], vae=["ckpt", 2])
    workflow["save"] = node("SaveImage", images=["decode", 0], filename_prefix="kinds")
    return workflow


def burst(server: HostServer, jobs: list[Workflow], slot: int | None = None) -> tuple[float, list[Any]]:
    """Seconds for jobs that are in the queue at once, and their entries."""
    began = time.monotonic()
    ids = [server.submit(one, slot)["prompt_id"] for one in jobs]
    entries = server.wait(ids, 300)
    took_s = time.monotonic() - began
    assert {outcome(entry) for entry in entries.values()} == {"success"}, server.log()[-3000:]
    return took_s, [entries[one] for one in ids]


def digest(server: HostServer, entry: Any) -> str:
    told = entry["outputs"]["save"]["images"]
    files = [Path(server.base_dir) / "output" / one["subfolder"] / one["filename"] for one in told]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models-dir", type=Path, help="kept; the model is made where it is not there")
    parser.add_argument("--jobs", type=int, default=40, help="in each list")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=170)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    deadline = Deadline(given.budget_s - 10)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="auto_choice_")))
        models = given.models_dir or home / "models"
        if given.tiny:
            models = cached_models(given.host.resolve(), home)
        elif any(maker.wait() for maker in start_making(given.host.resolve(), models, ("sd15",))):
            raise SystemExit("the model could not be made")
        servers = make(given, home, models.resolve())
        stack.enter_context(started(list(servers.values())))
        measure(given, servers, deadline)


def make(given: argparse.Namespace, home: Path, models: Path) -> dict[str, HostServer]:
    args = without_front_end(home / "front_end")
    servers = {}
    for name, slots in SLOTS.items():
        (home / name).mkdir()
        (home / name / "models").symlink_to(models, target_is_directory=True)
        env = {"COMFY_PARALLEL_WORKERS": "auto"} if name == "auto" else {}
        options = {"slots": slots.format(given.device), "is_cpu": given.device == "cpu", "args": args, "env": env}
        servers[name] = HostServer(given.host, home / name, **options)
    return servers


def measure(given: argparse.Namespace, servers: dict[str, HostServer], deadline: Deadline) -> None:
    chance = random.Random(1)
    seeds = iter(range(1, 1_000_000))
    model = ("a.safetensors", 1, 4) if given.tiny else ("sd15.safetensors", 8, 20)

    def jobs(sort: str, count: int) -> list[int]:
        """Numbers of kinds, each of them as often."""
        kinds = [number % len(SORTS[sort]) for number in range(count)]
        chance.shuffle(kinds)
        return kinds

    def workflows(sort: str, kinds: list[int], first_seed: int) -> list[Workflow]:
        makers = list(SORTS[sort].values())
        return [grown(makers[kind](first_seed + number), *model) for number, kind in enumerate(kinds)]

    def warm(server: HostServer) -> None:
        """Every kind has run on every slot, twice: what is recorded is then there, and auto knows the kinds."""
        for round_number in range(2):
            every = workflows("mixed", list(range(len(SORTS["mixed"]))), round_number)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(burst, [server] * 2, [every] * 2, range(2)))
        await_idle(server)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(warm, servers.values()))
    before = servers["auto"].request("GET", "/queue/all")[1]["kinds"]
    rates: dict[tuple[str, str], list[float]] = {(sort, name): [] for sort in SORTS for name in servers}
    places: dict[str, list[int]] = {sort: [] for sort in SORTS}
    same = []
    for _ in range(given.rounds):
        for sort in SORTS:
            kinds, first_seed = jobs(sort, given.jobs), next(seeds) * 1000
            images = []
            for name, server in servers.items():
                if deadline.left_s < 0:
                    break
                took_s, entries = burst(server, workflows(sort, kinds, first_seed))
                rates[sort, name].append(given.jobs / took_s * 3600)
                images.append([digest(server, entry) for entry in entries])
                if name == "auto":
                    places[sort] += [entry["gpu_id"] for entry in entries]
            same += [one == images[0] for one in images[1:]]
    report(rates, places, same, before, servers["auto"].request("GET", "/queue/all")[1]["kinds"])


def report(rates: Any, places: Any, same: list[bool], before: Any, after: Any) -> None:
    print(f"{'jobs per hour':16}" + "".join(f"{name:>22}" for name in SLOTS))
    for sort in SORTS:
        medians = [statistics.median(rates[sort, name] or [float("nan")]) for name in SLOTS]
        print(f"{sort:16}" + "".join(f"{one:14.0f} ({one / medians[0]:4.2f})" for one in medians))
    for sort, slots in places.items():
        print(f"auto, {sort}: {slots.count(0)} jobs ran in the thread, {slots.count(1)} in the process")
    print(f"what auto chose before the lists: {before}, and after: {after}")
    print(f"images: {sum(same)} of {len(same)} lists are the same as with threads")


if __name__ == "__main__":
    main()
