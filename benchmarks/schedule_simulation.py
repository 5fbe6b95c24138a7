"""Simulate the scheduler: makespan, waits, shares and model loads, against simpler ways to choose, and its cost.

    python benchmarks/schedule_simulation.py [--slots 2,8,64,1024] [--jobs-per-slot 250] [--traces a.csv,b.csv]
    python benchmarks/schedule_simulation.py --record URL > trace.csv

No ComfyUI and no GPU: the package's own `core` decides, time is a number. A job costs its run time and, on a slot that
does not hold its models, a load. Rows: synthetic traces, and recorded ones. Of the synthetic ones, a burst, models in
turns and a zealous client have jobs of which nobody knows how long they run; workflows, a day and slots of unequal
speed have jobs of some kinds, each of which takes about as long each time, so that the scheduler learns it.

A recorded trace is a table of jobs: when each `came`, the `seconds` that it ran, its `client`, `models` and `kind`.
`--record` makes one of a running server's history, in which models are letters and all else is numbers. "Bound" is what
no schedule is below, even one that knew all jobs beforehand: `schedule_bound.py`.
"""

from __future__ import annotations

import argparse
import csv
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

from benchmarks.schedule_bound import Work, lower_bound
from comfy_parallel.config import Policy
from comfy_parallel.core.fairness import FairShare
from comfy_parallel.core.job_kind import kind_of
from comfy_parallel.core.pace import Paces
from comfy_parallel.core.schedule import UnderWay, first_start
from comfy_parallel.core.states import SlotState
from comfy_parallel.core.unequal import first_expected
from comfy_parallel.slots.items import model_names

MOST_MODELS = 128  # of a synthetic trace, else as many as slots
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


UNKNOWN, KNOWN = ("burst", "alternating", "zealot"), ("workflows", "day", "unequal")


def trace(kind: str, count: int, slots: int, rng: random.Random) -> list[Job]:
    """Synthetic jobs: run times as of real workflows, between 2 s and 2 min, mostly short."""
    models = [frozenset({f"model-{n}.safetensors"}) for n in range(min(max(2, slots), MOST_MODELS))]
    lengths = [2 * 1.4**n for n in range(10)] if kind == "unequal" else [_length(rng) for _ in range(20)]
    jobs = []
    came = 0.0
    for number in range(count):
        workload = rng.randrange(len(lengths)) if kind in KNOWN else None
        seconds = _length(rng) if workload is None else lengths[workload] * rng.lognormvariate(0, 0.05)
        came += rng.expovariate(slots / {"unequal": 60, "day": 12}[kind]) if kind in ("unequal", "day") else 0.0
        client = f"client-{min(rng.randrange(20), rng.randrange(20))}"
        if kind == "zealot":  # One client sends nine jobs of ten.
            client = "zealot" if rng.random() < 0.9 else f"client-{rng.randrange(5)}"
        model = models[number % len(models)] if kind == "alternating" else models[rng.randrange(len(models))]
        jobs.append(Job(number, came, seconds, client, model, prompt_id=number, workload=workload))
    return jobs


def _length(rng: random.Random) -> float:
    return min(120.0, 2 + rng.expovariate(1 / 8))


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
        if not self.waiting or all(slot.state is not SlotState.IDLE for slot in self.slots):
            return None
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


