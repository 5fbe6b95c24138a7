"""Stock ComfyUI against comfy_parallel over HTTP, in one run on one machine, on the CPU.

    python benchmarks/requests_per_second.py COMFYUI_DIR [--rounds 3] [--jobs 10000] [--only-runs]

Measures jobs per second from submitting to history (jobs that compute nothing, and those on one slot alone), the
time from submitting a job to its start on an idle server, requests per second and latency of `POST /prompt` (workers
busy), and `GET /queue`, `GET /queue/all` and deleting jobs with many waiting ones. Stock and ours run
side by side and take turns; the figures are medians over the rounds (restarts), the ratios ours / stock.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.server import HostServer, WebSocketClient
from tests.host.workflows import Workflow, txt2img

CLIENTS = 4
STARTS = 600
READS = 10
DELETIONS = 5
DELETED = 300
RUNS = 200
TURNS = 20
POLL_S = 0.005
SLOTS = {"stock": None, "ours": "cpu,cpu"}


def main() -> None:
    options = parse()
    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(options.rounds):
        print(f"round {round_number + 1}", flush=True)
        with ExitStack() as stack:
            servers = {}
            for name, slots in SLOTS.items():
                base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                server = HostServer(options.comfyui, base, slots=slots)
                (base / "models" / "checkpoints").mkdir()
                (base / "models" / "checkpoints" / "a.safetensors").touch()  # only its name is looked at
                servers[name] = stack.enter_context(server)
            for (figure, name), value in measure(servers, options.jobs, only_runs=options.only_runs).items():
                samples.setdefault((figure, name), []).append(value)
    report(samples)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=10000)
    parser.add_argument("--only-runs", action="store_true", help="leave out what is measured with busy workers")
    return parser.parse_args()


def measure(servers: dict[str, HostServer], jobs: int, *, only_runs: bool) -> dict[tuple[str, str], float]:
    """All figures of one start of both servers. They take turns, so that a machine's changing speed hits both."""
    figures: dict[tuple[str, str], float] = {}
    starts: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(TURNS):
        for name, server in servers.items():
            starts[name] += submit_to_start(server)
    for name in servers:
        figures["submit to start, ms", name] = statistics.median(starts[name]) * 1000
    figures |= run_jobs(servers)
    if only_runs:
        return figures
    for server in servers.values():
        make_busy(server)
    figures |= submit(servers, jobs, "smallest job", job("CPTConstInt", value=1))
    figures |= submit(servers, jobs, "txt2img", txt2img(1))
    for server in servers.values():
        fill(server, txt2img(1), jobs, [])
    figures |= read_queues(servers)
    figures |= delete(servers)
    return figures


def run_jobs(servers: dict[str, HostServer]) -> dict[tuple[str, str], float]:
    """Jobs that compute nothing, from submitting them to their end."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    used: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(TURNS + 1):
        for name, server in servers.items():
            cpu = cpu_seconds(server.pid)
            took = run_to_end(server, RUNS)
            if turn:  # The first is a warm-up.
                seconds[name].append(took)
                used[name].append(cpu_seconds(server.pid) - cpu)
    figures = {("no-op jobs, submit to history: jobs/s", name): RUNS * TURNS / sum(seconds[name]) for name in servers}
    for name in servers:
        figures["no-op jobs: median of ratios of turns", name] = statistics.median(
            one / other for one, other in zip(seconds["stock"], seconds[name], strict=True)
        )
        figures["no-op jobs: CPU ms per job", name] = sum(used[name]) / RUNS / TURNS * 1000
    return figures


def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_to_end(server: HostServer, jobs: int) -> float:
    """Submit jobs from several connections and wait for the last one's end; the whole's seconds."""
    began = time.perf_counter()
    fill(server, None, jobs, [])
    while server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]:
        time.sleep(POLL_S)
    return time.perf_counter() - began


def submit(servers: dict[str, HostServer], jobs: int, what: str, workflow: Workflow) -> dict[tuple[str, str], float]:
    """Submit one workflow many times. Each turn ends with empty queues: the garbage collector's longest pauses, which
    come as the heap grows, would fall on either by chance."""
    figures: dict[tuple[str, str], float] = {}
    seconds = dict.fromkeys(servers, 0.0)
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(TURNS):
        for name, server in servers.items():
            seconds[name] += fill(server, workflow, jobs // TURNS, latencies[name])
            server.request("POST", "/queue", {"clear": True})
    for name in servers:
        figures[f"POST /prompt, {what}: requests/s", name] = jobs / seconds[name]
        figures[f"POST /prompt, {what}: p50, ms", name] = statistics.median(latencies[name]) * 1000
        figures[f"POST /prompt, {what}: p99, ms", name] = statistics.quantiles(latencies[name], n=100)[98] * 1000
    return figures


def make_busy(server: HostServer) -> None:
    """Give each slot a job that waits without using the CPU."""
    for slot in range(1 if server.slots is None else len(server.slots.split(","))):
        busy = job("CPTRendezvous", key=f"slot {slot}", parties=2, timeout=600.0)
        server.submit(busy, slot=None if server.slots is None else slot)


def read_queues(servers: dict[str, HostServer]) -> dict[tuple[str, str], float]:
    """`GET /queue` of both; `GET /queue/all` of ours beside `GET /queue` of stock, the first one and later ones."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(READS):
        for name, server in servers.items():
            path = "/queue" if server.slots is None else "/queue/all"
            times.setdefault(("GET /queue/all (stock: /queue), ms", name), []).append(timed(server, path))
    for _ in range(READS):
        for name, server in servers.items():
            times.setdefault(("GET /queue, ms", name), []).append(timed(server, "/queue"))
    firsts = {(f"first {figure}", name): seconds[0] for (figure, name), seconds in times.items() if "all" in figure}
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    return {key: seconds * 1000 for key, seconds in (firsts | medians).items()}


