"""Jobs that are shared out, on CPU slots: what a share costs besides its work, and what kills of participants cost.

    python benchmarks/fan_out.py COMFYUI_DIR [--kills 100] [--rounds 20] [--slots cpu,cpu=process,cpu=process]
    python benchmarks/fan_out.py COMFYUI_DIR --rounds 0 --kills 100 --at-once 6 --budget-s 500
        [--kind process|remote|ray]

Overhead: 8 images that cost nothing, over 1, 2 and 4 slots, against one job that makes them by itself. Speed: 8 images
of a small model with random weights over 1, 2 and 4 slots (`--devices cuda:0,cuda:1` for GPUs). Kills: what runs
a slot's jobs (a process, a ComfyUI elsewhere, one of a Ray cluster) is killed at a random moment while it computes a
share; each job must give the full set, in order. `--at-once` servers
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import new_key, outcome, slots_shown
from tests.host.models import cached_models
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

IMAGES = 8
End = Callable[[JSON], object]  # ends what runs the jobs of a slot, of which `GET /queue/all` tells this


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

    def run(self, host: Path, kind: str, slots: str, seed: int) -> None:
        """Kill at one server until there is nothing left to do."""
        chance = random.Random(seed)
        with ExitStack() as started:
            server, end = KINDS[kind](started, host, slots)
            while (number := self._next()) is not None:
                self._note(kill_once(server, end, chance, 10 * number))

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
            f"{found['kills']} kills ({found['during a share']} while the slot computed a share, {found['of the job']}"
            f" of the job's own slot) in {time.monotonic() - self._began:.0f} s: {found['failed']} jobs failed,"
            f" {found['incomplete']} without the full set in order"
        )


def kill(host: Path, given: argparse.Namespace) -> bool:
    """Whether every job gave all it should. Each server's chances follow from `seed` and its number."""
    kills = Kills(given.kills, given.budget_s)
    work = [(host, given.kind, given.slots, given.seed + number) for number in range(given.at_once)]
    with ThreadPoolExecutor(given.at_once) as threads:
        running = [threads.submit(kills.run, *one) for one in work[1:]]
        kills.run(*work[0])  # A cluster can be started by the main thread only.
    print(f"in all, kind {given.kind}: {kills.told}", flush=True)
    for one in running:
        one.result()  # Raises what kept a server from going on.
    return not kills.figures["failed"] and not kills.figures["incomplete"]


def start(started: ExitStack, host: Path, slots: str, **env: str) -> HostServer:
    home = Path(started.enter_context(tempfile.TemporaryDirectory()))
    return started.enter_context(HostServer(host, home, slots=slots, env={"COMFY_PARALLEL_BREAKER": "off", **env}))


def of_processes(started: ExitStack, host: Path, slots: str) -> tuple[HostServer, End]:
    """Slots in processes, which are killed."""
    return start(started, host, slots), lambda slot: os.kill(slot["worker"]["pid"], signal.SIGKILL)


def of_remotes(started: ExitStack, host: Path, slots: str) -> tuple[HostServer, End]:
    """Slots of two other ComfyUIs, which are killed and started again."""
    others = [start(started, host, "cpu") for _ in range(2)]
    threads = started.enter_context(ThreadPoolExecutor())
    starting: dict[str, Future[None]] = {}

    def end(slot: JSON) -> None:
        other = next(one for one in others if one.url == slot["worker"]["address"])
        if other.url in starting:
            starting[other.url].result()  # The front may know of its return before it is checked here.
        other.stop(signal_number=signal.SIGKILL)
        starting[other.url] = threads.submit(other.start)

    return start(started, host, "cpu", COMFY_PARALLEL_REMOTE=",".join(other.url for other in others)), end


def of_ray(started: ExitStack, host: Path, slots: str) -> tuple[HostServer, End]:
    """Slots of two machines of a Ray cluster, whose ComfyUIs are killed; Ray starts them again."""
    import psutil
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 0, "num_gpus": 0, "resources": {"comfy_slot": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=machine)
    cluster.add_node(**machine)

    def end(slot: JSON) -> None:
        port = slot["worker"]["address"].rpartition(":")[2]
        for process in psutil.process_iter(["cmdline"]):
            if "main.py" in (line := process.info["cmdline"] or []) and "--listen" in line and port in line:
                process.kill()
                return
        raise SystemExit(f"no ComfyUI listens on port {port}")

    return start(started, host, "cpu", COMFY_PARALLEL_RAY=cluster.address), end


KINDS = {"process": of_processes, "remote": of_remotes, "ray": of_ray}


def kill_once(server: HostServer, end: End, chance: random.Random, first: int) -> Counter[str]:
    """A job of 6 shares, of any slot, and the end of one that computes a part of it."""
    ready = await_ready(server)
    workflow = {
        "seed": node("DistributedSeed", seed=first),
        "work": node("CPTSlow", value=["seed", 0], seconds=0.5, salt=new_key()),
        "all": node("ParallelCollector", value=["work", 0], participants=6),
        "out": node("CPTOut", value=["all", 0]),
    }
    own, victim = chance.choice([0, *ready]), chance.choice(list(ready))
    job_id = server.submit(workflow, own)["prompt_id"]
    is_busy = await_busy(server, victim)
    time.sleep(chance.uniform(0.0, 0.4))
    end(ready[victim])
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


def await_ready(server: HostServer) -> dict[int, JSON]:
    """The slots that can be killed, once there is one; all of a server that has begun."""
    while True:
        queues = slots_shown(server)
        ready = {one["gpu_id"]: one for one in queues if one["worker"] and one["worker"]["state"] == "ready"}
        if ready:
            return ready
        time.sleep(0.1)


def await_busy(server: HostServer, slot: int) -> bool:
    """Whether the slot begins something within 2 s."""
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        if slots_shown(server)[slot]["running_count"]:
            return True
        time.sleep(0.02)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kind", choices=sorted(KINDS), default="process", help="of the slots that are killed")
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
        is_whole = kill(given.comfyui, given)
        sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
