"""Malformed requests over all endpoints and the WebSocket, the same ones to stock ComfyUI and to comfy_parallel.

    python benchmarks/fuzz.py COMFYUI_DIR [--requests 10000] [--seed 1]

Repeatable: the seed makes the requests. Every 25th is a sound job instead. At the end prints each 5xx that
comfy_parallel gave and stock did not (to the same request), jobs that were accepted and are in no history, and whether
the servers still run a job. Exit status 1 if there is any of these.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import http.client
import json
import random
import re
import socket
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.server import HostServer, HostServerError

SLOTS = {"stock": None, "ours": "cpu,cpu"}
TIMEOUT_S = 30
SOUND_EVERY = 25
_MADE_BY_SERVER = re.compile(r"[0-9a-f-]{36}")  # Others are names that several requests gave.
POSTS = [
    "/prompt",
    "/api/prompt",
    "/queue",
    "/interrupt",
    "/free",
    "/history",
    "/upload/image",
    "/upload/mask",
    "/userdata/x.json",
    "/settings",
    "/parallel/pause",
    "/parallel/resume",
    "/parallel/drain",
    "/parallel/preload",
    "/parallel/jobs/x",
    "/api/jobs/cancel",
]
GETS = [
    "/queue",
    "/queue/all",
    "/debug/queues",
    "/metrics",
    "/health",
    "/ready",
    "/history",
    "/history/x",
    "/api/jobs",
    "/api/jobs/x",
    "/view",
    "/prompt",
    "/object_info",
    "/object_info/x",
    "/system_stats",
    "/embeddings",
    "/models",
    "/models/x",
    "/userdata",
    "/extensions",
    "/parallel/weights",
    "/parallel/",
    "/parallel/x",
    "/gpu1/queue",
    "/view_metadata/x",
    "/features",
    "/users",
    "/settings/x",
]
JOB = {"value": {"class_type": "CPTConstInt", "inputs": {"value": 1}}, "out": {"class_type": "CPTOut", "inputs": {}}}
JOB["out"]["inputs"] = {"value": ["value", 0]}
WORDS = ["", "x", "../../etc/passwd", "a" * 3000, "\x00", "\ud800", "é", "%s%n", "auto", "-1", "9" * 30, "null", "<b>"]


@dataclass(frozen=True)
class Request:
    """One request, as it is sent to both servers."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, and some that it cannot."""
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 3:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice([0, -1, 1, 2, 99, 2**63, -(2**70), 1e308, float("nan"), float("inf"), 0.5])
    if kind == 4:
        return rng.choice([True, False, None])
    if kind < 8:
        return copy.deepcopy(rng.choice([JOB, [], {}, ["value", 0], "value"]))
    if kind < 10:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def prompt(rng: random.Random) -> dict[str, Any]:
    """A job with something wrong, most of the time."""
    body: dict[str, Any] = {"prompt": json.loads(json.dumps(JOB))}
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(
            [
                "prompt",
                "client_id",
                "prompt_id",
                "extra_data",
                "number",
                "front",
                "partial_execution_targets",
                "priority",
                "workflow_id",
            ]
        )
        body[name] = value(rng)
    if rng.random() < 0.4:
        body["extra_data"] = {
            name: value(rng)
            for name in ("target_gpu", "priority", "client_order", "webhook", "client_id", "preview_method")
        }
    if isinstance(body["prompt"], dict) and rng.random() < 0.5:
        node = rng.choice(["value", "out", "x"])
        body["prompt"][node] = {"class_type": rng.choice(["CPTConstInt", "CPTOut", value(rng)]), "inputs": value(rng)}
    return body


def request(rng: random.Random) -> Request:
    """A request that is likely malformed. None clears the queue or the history: that would lose jobs by order."""
    headers = [
        ("Content-Type", rng.choice(["application/json"] * 6 + ["text/plain", "application/x; charset=nope", ""]))
    ]
    for name in (
        "X-TARGET-GPU",
        "X-Client-Order",
        "Idempotency-Key",
        "X-Forwarded-For",
        "Content-Encoding",
        "comfy-user",
    ):
        if rng.random() < 0.1:
            text = rng.choice([str(value(rng)), "0", "1", "7", "auto", "in-order", "gzip", "1,2"])
            headers.append((name, "".join(c for c in text if c.isprintable() and c.isascii())[:200]))
    if rng.random() < 0.4:
        path = rng.choice(GETS)
        query = rng.choice(
            ["", "?max_items=-1", "?max_items=x", "?offset=9e9", "?filename=../x", "?clientId=%00", "?x=" + "y" * 999]
        )
        return Request(rng.choice(["GET", "GET", "HEAD", "DELETE", "PUT"]), path + query, tuple(headers), None)
    path = rng.choice([*POSTS, "/prompt", "/prompt", "/prompt"])
    if path.endswith("/prompt"):
        made: Any = prompt(rng) if rng.random() < 0.9 else value(rng)
    else:
        made = {
            name: value(rng)
            for name in rng.sample(
                ["delete", "prompt_id", "gpu_ids", "files", "slot", "priority", "unload_models", "client_id", "all"], 3
            )
        }
        made = made if rng.random() < 0.8 else value(rng)
    body = json.dumps(made).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        cut = rng.randrange(len(body) + 1)
        body = body[:cut] + bytes(rng.randrange(256) for _ in range(rng.randrange(8))) + body[cut + rng.randrange(8) :]
    return Request("POST", path, tuple(headers), body)


