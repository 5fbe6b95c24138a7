"""Slots in processes on CPUs: Python-bound nodes on threads and on processes, and what kills of processes cost.

usage: python benchmarks/processes.py HOST [--kills N] [--jobs N]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import await_idle
from tests.host.kills import Kills
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

HANGS = 20  # one kill of so many stops the process instead of ending it
SILENT = {"COMFY_PARALLEL_WORKER_SILENT_S": "15"}


def spin(seed: int) -> Workflow:
    """Holds the interpreter."""
    return {"spin": node("CPTSpin", rounds=4_000_000, seed=seed), "out": node("CPTOut", value=["spin", 0])}


def jobs_per_s(server: HostServer, jobs: int) -> float:
    """Of Python-bound jobs that are in the queue at once; the median of three rounds."""
    rates = []
    for round_number in range(3):
        began = time.monotonic()
        server.wait([server.submit(spin(round_number * jobs + number))["prompt_id"] for number in range(jobs)])
        rates.append(jobs / (time.monotonic() - began))
        await_idle(server)
    return statistics.median(rates)


def compare(host: Path, jobs: int) -> None:
    rates = {}
    for slots in ("cpu", "cpu,cpu", "cpu=process,cpu=process"):
        with tempfile.TemporaryDirectory() as home, HostServer(host, Path(home), slots=slots) as server:
            server.wait([server.submit(spin(-1), slot)["prompt_id"] for slot in range(slots.count("cpu"))])
            rates[slots] = jobs_per_s(server, jobs)
            print(f"{slots}: {rates[slots]:.2f} jobs/s, {rates[slots] / rates['cpu']:.2f} times one slot", flush=True)


def kill(host: Path, count: int) -> None:
    slots = "cpu=process,cpu=process"
    with tempfile.TemporaryDirectory() as home, HostServer(host, Path(home), slots=slots, env=SILENT) as server:
        began = time.monotonic()
        with Kills(server, seed=1) as kills:
            for number in range(count):
                kills.kill_one(signal.SIGSTOP if number % HANGS == HANGS - 1 else None)
        told = (
            f"{len(kills.lost)} lost, {len(kills.doubled)} doubled, {len(kills.failed)} failed for losing two processes"
        )
        print(f"{kills.kills} kills in {time.monotonic() - began:.0f} s, {len(kills.jobs)} jobs: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=20)
    given = parser.parse_args()
    if given.jobs:
        compare(given.host, given.jobs)
    if given.kills:
        kill(given.host, given.kills)


if __name__ == "__main__":
    main()
