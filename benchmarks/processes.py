"""Slots in processes on CPUs against threads: Python-bound nodes, requests, events.

usage: python benchmarks/processes.py HOST [--jobs N] [--requests N]

What it says of processes is against threads in the same run. For memory see
process_memory.py, for what is lost when processes end process_kills.py.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import websocket

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import await_idle, held, quick
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node


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


KINDS = {"threads": "cpu,cpu", "processes": "cpu=process,cpu=process"}


def compare_requests(host: Path, count: int) -> None:
    """`POST /prompt` while the slots are busy, and how old an event is when its client has it; in turns."""
    rates: dict[str, list[float]] = {name: [] for name in KINDS}
    ages: dict[str, list[float]] = {name: [] for name in KINDS}
    with ExitStack() as started:
        servers = {}
        for name, slots in KINDS.items():
            home = Path(started.enter_context(tempfile.TemporaryDirectory()))
            servers[name] = started.enter_context(HostServer(host, home, slots=slots))
        for _ in range(5):
            for name, server in servers.items():
                ages[name] += event_ages(server)
                rates[name].append(posts_per_s(server, count // 5))
    posts = {name: statistics.median(found) for name, found in rates.items()}
    late = {name: statistics.median(found) * 1000 for name, found in ages.items()}
    print(f"POST /prompt a second: {posts}, {posts['processes'] / posts['threads']:.2f} of threads")
    print(f"event, ms: {late}, {late['processes'] - late['threads']:.2f} ms more than threads")


def posts_per_s(server: HostServer, count: int) -> float:
    with held(server, 0, 1):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        began = time.monotonic()
        for number in range(count):
            connection.request("POST", "/prompt", json.dumps({"prompt": quick(number)}))
            reply = connection.getresponse()
            body = reply.read()
            assert reply.status == 200, body
        rate = count / (time.monotonic() - began)
        server.request("POST", "/queue", {"clear": True})
    await_idle(server)
    return rate


def event_ages(server: HostServer) -> list[float]:
    """Seconds from what a node tells to its client's having it."""
    client = websocket.WebSocket()
    client.connect(f"ws://127.0.0.1:{server.port}/ws?clientId=ages")  # type: ignore[no-untyped-call]
    times = {"times": node("CPTTellTimes", times=100), "out": node("CPTOut", value=["times", 0])}
    server.submit(times, 1, "ages")
    found = []
    while len(found) < 100:
        told = client.recv()
        now = time.time()
        if isinstance(told, str) and (event := json.loads(told))["type"] == "time":
            found.append(now - event["data"]["at"])
    client.close()
    await_idle(server)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", type=Path)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    if given.jobs:
        compare(given.host, given.jobs)
    if given.requests:
        compare_requests(given.host, given.requests)


if __name__ == "__main__":
    main()