def delete(servers: dict[str, HostServer]) -> dict[tuple[str, str], float]:
    """One request that deletes many of the waiting jobs, chosen by chance."""
    times: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(DELETIONS):
        for name, server in servers.items():
            waiting = [item[1] for item in server.request("GET", "/queue")[1]["queue_pending"]]
            body = {"delete": random.Random(turn).sample(waiting, min(DELETED, len(waiting) // 2))}
            times[name].append(timed(server, "/queue", "POST", body))
    return {(f"POST /queue, deleting {DELETED}, ms", name): statistics.median(times[name]) * 1000 for name in servers}


def timed(server: HostServer, path: str, method: str = "GET", body: Any = None) -> float:
    began = time.perf_counter()
    server.request(method, path, body)
    return time.perf_counter() - began


def job(class_type: str, **inputs: Any) -> Workflow:
    return {
        "1": {"class_type": class_type, "inputs": inputs},
        "2": {"class_type": "CPTOut", "inputs": {"value": ["1", 0]}},
    }


def submit_to_start(server: HostServer) -> list[float]:
    """Seconds from sending `POST /prompt` to receiving `execution_start`, on an idle server."""
    times = []
    with WebSocketClient(server) as client:
        for _ in range(STARTS // TURNS):
            began = time.perf_counter()
            work = job("CPTConstInt", value=random.randrange(2**60))
            prompt_id = server.submit(work, client_id=client.client_id)["prompt_id"]

            def is_start(event: dict[str, Any], prompt_id: str = prompt_id) -> bool:
                return event["type"] == "execution_start" and event["data"]["prompt_id"] == prompt_id

            client.wait_for(is_start)
            times.append(time.perf_counter() - began)
            client.wait_for_end(prompt_id)
    return times


def fill(server: HostServer, workflow: Workflow | None, jobs: int, latencies: list[float]) -> float:
    """Submit jobs from several connections; appends each request's seconds and returns the whole's.

    Without a workflow each job is another one of the smallest.
    """
    threads = [
        threading.Thread(target=send, args=(server, workflow, jobs // CLIENTS, latencies)) for _ in range(CLIENTS)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def send(server: HostServer, workflow: Workflow | None, count: int, latencies: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"prompt": workflow})
    for _ in range(count):
        if workflow is None:
            body = json.dumps({"prompt": job("CPTConstInt", value=random.randrange(2**60))})
        began = time.perf_counter()
        connection.request("POST", "/prompt", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        latencies.append(time.perf_counter() - began)
        if reply.status != 200:
            raise SystemExit(f"POST /prompt answered {reply.status}")
    connection.close()


def report(samples: dict[tuple[str, str], list[float]]) -> None:
    print(f"\n{'':44} {'stock':>10} {'ours':>10} {'ours/stock':>11}")
    for figure in dict.fromkeys(figure for figure, _ in samples):
        stock, ours = (statistics.median(samples[figure, name]) for name in ("stock", "ours"))
        print(f"{figure:44} {stock:10.2f} {ours:10.2f} {ours / stock:11.2f}")


if __name__ == "__main__":
    main()
