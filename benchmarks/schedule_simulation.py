"""Simulate the scheduler: makespan, waits, shares and model loads, against simpler ways to choose, and its cost.

    python benchmarks/schedule_simulation.py [--jobs 2000] [--seed 1]

No ComfyUI and no GPU: the package's own `core.schedule` and `core.fairness` decide, time is a number. A job costs its
run time and, on a slot that does not hold its models, a load. Rows: synthetic traces (a burst, a day with clients of
unequal zeal, alternating models). The lower bound of the makespan is the larger of the work shared by all slots and the
longest job.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_parallel.core.fairness import FairShare
from comfy_parallel.core.schedule import UnderWay, first_start
from comfy_parallel.core.states import SlotState

LOAD_S = 4.0  # to have a model on a slot that held another


@dataclass(eq=False)
class Job:
    """A job as the schedule sees it, and how long it runs."""

    number: int
    came: float
    seconds: float
    client_id: str
    models: frozenset[str]
    place: float = 0.0
    prompt_id: int = 0
    target: int | None = None
    is_alone: bool = False
    turns: frozenset[str] = frozenset()
    most_at_once: int | None = None
    standing: int = 0
    passed: int = 0
    kind: str | None = None
    is_bound_to_kind: bool = False
    not_on: frozenset[int] = frozenset()
    started: float = 0.0
    ended: float = 0.0

    def __lt__(self, other: Job) -> bool:
        return (self.place, self.number) < (other.place, other.number)


@dataclass(eq=False)
class OneSlot:
    """A slot as the schedule sees it, with what it has done."""

    index: int
    state: SlotState = SlotState.IDLE
    last_client_id: Any = None
    is_alone: bool = False
    models: frozenset[str] = frozenset()
    kind: str = "thread"
    job: Job | None = None
    loads: int = 0
    queue: list[Job] = field(default_factory=list)


def trace(kind: str, count: int, slots: int, rng: random.Random) -> list[Job]:
    """Synthetic jobs: run times as of real workflows, between 2 s and 2 min, mostly short."""
    models = [frozenset({f"model-{n}.safetensors"}) for n in range(max(2, slots))]
    jobs = []
    came = 0.0
    for number in range(count):
        seconds = min(120.0, 2 + rng.expovariate(1 / 8))
        if kind == "day":
            came += rng.expovariate(slots / 12)
        client = f"client-{min(rng.randrange(20), rng.randrange(20))}" if kind != "zealot" else ""
        if kind == "zealot":  # One client sends nine jobs of ten.
            client = "zealot" if rng.random() < 0.9 else f"client-{rng.randrange(5)}"
        model = models[number % len(models)] if kind == "alternating" else models[rng.randrange(len(models))]
        jobs.append(Job(number, came, seconds, client, model, prompt_id=number))
    return jobs


class Ours:
    """The package's scheduler."""

    def __init__(self, slots: list[OneSlot], affinity: int = 8) -> None:
        self.slots, self.waiting, self.affinity = slots, list[Job](), affinity
        self.share = FairShare()
        self.decisions: list[float] = []

    def put(self, job: Job) -> None:
        job.place = self.share.place(job.client_id, job.number, is_idle=not self.waiting)
        heapq.heappush(self.waiting, job)

    def next_start(self) -> tuple[Job, OneSlot] | None:
        begun = time.perf_counter()
        running = [slot.job for slot in self.slots if slot.job is not None]
        under_way = UnderWay([job.prompt_id for job in running], [job.client_id for job in running])
        found = first_start(
            self.waiting, lambda job: job, self.slots, under_way, lambda job: False, None, self.affinity
        )
        self.decisions.append(time.perf_counter() - begun)
        if found is None:
            return None
        position, slot = found
        job = self.waiting[position]
        if position:
            self.waiting[0].passed += 1
        self.waiting[position] = self.waiting[-1]
        self.waiting.pop()
        heapq.heapify(self.waiting)
        self.share.started(job.place)
        return job, slot

    def ended(self, job: Job) -> None:
        self.share.ended(job.client_id, job.ended - job.started)