def simulate(jobs: list[Job], slots: list[OneSlot], way: Any, load_s: float = LOAD_S) -> dict[str, float]:
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
            load = load_s if job.has_loaded else 0.0
            slot.loads += bool(load)
            slot.models, slot.last_client_id, slot.job, slot.state = job.models, job.client_id, job, SlotState.RUNNING
            job.started = now
            sequence += 1
            heapq.heappush(events, (now + load + job.seconds * slot.slowness, sequence, slot))
    assert all(job.ended for job in jobs), "every job has run"
    ended = max(job.ended for job in jobs)
    work = [Work(job.came, job.seconds, job.models) for job in jobs]
    waits = [job.started - job.came for job in jobs]
    return {
        "makespan / bound": ended / lower_bound(work, [slot.slowness for slot in slots], load_s),
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
    found = {}
    cases = (("the first can start", 8, None), ("all are bound to a busy slot", 8, 1), ("of 1,024 slots", 1024, None))
    for name, count, target in cases:
        slots = [OneSlot(index) for index in range(count)]
        for slot in slots[1:]:
            slot.state = SlotState.RUNNING
        jobs = [Job(n, 0, 1, "client", frozenset({f"{n % 7}.safetensors"}), n, n, target) for n in range(waiting)]
        times = []
        for _ in range(50):
            begun = time.perf_counter()
            first_start(jobs, lambda job: job, slots, UnderWay(["x"], ["y"]), lambda job: False, None, 8)
            times.append(time.perf_counter() - begun)
        found[name] = statistics.median(times) * 1e3
    return found


def jobs_of(source: str, options: argparse.Namespace, slots: int) -> list[Job]:
    """A synthetic trace by its name, or a recorded one by its file."""
    if not source.endswith(".csv"):
        return trace(source, max(options.jobs, options.jobs_per_slot * slots), slots, random.Random(options.seed))
    with Path(source).open() as table:
        rows = sorted(csv.DictReader(table), key=lambda row: float(row["came"]))
    return [
        Job(
            number,
            float(row["came"]),
            float(row["seconds"]),
            row["client"],
            frozenset(row["models"].split("+")) - {""},
            prompt_id=number,
            workload=(row["models"], row["kind"]),
        )
        for number, row in enumerate(rows)
    ]


def record(url: str) -> None:
    """Print what a server's history tells of its jobs: when each came and how long it ran, without texts and names."""
    with urllib.request.urlopen(f"{url}/history", timeout=60) as reply:
        entries = json.load(reply)
    clients, kinds, models = Numbers(), Numbers(), Numbers()
    rows = []
    for entry in entries.values():
        told = dict(entry["status"]["messages"])
        if "execution_start" not in told or "execution_success" not in told:
            continue
        began, ended = (told[name]["timestamp"] / 1e3 for name in ("execution_start", "execution_success"))
        workflow, extra = entry["prompt"][2:4]
        names = "+".join(models.letter(name) for name in sorted(model_names(workflow)))
        kind = kinds.number(kind_of(workflow, model_names(workflow)))
        came = extra.get("create_time", began * 1e3) / 1e3
        rows.append((came, ended - began, clients.number(extra.get("client_id")), names, kind))
    first = min((row[0] for row in rows), default=0.0)
    print("came,seconds,client,models,kind")
    for came, seconds, client, names, kind in sorted(rows):
        print(f"{came - first:.2f},{seconds:.3f},{client},{names},{kind}")


class Numbers:
    """Names of things that are not to be told, in the order in which they are met."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def number(self, thing: Any) -> int:
        return self._known.setdefault(thing, len(self._known))

    def letter(self, thing: Any) -> str:
        """A to Z, then A1 and so on."""
        rest, place = divmod(self.number(thing), 26)
        return chr(ord("A") + place) + (str(rest) if rest else "")


WAYS = ("ours", "ours, no affinity", "round robin", "least loaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500, help="at least so many in a synthetic trace")
    parser.add_argument("--jobs-per-slot", type=int, default=250)
    parser.add_argument("--slots", default="2,8,64,1024")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(UNKNOWN + KNOWN))
    parser.add_argument("--traces", default="", help="recorded ones: files")
    parser.add_argument("--load-s", type=float, default=LOAD_S, help="what it takes to load a job's models")
    parser.add_argument("--ways", default=";".join(WAYS), help=f"some of: {'; '.join(WAYS)}")
    parser.add_argument("--record", metavar="URL", help="print a trace of a server's history")
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    sources = [source for source in (*options.kinds.split(","), *options.traces.split(",")) if source]
    for source in sources:
        for count in map(int, options.slots.split(",")):
            for name in options.ways.split(";"):
                show(source, count, name.strip(), options)
    for waiting in (1_000, 10_000):
        print(f"{waiting} jobs wait:", *(f"{k}: {v:.3f} ms" for k, v in cost_of_decisions(waiting).items()), sep="  ")


def show(source: str, count: int, name: str, options: argparse.Namespace) -> None:
    """Simulate one trace in one way, and print what came of it."""
    slots = [OneSlot(index) for index in range(count)]
    if source == "unequal":
        for slot in slots:
            slot.slowness = (1.0, 1.0, 2.0, 4.0)[slot.index * 4 // count]
    jobs = jobs_of(source, options, count)
    way: Any = Bound(slots, name)
    if name.startswith("ours"):
        way = Ours(slots, 0 if "no" in name else Policy().affinity)
    row = simulate(jobs, slots, way, options.load_s)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
    print(f"{Path(source).stem:12s} {count:5d} slots {len(jobs):7d} jobs  {name:18s}  {shown}", flush=True)


if __name__ == "__main__":
    main()
