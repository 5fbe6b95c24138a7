"""Stock ComfyUI against comfy_parallel over HTTP, in one run on one machine, on the CPU.

    python benchmarks/requests_per_second.py COMFYUI_DIR [--rounds 3] [--jobs 10000]

Measures requests per second and latency of `POST /prompt` (workers busy), the time from submitting a job to
its start on an idle server, and `GET /queue` and `GET /queue/all` with many waiting jobs. Stock and ours take
turns; the figures are medians over the rounds, the ratios ours / stock.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.server import HostServer, WebSocketClient

CLIENTS = 4
STARTS = 60
READS = 10


def main() -> None:
    options = parse()
    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(options.rounds):
        for name, slots in (("stock", None), ("ours", "cpu,cpu")):
            print(f"round {round_number + 1}: {name}", flush=True)
            with tempfile.TemporaryDirectory() as base:
                server = HostServer(options.comfyui, Path(base), slots=slots)
                with server:
                    for figure, value in measure(server, slots, options.jobs).items():
                        samples.setdefault((figure, name), []).append(value)
    report(samples)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=10000)
    return parser.parse_args()


def measure(server: HostServer, slots: str | None, jobs: int) -> dict[str, float]:
    figures = {"submit to start, ms": submit_to_start(server)}
    for slot in range(len((slots or "one").split(","))):
        server.submit(job("CPTSleep", seconds=600.0, seed=slot), slot=None if slots is None else slot)
    latencies, seconds = fill(server, jobs)
    figures["POST /prompt, requests/s"] = jobs / seconds
    figures["POST /prompt p50, ms"] = statistics.median(latencies) * 1000
    figures["POST /prompt p99, ms"] = statistics.quantiles(latencies, n=100)[98] * 1000
    figures["GET /queue, ms"] = median_ms(lambda: server.request("GET", "/queue"))
    first = time.perf_counter()
    server.request("GET", "/queue" if slots is None else "/queue/all")
    figures["first GET /queue/all (stock: /queue), ms"] = (time.perf_counter() - first) * 1000
    path = "/queue" if slots is None else "/queue/all"
    figures["GET /queue/all (stock: /queue), ms"] = median_ms(lambda: server.request("GET", path))
    return figures


def job(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": class_type, "inputs": inputs},
        "2": {"class_type": "CPTOut", "inputs": {"value": ["1", 0]}},
    }


def submit_to_start(server: HostServer) -> float:
    """Median milliseconds from sending `POST /prompt` to receiving `execution_start`."""
    times = []
    with WebSocketClient(server) as client:
        for number in range(STARTS):
            began = time.perf_counter()
            prompt_id = server.submit(job("CPTConstInt", value=number), client_id=client.client_id)["prompt_id"]

            def is_start(event: dict[str, Any], prompt_id: str = prompt_id) -> bool:
                return event["type"] == "execution_start" and event["data"]["prompt_id"] == prompt_id

            client.wait_for(is_start)
            times.append(time.perf_counter() - began)
            client.wait_for_end(prompt_id)
    return statistics.median(times) * 1000


def fill(server: HostServer, jobs: int) -> tuple[list[float], float]:
    """Submit jobs from several connections; each request's seconds, and the whole's."""
    latencies: list[float] = []
    threads = [threading.Thread(target=send, args=(server, jobs // CLIENTS, latencies)) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - began


def send(server: HostServer, count: int, latencies: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"prompt": job("CPTConstInt", value=1)})
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/prompt", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        latencies.append(time.perf_counter() - began)
        if reply.status != 200:
            raise SystemExit(f"POST /prompt answered {reply.status}")
    connection.close()


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(READS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def report(samples: dict[tuple[str, str], list[float]]) -> None:
    print(f"\n{'':44} {'stock':>10} {'ours':>10} {'ours/stock':>11}")
    for figure in dict.fromkeys(figure for figure, _ in samples):
        stock, ours = (statistics.median(samples[figure, name]) for name in ("stock", "ours"))
        print(f"{figure:44} {stock:10.2f} {ours:10.2f} {ours / stock:11.2f}")


if __name__ == "__main__":
    main()
