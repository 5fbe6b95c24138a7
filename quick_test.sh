#!/usr/bin/env bash
# Checks a running ComfyUI with comfy_parallel: one small job for each slot, and one that any slot may take.
# Needs no model, and nothing but Python 3 itself. See quick_test.sh --help.
set -euo pipefail

python=${COMFYUI_PYTHON:-python3}
if ! command -v -- "$python" >/dev/null; then
    echo "quick_test.sh: there is no $python; install Python 3, or set COMFYUI_PYTHON to one" >&2
    exit 1
fi

exec "$python" - "$@" <<'PYTHON'
import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

POLL_S = 0.1
SLOT_FIELDS = {
    "gpu_id": int,
    "device": str,
    "device_name": str,
    "state": str,
    "running": list,
    "pending": list,
    "queue_running": list,
    "queue_pending": list,
    "running_count": int,
    "pending_count": int,
    "metrics": dict,
    "vram": dict,
    "models": list,
}
OVERVIEW_FIELDS = {
    "mode": str,
    "num_gpus": int,
    "queues": list,
    "unassigned": list,
    "total_running": int,
    "total_pending": int,
}


class TestFailed(Exception):
    """The server did not do what it should."""


class Client:
    def __init__(self, url):
        self.url = url.rstrip("/")
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def request(self, path, body=None, headers=()):
        """Status and reply; a body makes it a POST."""
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **dict(headers)})
        try:
            with self.opener.open(call, timeout=30) as reply:
                return reply.status, parse(reply.read())
        except urllib.error.HTTPError as refusal:
            return refusal.code, parse(refusal.read())
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise TestFailed(
                f"{self.url} does not answer ({reason}); start the server with start_multi_gpu.sh, or name it with --url"
            ) from None

    def submit(self, target):
        status, reply = self.request("/prompt", {"prompt": workflow()}, {"X-TARGET-GPU": target})
        if status != 200:
            raise TestFailed(f"POST /prompt with X-TARGET-GPU: {target} answered {status}: {reply}")
        return reply


def parse(body):
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def workflow():
    """A plain image, of another colour each time: a job seen before would not run at all."""
    colour = random.randrange(1 << 24)
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def check_fields(where, value, fields):
    for name, kind in fields.items():
        if name not in value:
            raise TestFailed(f"{where} has no {name!r}")
        if not isinstance(value[name], kind):
            raise TestFailed(f"{where}: {name!r} is {value[name]!r}, not of type {kind.__name__}")


def read_slots(client):
    """Each slot as GET /queue/all shows it."""
    status, overview = client.request("/queue/all")
    if status != 200 or not isinstance(overview, dict):
        raise TestFailed(
            f"GET /queue/all answered {status}: the scheduler is off; start ComfyUI with COMFY_MULTI_GPU_SCHED=1"
        )
    check_fields("GET /queue/all", overview, OVERVIEW_FIELDS)
    slots = overview["queues"]
    for slot in slots:
        check_fields("GET /queue/all: queues[]", slot, SLOT_FIELDS)
    if [slot["gpu_id"] for slot in slots] != list(range(overview["num_gpus"])):
        raise TestFailed(f"GET /queue/all: num_gpus is {overview['num_gpus']}, but queues[] does not hold one slot each")
    return slots


def check_refusal(client, target):
    status, reply = client.request("/prompt", {"prompt": workflow()}, {"X-TARGET-GPU": target})
    error = reply.get("error") if isinstance(reply, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    if (status, kind) != (400, "invalid_target_gpu"):
        raise TestFailed(f"X-TARGET-GPU: {target} should be refused (400, invalid_target_gpu); got {status}: {reply}")


def wait(client, jobs, timeout_s):
    """Each job's history entry; {} for a job that did not finish in time."""
    entries = {}
    deadline = time.monotonic() + timeout_s
    while len(entries) < len(jobs):
        for job in jobs:
            if job not in entries:
                entry = client.request(f"/history/{job}")[1].get(job)
                if entry is not None or time.monotonic() > deadline:
                    entries[job] = entry or {}
        time.sleep(POLL_S)
    return entries


def state_of(entry):
    return entry["status"]["status_str"] if entry.get("status") else "not finished"


def seconds_of(entry):
    """How long the job ran, from its own events."""
    messages = entry["status"]["messages"] if entry.get("status") else []
    times = [data["timestamp"] for _, data in messages if "timestamp" in data]
    return f"{(times[-1] - times[0]) / 1000:.2f}" if len(times) > 1 else "-"


def problems_of(target, reply, entry, slots):
    promised, kept = reply.get("gpu_id"), entry.get("gpu_id")
    if state_of(entry) != "success":
        yield f"the job for {target} is {state_of(entry)}; the server's log says more, --timeout waits longer"
    elif target == "auto":
        if kept not in range(len(slots)):
            yield f"the job for auto ran on gpu_id {kept!r}, which is no slot"
    else:
        if promised != int(target):
            yield f"POST /prompt for slot {target} answered gpu_id {promised!r}"
        if kept != int(target):
            yield f"the job for slot {target} ran on gpu_id {kept!r}"


def print_table(rows):
    rows = [("slot", "device", "job", "state", "seconds"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def run(url, timeout_s):
    client = Client(url)
    slots = read_slots(client)
    for target in (str(max(99, len(slots))), "-1", "one"):
        check_refusal(client, target)
    targets = [*map(str, range(len(slots))), "auto"]
    replies = [client.submit(target) for target in targets]
    jobs = [reply["prompt_id"] for reply in replies]
    try:
        entries = wait(client, jobs, timeout_s)
    finally:
        client.request("/queue", {"delete": jobs})
    problems, rows = [], []
    for target, reply, job in zip(targets, replies, jobs):
        entry = entries[job]
        problems += problems_of(target, reply, entry, slots)
        slot = entry.get("gpu_id")
        device = slots[slot]["device"] if slot in range(len(slots)) else "?"
        label = target if target != "auto" else f"auto: {slot}"
        rows.append((label, device, job[:8], state_of(entry), seconds_of(entry)))
    print_table(rows)
    if problems:
        raise TestFailed("\n  ".join(problems))
    print(f"passed: {len(slots)} slots, {len(jobs)} jobs, each where it belongs")


def main():
    parser = argparse.ArgumentParser(
        prog="quick_test.sh", description="Run one small job on every slot of a running ComfyUI, and check where it ran."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="wait S seconds; default: %(default)s")
    options = parser.parse_args()
    if urllib.parse.urlsplit(options.url).scheme not in ("http", "https"):
        parser.error(f"--url {options.url}: write it like http://127.0.0.1:8188")
    try:
        run(options.url, options.timeout)
    except TestFailed as failure:
        sys.exit(f"failed: {failure}")


main()
PYTHON
