"""Simulate the scheduler: makespan, waits, shares and model loads, against simpler ways to choose, and its cost.

    python benchmarks/schedule_simulation.py [--jobs 2000] [--seed 1] [--traces a.jsonl,b.jsonl]
    python benchmarks/schedule_simulation.py --record URL > trace.jsonl

No ComfyUI and no GPU: the package's own `core` decides, time is a number. A job costs its run time and, on a slot that
does not hold its models, a load. Rows: synthetic traces (a burst, a day with clients of unequal zeal, alternating
models, slots of unequal speed), and recorded ones. A recorded trace is a file of JSON lines, one for each job: `came`
and `seconds`, `client`, `models`. `--record` makes one of the history of a running server.

Two bounds that no schedule is below: the larger of the work shared by all slots, the longest job and the last arrival;
and the same with the loads that cannot be avoided, one of each model.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_parallel.config import Policy
from comfy_parallel.core.fairness import FairShare
from comfy_parallel.core.pace import Paces
from comfy_parallel.core.schedule import UnderWay, first_start
from comfy_parallel.core.states import SlotState
from comfy_parallel.core.unequal import first_expected
from comfy_parallel.slots.items import model_names

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
    barred: frozenset[int] = frozenset()
    not_on: frozenset[int] = frozenset()
    started: float = 0.0
    ended: float = 0.0
    workload: Any = None
    has_loaded: bool = False

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
    slowness: float = 1.0  # how much longer its jobs take
    queue: list[Job] = field(default_factory=list)


def trace(kind: str, count: int, slots: int, rng: random.Random) -> list[Job]:
    """Synthetic jobs: run times as of real workflows, between 2 s and 2 min, mostly short."""
    models = [frozenset({f"model-{n}.safetensors"}) for n in range(max(2, slots))]
    jobs = []
    came = 0.0
    for number in range(count):
        seconds = min(120.0, 2 + rng.expovariate(1 / 8))
        kind_of_job = None
        if kind == "unequal":  # Its jobs are of ten kinds, and each takes about as long as the others of its kind.
            kind_of_job = rng.randrange(10)
            seconds = 2 * 1.4**kind_of_job * rng.lognormvariate(0, 0.05)
            came += rng.expovariate(slots / 60)
        if kind == "day":
            came += rng.expovariate(slots / 12)
        client = f"client-{min(rng.randrange(20), rng.randrange(20))}" if kind != "zealot" else ""
        if kind == "zealot":  # One client sends nine jobs of ten.
            client = "zealot" if rng.random() < 0.9 else f"client-{rng.randrange(5)}"
        model = models[number % len(models)] if kind == "alternating" else models[rng.randrange(len(models))]
        jobs.append(Job(number, came, seconds, client, model, prompt_id=number, workload=kind_of_job))
    return jobs


class Ours:
    """The package's scheduler."""

    def __init__(self, slots: list[OneSlot], affinity: int = 8) -> None:
        self.slots, self.waiting, self.affinity = slots, list[Job](), affinity
        self.share = FairShare()
        self.paces = Paces(len(slots))
        self.now = 0.0
        self.decisions: list[float] = []

    def put(self, job: Job) -> None:
        job.place = self.share.place(job.client_id, job.number, is_idle=not self.waiting)
        heapq.heappush(self.waiting, job)

    def next_start(self) -> tuple[Job, OneSlot] | None:
        begun = time.perf_counter()
        running = [slot.job for slot in self.slots if slot.job is not None]
        under_way = UnderWay([job.prompt_id for job in running], [job.client_id for job in running])
        found = self._found(under_way)
        self.decisions.append(time.perf_counter() - begun)
        if found is None:
            return None
        position, slot = found
        job = self.waiting[position]
        if position:
            self.waiting[0].passed += 1
        last = self.waiting.pop()
        if position < len(self.waiting):  # as the dispatcher does; `heapify` would look at all of them
            self.waiting[position] = last
            heapq._siftup(self.waiting, position)  # type: ignore[attr-defined]
            heapq._siftdown(self.waiting, 0, position)  # type: ignore[attr-defined]
        self.share.started(job.place)
        return job, slot

    def _found(self, under_way: UnderWay) -> tuple[int, OneSlot] | None:
        if not self.paces.are_unequal:
            return first_start(self.waiting, _itself, self.slots, under_way, _not_given, None, self.affinity)
        factors = self.paces.factors()
        free_in = [self._free_in(slot, factors[slot.index]) for slot in self.slots]
        return first_expected(self.waiting, _itself, self.slots, under_way, _not_given, self._seconds, factors, free_in)

    def _seconds(self, job: Job) -> float | None:
        return self.paces.seconds(job.workload)

    def _free_in(self, slot: OneSlot, factor: float) -> float | None:
        if slot.job is None:
            return 0.0
        seconds = self._seconds(slot.job)
        return None if seconds is None else max(0.0, seconds * factor - (self.now - slot.job.started))

    def ended(self, job: Job, slot: OneSlot) -> None:
        self.share.ended(job.client_id, job.ended - job.started)
        if job.workload is not None and not job.has_loaded:
            self.paces.note(slot.index, job.workload, job.ended - job.started)