def send(server: HostServer, asked: Request) -> tuple[int, bytes]:
    """Status and body; 0 when the server closed the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    try:
        connection.request(asked.method, asked.path, asked.body, dict(asked.headers))
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return 0, repr(error).encode()
    finally:
        connection.close()


def disturb_websocket(server: HostServer, rng: random.Random) -> None:
    """Connect, and send frames and bytes that mean nothing."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as connection:
        client = rng.choice(["", "x", "%00", "a" * 2000])
        handshake = (
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        connection.sendall(handshake.encode())
        text = rng.choice([b"{}", b"[", b'{"type": "feature_flags", "data": 5}', b'{"type": 7}', b"\xff", b""])
        masked = bytes((0x80 | rng.choice([1, 2, 8, 9, 3]), 0x80 | len(text), 0, 0, 0, 0)) + text
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(rng.choice([masked, rng.randbytes(40), b""]))
            connection.recv(rng.randrange(1, 400))


class Trial:
    """Sends each request to both servers, and notes what should not be."""

    def __init__(self, servers: dict[str, HostServer]) -> None:
        self.servers = servers
        self.accepted: dict[str, list[str]] = {name: [] for name in servers}
        self.statuses: dict[str, Counter[int]] = {name: Counter() for name in servers}
        self.problems: list[str] = []

    def ask(self, asked: Request) -> None:
        found = {name: send(server, asked) for name, server in self.servers.items()}
        for name, (status, reply) in found.items():
            self.statuses[name][status] += 1
            if status == 200 and asked.path.endswith("/prompt") and asked.method == "POST":
                job_id = json.loads(reply)["prompt_id"]
                self.accepted[name] += [job_id] if _MADE_BY_SERVER.fullmatch(job_id) else []
        ours, stock = found["ours"][0], found["stock"][0]
        if (ours >= 500 and ours != 503 and stock < 500) or (ours == 0 and stock != 0):
            what = f"{asked.method} {asked.path} {asked.headers} {asked.body!r}"
            self.problems.append(f"{what}: {found['ours']}, stock {stock}")

    def end(self) -> None:
        """Have all of our jobs end, and look for those that are nowhere. Stock's worker does not survive this."""
        ours = self.servers["ours"]
        ours.request("POST", "/parallel/resume")
        try:
            ours.wait(self.accepted["ours"])
            ended = ours.run(JOB)["status"]["status_str"]
        except HostServerError as error:
            ended = str(error)
        if ended != "success":
            self.problems.append(f"ours: jobs are lost, or it runs none any more: {ended}")
        history = self.servers["stock"].request("GET", "/history")[1]
        lost = [job for job in self.accepted["stock"] if job not in history]
        print(f"stock: {len(lost)} of {len(self.accepted['stock'])} accepted jobs have not ended")


def sound(number: int) -> Request:
    """A job that is as it should be."""
    workflow = {**JOB, "value": {"class_type": "CPTConstInt", "inputs": {"value": number}}}
    return Request(
        "POST", "/prompt", (("Content-Type", "application/json"),), json.dumps({"prompt": workflow}).encode()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with ExitStack() as stack:
        servers = {}
        for name, slots in SLOTS.items():
            base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers[name] = stack.enter_context(HostServer(options.comfyui, base, slots=slots))
        trial = Trial(servers)
        for number in range(options.requests):
            trial.ask(request(rng) if number % SOUND_EVERY else sound(number))
            if number % 50 == 1:
                for server in servers.values():
                    disturb_websocket(server, random.Random(number))
        trial.end()
    for name in SLOTS:
        counts = sorted(trial.statuses[name].items())
        print(f"{name}: {options.requests} requests, {len(trial.accepted[name])} jobs accepted; statuses {counts}")
    print(*trial.problems, sep="\n")
    print(f"seed {options.seed}: {len(trial.problems)} problems")
    return 1 if trial.problems else 0


if __name__ == "__main__":
    sys.exit(main())
