"""Jobs that are shared out, on CPU slots: what a share costs besides its work, and what kills of participants cost.

    python benchmarks/fan_out.py COMFYUI_DIR [--kills 100] [--rounds 20] [--slots cpu,cpu=process,cpu=process]
    python benchmarks/fan_out.py COMFYUI_DIR --rounds 0 --kills 100 --at-once 6 --budget-s 500

Overhead: 8 images that cost nothing, over 1, 2 and 4 slots, against one job that makes them by itself. Speed: 8 images
of a small model with random weights over 1, 2 and 4 slots (`--devices cuda:0,cuda:1` for GPUs). Kills: a process slot
is killed at a random moment while it computes a share; each job must give the full set, in order. `--at-once` servers
have their processes killed beside each other; when `--budget-s` is over, no other kill begins, and the totals are told.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import new_key, outcome
from tests.host.models import cached_models
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

IMAGES = 8


def cheap(count: int) -> Workflow:
    """So many images, each by a share that does nothing else."""
    return {
        "seed": node("DistributedSeed", seed=1),
        "share": node("CPTShare", key=new_key(), how="plain", seed=["seed", 0], bad=-1, parties=1),
        "all": node("ParallelCollector", value=["share", 0], participants=count),
        "out": node("CPTOut", value=["all", 0]),
    }


def sampled(seed: int) -> Workflow:
    """8 images of a small model, each by a share."""
    workflow = txt2img(seed, steps=8, width=128, height=128)
    workflow["seed"] = node("DistributedSeed", seed=seed)
    workflow["sampler"]["inputs"]["seed"] = ["seed", 0]
    workflow["all"] = node("DistributedCollector", images=["decode", 0], participants=IMAGES)
    workflow["save"]["inputs"]["images"] = ["all", 0]
    return workflow


def run(server: HostServer, workflow: Workflow) -> JSON:
    job_id = server.submit(workflow, 0)["prompt_id"]
    entry: JSON = server.wait([job_id], 600)[job_id]
    if outcome(entry) != "success":
        raise SystemExit(f"the job ended as {entry['status']}")
    return entry


def seconds(entry: JSON) -> float:
    """How long a job ran, by its own events."""
    told = dict(entry["status"]["messages"])
    return float(told["execution_success"]["timestamp"] - told["execution_start"]["timestamp"]) / 1000


def median(server: HostServer, make: Any, rounds: int) -> float:
    return statistics.median(seconds(run(server, make(number))) for number in range(rounds))


def measure(host: Path, devices: list[str], rounds: int) -> None:
    for count in (one for one in (1, 2, 4) if one <= len(devices)):
        with tempfile.TemporaryDirectory() as home:
            models = cached_models(host, Path.home() / ".cache" / "comfy_parallel")
            (Path(home) / "models").symlink_to(models, target_is_directory=True)
            is_cpu = devices[0] == "cpu"
            with HostServer(host, Path(home), slots=",".join(devices[:count]), is_cpu=is_cpu) as server:
                single = median(server, lambda number: cheap(1), rounds)
                shared = median(server, lambda number: cheap(IMAGES), rounds)
                first = max(rounds // 4, 3)
                run(server, sampled(0))
                work = median(server, lambda number: sampled(1000 * number + 1), first)
                each = (shared - single) / (IMAGES - 1) * 1000
                print(f"{count} slots: {each:.1f} ms for each further share, 8 images in {work:.2f} s", flush=True)


class Kills:
    """Kills at several servers at once. `count` in all; none begins when `budget_s` are over."""

    def __init__(self, count: int, budget_s: float) -> None:
        self._left, self._began = count, time.monotonic()
        self._ends = self._began + budget_s
        self._lock = threading.Lock()
        self.figures = Counter[str]()

    def run(self, host: Path, slots: str, seed: int) -> None:
        """Kill at one server until there is nothing left to do."""
        chance = random.Random(seed)
        env = {"COMFY_PARALLEL_BREAKER": "off"}
        with tempfile.TemporaryDirectory() as home, HostServer(host, Path(home), slots=slots, env=env) as server:
            while (number := self._next()) is not None:
                self._note(kill_once(server, chance, 10 * number))

    def _next(self) -> int | None:
        with self._lock:
            if self._left == 0 or time.monotonic() > self._ends:
                return None
            self._left -= 1
            return self._left + 1

    def _note(self, figures: Counter[str]) -> None:
        with self._lock:
            self.figures += figures
            if self.figures["kills"] % 10 == 0:
                print(self.told, flush=True)

    @property
    def told(self) -> str:
        found = self.figures
        return (
            f"{found['kills']} kills ({found['during a share']} while the slot ran one, {found['of the job']} of a"
            f" job's own process) in {time.monotonic() - self._began:.0f} s: {found['failed']} jobs failed,"
            f" {found['incomplete']} without the full set in order"
        )


def kill(host: Path, slots: str, count: int, seed: int, at_once: int, budget_s: float) -> bool:
    """Whether every job gave all it should. Each server's chances follow from `seed` and its number."""
    kills = Kills(count, budget_s)
    with ThreadPoolExecutor(at_once) as threads:
        running = [threads.submit(kills.run, host, slots, seed + number) for number in range(at_once)]
    print(f"in all: {kills.told}", flush=True)
    for one in running:
        one.result()  # Raises what kept a server from going on.
    return not kills.figures["failed"] and not kills.figures["incomplete"]


def kill_once(server: HostServer, chance: random.Random, first: int) -> Counter[str]:
    """A job of 6 shares, of a thread or of a process, and the kill of a process meanwhile."""
    pids = ready(server)
    workflow = {
        "seed": node("DistributedSeed", seed=first),
        "work": node("CPTSlow", value=["seed", 0], seconds=0.5, salt=new_key()),
        "all": node("ParallelCollector", value=["work", 0], participants=6),
        "out": node("CPTOut", value=["all", 0]),
    }
    own, victim = chance.choice([0, *pids]), chance.choice(list(pids))
    job_id = server.submit(workflow, own)["prompt_id"]
    time.sleep(chance.uniform(0.1, 1.0))
    is_busy = server.request("GET", "/queue/all")[1]["queues"][victim]["running_count"] > 0
    os.kill(pids[victim], signal.SIGKILL)
    entry = server.wait([job_id], 600)[job_id]
    shown = [text.partition("@")[0] for text in entry["outputs"].get("out", {}).get("value", [])]
    return Counter(
        {
            "kills": 1,
            "of the job": own == victim,
            "during a share": own != victim and is_busy,
            "failed": outcome(entry) != "success",
            "incomplete": shown != [str(one) for one in range(first, first + 6)],
        }
    )


def ready(server: HostServer) -> dict[int, int]:
    """The process of each slot that has one, once all are ready."""
    while True:
        queues = server.request("GET", "/queue/all")[1]["queues"]
        workers = {one["gpu_id"]: one["worker"] for one in queues if one["worker"]}
        if all(one["state"] == "ready" and one["pid"] for one in workers.values()):
            return {slot: one["pid"] for slot, one in workers.items()}
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="servers that are killed at beside each other")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no kill begins after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slots", default="cpu,cpu=process,cpu=process")
    parser.add_argument("--devices", default="cpu,cpu,cpu,cpu")
    given = parser.parse_args()
    if given.rounds:
        measure(given.comfyui, given.devices.split(","), given.rounds)
    if given.kills:
        is_whole = kill(given.comfyui, given.slots, given.kills, given.seed, given.at_once, given.budget_s)
        sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