def _itself(job: Job) -> Job:
    return job


def _not_given(job: Job) -> bool:
    return False


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

    def ended(self, job: Job, slot: OneSlot) -> None:
        pass


def simulate(jobs: list[Job], slots: list[OneSlot], way: Any) -> dict[str, float]:
    """Run all jobs; what came of it."""
    events: list[tuple[float, int, Any]] = [(job.came, job.number, job) for job in jobs]
    heapq.heapify(events)
    sequence = len(jobs)
    while events:
        now, _, what = heapq.heappop(events)
        way.now = now
        if isinstance(what, Job):
            way.put(what)
        else:
            done = what.job
            done.ended, what.job, what.state = now, None, SlotState.IDLE
            way.ended(done, what)
        while (found := way.next_start()) is not None:
            job, slot = found
            job.has_loaded = not job.models <= slot.models
            load = LOAD_S if job.has_loaded else 0.0
            slot.loads += bool(load)
            slot.models, slot.last_client_id, slot.job, slot.state = job.models, job.client_id, job, SlotState.RUNNING
            job.started = now
            sequence += 1
            heapq.heappush(events, (now + load + job.seconds * slot.slowness, sequence, slot))
    assert all(job.ended for job in jobs), "every job has run"
    work = sum(job.seconds for job in jobs)
    power, fastest = sum(1 / slot.slowness for slot in slots), min(slot.slowness for slot in slots)
    last = max(max(job.seconds for job in jobs) * fastest, max(job.came for job in jobs))
    bound = max(work / power, last)
    with_loads = max((work + len({job.models for job in jobs}) * LOAD_S) / power, last)
    waits = [job.started - job.came for job in jobs]
    return {
        "makespan / bound": max(job.ended for job in jobs) / bound,
        "/ bound with loads": max(job.ended for job in jobs) / with_loads,
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


def jobs_of(source: str, options: argparse.Namespace, count: int) -> list[Job]:
    """A synthetic trace by its name, or a recorded one by its file."""
    if not source.endswith(".jsonl"):
        return trace(source, max(options.jobs, 4 * count), count, random.Random(options.seed))
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    return [
        Job(
            number,
            row["came"],
            row["seconds"],
            row["client"],
            frozenset(row["models"]),
            prompt_id=number,
            workload=(tuple(row["models"]), round(row["seconds"])),
        )
        for number, row in enumerate(sorted(rows, key=lambda row: float(row["came"])))
    ]


def record(url: str) -> None:
    """Print what a server's history tells of its jobs: when each came and how long it ran, without texts and names."""
    with urllib.request.urlopen(f"{url}/history", timeout=60) as reply:
        entries = json.load(reply)
    clients: dict[Any, str] = {}
    rows = []
    for entry in entries.values():
        told = dict(entry["status"]["messages"])
        if "execution_start" not in told or "execution_success" not in told:
            continue
        began, ended = (told[name]["timestamp"] / 1e3 for name in ("execution_start", "execution_success"))
        extra = entry["prompt"][3]
        came = extra.get("create_time", began * 1e3) / 1e3
        client = clients.setdefault(extra.get("client_id"), f"client-{len(clients)}")
        rows.append((came, ended - began, client, sorted(model_names(entry["prompt"][2]))))
    first = min((row[0] for row in rows), default=0.0)
    for came, seconds, client, models in sorted(rows):
        print(json.dumps({"came": came - first, "seconds": round(seconds, 3), "client": client, "models": models}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--slots", default="2,4,8,64,1024")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="burst,day,zealot,alternating,unequal")
    parser.add_argument("--traces", default="", help="files of JSON lines")
    parser.add_argument("--record", metavar="URL", help="print a trace of a server's history")
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    sources = [kind for kind in options.kinds.split(",") if kind] + [file for file in options.traces.split(",") if file]
    for source in sources:
        for count in map(int, options.slots.split(",")):
            for name in ("ours", "ours, no affinity", "round robin", "least loaded"):
                slots = [OneSlot(index) for index in range(count)]
                if source == "unequal":
                    for slot in slots:
                        slot.slowness = (1.0, 1.0, 2.0, 4.0)[slot.index * 4 // count]
                jobs = jobs_of(source, options, count)
                if name.startswith("ours"):
                    way: Any = Ours(slots, 0 if "no" in name else Policy().affinity)
                else:
                    way = Bound(slots, name)
                row = simulate(jobs, slots, way)
                print(f"{source:12s} {count:5d} slots  {name:18s}", *(f"{k} {v:.3f}" for k, v in row.items()), sep="  ")
    for waiting in (1_000, 10_000):
        print(f"{waiting} jobs wait:", *(f"{k}: {v:.3f} ms" for k, v in cost_of_decisions(waiting).items()), sep="  ")


if __name__ == "__main__":
    main()
