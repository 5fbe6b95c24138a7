"""What nginx before ComfyUI costs: requests per second and latency through it and past it, in turns, by wrk.

    python benchmarks/through_nginx.py COMFYUI_DIR [--rounds 5] [--seconds 5]

ComfyUI has two CPU slots and nothing to do; nginx runs nginx/comfy_parallel.conf. Both, and wrk, share the machine. The
figures are medians over the rounds. Needs nginx and wrk (on Debian: apt-get install nginx wrk).
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from tests.deploy.real_nginx import running_nginx
from tests.host.server import HostServer

PATHS = ("/queue", "/queue/all", "/object_info/EmptyImage")
CONNECTIONS = 8
SLOT_0 = 8181
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    config = (REPO_DIR / "nginx" / "comfy_parallel.conf").read_text(encoding="utf-8")
    with (
        tempfile.TemporaryDirectory() as base,
        tempfile.TemporaryDirectory() as home,
        HostServer(options.comfyui, Path(base)) as server,
        running_nginx("nginx", Path(home), config, server.port) as nginx,
    ):
        ways = {"direct": server.port, "nginx": nginx.ports[SLOT_0]}
        report(measure(ways, options.rounds, options.seconds))


Samples = dict[tuple[str, str], list[tuple[float, float, float]]]


def measure(ways: dict[str, int], rounds: int, seconds: int) -> Samples:
    """Of each way and path: requests per second, median and 99th percentile of the latency in ms, for each round."""
    samples: Samples = {}
    for number in range(rounds):
        for path in PATHS:
            for way in list(ways) if number % 2 else reversed(ways):
                samples.setdefault((way, path), []).append(wrk(f"http://127.0.0.1:{ways[way]}{path}", seconds))
    return samples


def wrk(url: str, seconds: int) -> tuple[float, float, float]:
    command = [
        "wrk",
        "--threads",
        "1",
        "--connections",
        str(CONNECTIONS),
        "--duration",
        f"{seconds}s",
        "--latency",
        url,
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"{url}: not every request was answered\n{text}")
    rate = float(re.findall(r"Requests/sec: +([\d.]+)", text)[0])
    half, last = (latency(text, share) for share in ("50%", "99%"))
    return rate, half, last


def latency(text: str, share: str) -> float:
    value, unit = re.findall(rf"{share} +([\d.]+)(us|ms|s)", text)[0]
    return float(value) * UNITS[unit]


def report(samples: Samples) -> None:
    print("| | requests/s, direct | through nginx | ratio | p50 / p99 direct, ms | through nginx |")
    print("|---|---|---|---|---|---|")
    for path in PATHS:
        direct, proxied = (
            [statistics.median(column) for column in zip(*samples[way, path], strict=True)]
            for way in ("direct", "nginx")
        )
        print(
            f"| `GET {path}` | {direct[0]:.0f} | {proxied[0]:.0f} | {proxied[0] / direct[0]:.2f} "
            f"| {direct[1]:.2f} / {direct[2]:.2f} | {proxied[1]:.2f} / {proxied[2]:.2f} |"
        )


if __name__ == "__main__":
    main()
