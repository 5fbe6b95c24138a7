"""Shows two jobs running at once in one ComfyUI: six images on two CPU slots.

usage: bash tests/quick_start.sh      (needs COMFYUI_PATH and the Python packages, which it sets up)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from tests.host.models import cached_models  # noqa: E402 - needs the path above
from tests.host.server import HostServer, HostServerError, WebSocketClient  # noqa: E402
from tests.host.workflows import txt2img  # noqa: E402

SLOTS = "cpu,cpu"
JOBS = 6
STEPS = 12
SIZE = 128
TIMEOUT_S = 300.0
REFRESH_S = 0.1
BAR_CHARS = 24
STEPS_PER_LINE = 4  # where lines cannot be redrawn
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class QuickStartError(RuntimeError):
    """The demonstration did not show what it claims."""


@dataclass(slots=True)
class SlotLine:
    """What one slot is doing, from its jobs' events."""

    slot: int
    done: int = 0
    job: int | None = None
    step: int = 0
    steps: int = STEPS

    def __str__(self) -> str:
        if self.job is None:
            return f"slot {self.slot}: {self.done} done, idle"
        filled = BAR_CHARS * self.step // max(1, self.steps)
        bar = "#" * filled + "." * (BAR_CHARS - filled)
        return f"slot {self.slot}: {self.done} done, job {self.job + 1} [{bar}] step {self.step}/{self.steps}"

    def apply(self, event: dict[str, Any], job: int) -> bool:
        """Take in one event; whether it is worth a line of its own: a start, every few steps, an end."""
        kind, data = event["type"], event["data"]
        if kind == "progress":
            self.job, self.step, self.steps = job, data["value"], data["max"]
        elif kind == "execution_start":
            self.job, self.step = job, 0
        elif kind in ENDS:
            self.job = None
            self.done += 1
        is_shown_step = kind == "progress" and self.step % STEPS_PER_LINE == 0
        return kind == "execution_start" or is_shown_step or kind in ENDS


class Board:
    """One line per slot: redrawn in place on a terminal, else printed now and then."""

    def __init__(self, job_ids: list[str], slot_count: int) -> None:
        self._jobs = {job_id: number for number, job_id in enumerate(job_ids)}
        self._lines = [SlotLine(slot) for slot in range(slot_count)]
        self._is_live = sys.stdout.isatty()
        self._seen = 0
        if self._is_live:
            say(*self._lines)

    def update(self, events: list[dict[str, Any]]) -> None:
        for event in events[self._seen :]:
            self._apply(event)
        self._seen = len(events)
        if self._is_live:
            sys.stdout.write(f"\x1b[{len(self._lines)}F")
            say(*(f"\x1b[2K{line}" for line in self._lines))

    def _apply(self, event: dict[str, Any]) -> None:
        data = event["data"]
        job, slot = self._jobs.get(data.get("prompt_id", "")), data.get("gpu_id")
        if job is None or slot is None:
            return
        if self._lines[slot].apply(event, job) and not self._is_live:
            say(self._lines[slot])


@dataclass(frozen=True, slots=True)
class Span:
    """When and where one job ran, in seconds."""

    slot: int
    start_s: float
    end_s: float


def say(*lines: object) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def follow(job_ids: list[str], client: WebSocketClient) -> None:
    """Show progress until every job has ended."""
    board = Board(job_ids, len(SLOTS.split(",")))
    deadline = time.monotonic() + TIMEOUT_S
    while not set(job_ids) <= ended(client.events):
        if client.is_closed:
            raise QuickStartError("ComfyUI closed the WebSocket; its log is named below")
        if time.monotonic() > deadline:
            raise QuickStartError(f"the jobs did not end within {TIMEOUT_S:.0f} s")
        board.update(client.events)
        time.sleep(REFRESH_S)
    board.update(client.events)


def ended(events: Iterable[dict[str, Any]]) -> set[str]:
    return {event["data"]["prompt_id"] for event in events if event["type"] in ENDS}


def span_of(job_id: str, entry: dict[str, Any]) -> Span:
    """Where and when a finished job ran, from its history entry."""
    messages: dict[str, Any] = dict(entry["status"]["messages"])
    if "execution_success" not in messages:
        raise QuickStartError(f"job {job_id} failed: {messages.get('execution_error', messages)}")
    start, end = (messages[kind]["timestamp"] / 1000 for kind in ("execution_start", "execution_success"))
    return Span(entry["gpu_id"], start, end)


def seconds_with_two(spans: Iterable[Span]) -> float:
    """How long at least two jobs were running."""
    changes = sorted([(span.start_s, 1) for span in spans] + [(span.end_s, -1) for span in spans])
    total, running, since = 0.0, 0, 0.0
    for moment, change in changes:
        if running >= 2:
            total += moment - since
        running += change
        since = moment
    return total


def report(spans: list[Span], images: list[Path], base_dir: Path) -> None:
    wall_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    share = seconds_with_two(spans) / wall_s
    slots = range(len(SLOTS.split(",")))
    say("", f"{len(spans)} jobs in {wall_s:.1f} s; two at once for {share:.0%} of that time.")
    for slot in slots:
        busy = [span.end_s - span.start_s for span in spans if span.slot == slot]
        say(f"slot {slot} ran {len(busy)} jobs in {sum(busy):.1f} s")
    say(f"{len(images)} images in {base_dir / 'output'}")
    if {span.slot for span in spans} != set(slots) or share == 0:
        raise QuickStartError("the jobs did not share the slots: no two of them ran at the same time")


def run_jobs(server: HostServer) -> list[Span]:
    seed = int(time.time())
    with server.websocket() as client:
        jobs = [txt2img(seed + i, steps=STEPS, width=SIZE, height=SIZE, prefix="quick_start") for i in range(JOBS)]
        job_ids = [server.submit(job, "auto", client.client_id)["prompt_id"] for job in jobs]
        follow(job_ids, client)
    entries = server.wait(job_ids, timeout_s=10)
    return [span_of(job_id, entries[job_id]) for job_id in job_ids]


def demonstrate(host_dir: Path, cache_dir: Path) -> None:
    say("Making a small checkpoint with random weights (first run only) …")
    models_dir = cached_models(host_dir, cache_dir, ["a"])
    base_dir = cache_dir / "quick_start"
    base_dir.mkdir(parents=True, exist_ok=True)
    (base_dir / "models").unlink(missing_ok=True)
    (base_dir / "models").symlink_to(models_dir, target_is_directory=True)
    server = HostServer(host_dir, base_dir, slots=SLOTS, env={"COMFY_PARALLEL_STRICT": "1"})
    before = set(server.output_files())
    say(f"Starting ComfyUI with COMFY_MULTI_GPU_SCHED=1 and the slots {SLOTS}; log: {server.log_path}")
    with server:
        say(f"ComfyUI answers at {server.url}. Submitting {JOBS} jobs, {STEPS} steps each:")
        spans = run_jobs(server)
    images = sorted(set(server.output_files()) - before)
    if len(images) != JOBS:
        raise QuickStartError(f"{JOBS} jobs wrote {len(images)} images")
    report(spans, images, base_dir)


def main() -> int:
    host_dir = Path(os.environ["COMFYUI_PATH"])
    cache_dir = Path(os.environ["COMFY_PARALLEL_CACHE"])
    try:
        demonstrate(host_dir, cache_dir)
    except (QuickStartError, HostServerError) as error:
        sys.stderr.write(f"quick start: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
