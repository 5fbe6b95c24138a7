"""Ends slots' processes while jobs run, in four ways in turns, and counts what was lost or came twice.

usage: python benchmarks/process_kills.py HOST [--kills 200] [--at-once 1] [--budget-s 3600]

Each trial is a ComfyUI on the CPU with two slots in processes, with folders and a port of its own; it needs about two
cores, three GiB of memory, and no network. A job may begin as often as it has to (COMFY_PARALLEL_ATTEMPTS=99). When the
time is up no more processes are ended, and the totals are told all the same. The status is 1 when a job was lost, came
twice, failed or did not end, or when a trial failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.kills import EXITS, READY_S, WAYS, Kills
from tests.host.server import HostServer, without_front_end

SLOTS = "cpu=process,cpu=process"
SETTLES_S = 60.0  # of the budget, for what waits when the last process has been ended
TELLS_S = 20.0
LONGEST_LIFE_S = 2.0  # of a process once it runs jobs
BAD = ("of these lost", "doubled", "not ended in time")


@dataclass
class Plan:
    """What all trials do together."""

    host: Path
    kills: int
    silent_s: float
    seed: int
    deadline: float
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.deadline - time.monotonic()

    def next_way(self) -> str | None:
        """How the next process is to end; None when enough have, or the time is up."""
        number = next(self._numbers)
        is_time = self.left_s > SETTLES_S
        return list(WAYS)[number % len(WAYS)] if number < self.kills and is_time else None


@dataclass
class Total:
    """What all trials have found."""

    ways: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kills: Kills) -> None:
        with self._lock:
            self._add(kills)

    def _add(self, kills: Kills) -> None:
        self.ways += kills.ways
        self.ends += kills.ends
        self.found["jobs accepted"] += len(kills.jobs)
        self.found["of these lost"] += len(kills.lost)
        self.found["doubled"] += len(kills.doubled)
        self.found["not ended in time"] += len(kills.unfinished)
        self.found["times a job began again, as its process had ended"] += kills.again
        self.problems += [f"a job failed: {text}" for text in kills.failed]

    @property
    def is_good(self) -> bool:
        return not self.problems and not any(self.found[name] for name in BAD)

    def tell(self) -> None:
        print(f"{self.ways.total():6d} processes ended: {dict(self.ways)}")
        for name, count in self.found.items():
            print(f"{count:6d} {name}")
        print(f"       what the fronts say of ends: {dict(self.ends)}")
        for problem in self.problems:
            print(f"PROBLEM {problem}")


def trial(plan: Plan, number: int, total: Total) -> None:
    """End processes of one ComfyUI until enough have ended in all trials; whatever happens, add what was found."""
    env = {"COMFY_PARALLEL_WORKER_SILENT_S": f"{plan.silent_s:g}", EXITS: "1", "COMFY_PARALLEL_ATTEMPTS": "99"}
    with tempfile.TemporaryDirectory(prefix="process_kills_") as home:
        args = without_front_end(Path(home) / "front_end")
        with HostServer(plan.host, Path(home), slots=SLOTS, env=env, args=args) as server:
            kills = Kills(server, seed=plan.seed + number)
            try:
                end_processes(plan, kills)
            finally:
                kills.settle(plan.left_s)
                total.add(kills)


def end_processes(plan: Plan, kills: Kills) -> None:
    while (way := plan.next_way()) is not None:
        try:
            kills.kill_one(way, min(READY_S, plan.left_s - SETTLES_S), LONGEST_LIFE_S)
        except TimeoutError:
            if plan.left_s > SETTLES_S:
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, metavar="TRIALS")
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument("--silent-s", type=float, default=10.0, help="a process silent for so long is ended (10)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    plan, total = Plan(given.host, given.kills, given.silent_s, given.seed, began + given.budget_s), Total()
    trials = [threading.Thread(target=told, args=(plan, number, total), daemon=True) for number in range(given.at_once)]
    for one in trials:
        one.start()
    for one in trials:
        one.join(max(0.0, plan.left_s + TELLS_S))
    if any(one.is_alive() for one in trials):
        total.problems.append("a trial did not end in time, and is not counted")
    total.tell()
    print(f"{time.monotonic() - began:.0f} s, {given.at_once} trials at once", flush=True)
    sys.exit(0 if total.is_good else 1)


def told(plan: Plan, number: int, total: Total) -> None:
    """A trial whose failure is one of the things found."""
    try:
        trial(plan, number, total)
    except Exception as error:  # noqa: BLE001 - the other trials go on, and the totals are told
        traceback.print_exc()
        total.problems.append(f"trial {number}: {type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