class Bound:
    """Every job is bound to a slot when it comes: in turn, or where the fewest wait."""

    def __init__(self, slots: list[OneSlot], by: str) -> None:
        self.slots, self.by, self.count = slots, by, 0

    def put(self, job: Job) -> None:
        if self.by == "round robin":
            slot = self.slots[self.count % len(self.slots)]
        else:
            slot = min(self.slots, key=lambda slot: len(slot.queue) + (slot.job is not None))
        self.count += 1
        slot.queue.append(job)

    def next_start(self) -> tuple[Job, OneSlot] | None:
        for slot in self.slots:
            if slot.state is SlotState.IDLE and slot.queue:
                return slot.queue.pop(0), slot
        return None

    def ended(self, job: Job) -> None:
        pass


def simulate(jobs: list[Job], slots: list[OneSlot], way: Any) -> dict[str, float]:
    """Run all jobs; what came of it."""
    events: list[tuple[float, int, Any]] = [(job.came, job.number, job) for job in jobs]
    heapq.heapify(events)
    sequence = len(jobs)
    while events:
        now, _, what = heapq.heappop(events)
        if isinstance(what, Job):
            way.put(what)
        else:
            done = what.job
            done.ended, what.job, what.state = now, None, SlotState.IDLE
            way.ended(done)
        while (found := way.next_start()) is not None:
            job, slot = found
            load = 0.0 if job.models <= slot.models else LOAD_S
            slot.loads += bool(load)
            slot.models, slot.last_client_id, slot.job, slot.state = job.models, job.client_id, job, SlotState.RUNNING
            job.started = now
            sequence += 1
            heapq.heappush(events, (now + load + job.seconds, sequence, slot))
    assert all(job.ended for job in jobs), "every job has run"
    work = sum(job.seconds for job in jobs)
    bound = max(work / len(slots), max(job.seconds for job in jobs), max(job.came for job in jobs))
    waits = [job.started - job.came for job in jobs]
    return {
        "makespan / bound": max(job.ended for job in jobs) / bound,
        "without loads": (max(job.ended for job in jobs)) / (bound + sum(s.loads for s in slots) * LOAD_S / len(slots)),
        "worst wait s": max(waits),
        "mean wait s": statistics.fmean(waits),
        "loads / job": sum(slot.loads for slot in slots) / len(jobs),
        "zealot's wait": _mean_wait(jobs, "zealot"),
        "others' wait": statistics.fmean([job.started - job.came for job in jobs if job.client_id != "zealot"]),
    }


def _mean_wait(jobs: list[Job], client: str) -> float:
    waits = [job.started - job.came for job in jobs if job.client_id == client]
    return statistics.fmean(waits) if waits else 0.0


def cost_of_decisions(waiting: int) -> dict[str, float]:
    """Milliseconds for one decision while so many jobs wait."""
    slots = [OneSlot(index) for index in range(8)]
    for slot in slots[1:]:
        slot.state = SlotState.RUNNING
    found = {}
    for name, target in (("the first can start", None), ("all are bound to a busy slot", 1)):
        jobs = [Job(n, 0, 1, "client", frozenset({f"{n % 7}.safetensors"}), n, n, target) for n in range(waiting)]
        times = []
        for _ in range(50):
            begun = time.perf_counter()
            first_start(jobs, lambda job: job, slots, UnderWay(["x"], ["y"]), lambda job: False, None, 8)
            times.append(time.perf_counter() - begun)
        found[name] = statistics.median(times) * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--slots", default="2,4,8,64,1024")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for kind in ("burst", "day", "zealot", "alternating"):
        for count in map(int, options.slots.split(",")):
            for name in ("ours", "ours, no affinity", "round robin", "least loaded"):
                slots = [OneSlot(index) for index in range(count)]
                jobs = trace(kind, max(options.jobs, 4 * count), count, random.Random(options.seed))
                if name.startswith("ours"):
                    way: Any = Ours(slots, 0 if "no" in name else 8)
                else:
                    way = Bound(slots, name)
                row = simulate(jobs, slots, way)
                print(f"{kind:12s} {count:5d} slots  {name:18s}", *(f"{k} {v:.3f}" for k, v in row.items()), sep="  ")
    for waiting in (1_000, 10_000):
        print(f"{waiting} jobs wait:", *(f"{k}: {v:.3f} ms" for k, v in cost_of_decisions(waiting).items()), sep="  ")


if __name__ == "__main__":
    main()
