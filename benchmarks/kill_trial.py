"""Kills a loaded ComfyUI again and again at random moments, and counts what was lost or came twice.

    python benchmarks/kill_trial.py COMFYUI_DIR [--kills 200] [--seed 1] [--budget-s 3600]
    python benchmarks/kill_trial.py --restore 10000

Clients submit short jobs without a pause, each with an `Idempotency-Key` of its own; a request that a kill leaves
without an answer is sent again after the restart. Each job notes in a file that it began and that it ended. In the end
every job that was accepted must be in the history once, with no more runs than its attempts allow, and none that was in
the history before a kill may have run after it.

With `--restore` no ComfyUI is started: it measures how long it takes to put back so many waiting jobs of 8 nodes.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_parallel.journal.journal import Journal
from comfy_parallel.slots.recovery import Recovery
from tests.fakes import make_front
from tests.host.server import JSON, HostServer
from tests.host.workflows import node, txt2img

CLIENTS = 4
MOST_ATTEMPTS = 2
LONGEST_LIFE_S = 3.0
LONGEST_JOB_S = 0.4
MOST_WAITING = 40


class Client(threading.Thread):
    """Submits jobs until it is told to end, each until it is accepted."""

    def __init__(self, server: HostServer, notes: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.accepted: dict[str, str] = {}  # the id of each job, by its text
        self.ends = threading.Event()
        self._server, self._notes, self._random = server, notes, random.Random(seed)

    def run(self) -> None:
        while not self.ends.is_set():
            text, seconds = uuid.uuid4().hex, self._random.uniform(0, LONGEST_JOB_S)
            note = node("CPTNote", path=str(self._notes), text=text, seconds=seconds, ends_server=False)
            body = {"prompt": {"note": note, "out": node("CPTOut", value=["note", 0])}, "client_id": self.name}
            while (reply := self._post(body, text)) is None:  # also after the last kill: it may have been accepted
                time.sleep(0.05)
            self.accepted[text] = reply["prompt_id"]
            while self._waiting() > MOST_WAITING and not self.ends.is_set():
                time.sleep(0.05)

    def _post(self, body: JSON, key: str) -> JSON | None:
        try:
            status, reply = self._server.request("POST", "/prompt", body, headers={"Idempotency-Key": key})
        except OSError:
            return None
        if status != 200:
            raise SystemExit(f"POST /prompt answered {status}: {reply}")
        accepted: JSON = reply
        return accepted

    def _waiting(self) -> int:
        try:
            count: int = self._server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]
        except OSError:
            return 0
        return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, nargs="?")
    parser.add_argument("--restore", type=int, default=0, metavar="JOBS")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=3600.0)
    options = parser.parse_args()
    if options.comfyui is None and not options.restore:
        parser.error("name COMFYUI_DIR, or --restore")
    with tempfile.TemporaryDirectory() as base:
        if options.restore:
            measure_restore(Path(base) / "queue.sqlite3", options.restore)
        else:
            trial(options, Path(base))


def measure_restore(path: Path, count: int) -> None:
    journal = Journal(path)
    for number in range(count):
        extra_data = {"client_id": f"client {number % 7}", "create_time": 1_700_000_000_000 + number}
        item = (number, uuid.uuid4().hex, txt2img(number), extra_data, ["save"])
        journal.accept(number, item, target=number % 2, counter=number + 1)
    journal.flush()
    journal.close()
    began, cpu = time.perf_counter(), time.process_time()
    journal, front = Journal(path), make_front("cpu", "cpu")
    front.ledger.open(journal, count, lambda: count)
    Recovery(front, MOST_ATTEMPTS, lambda workflow, names: []).restore(journal.recover())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    waiting = sum(len(items) for items in front.snapshot().pending)
    print(f"{waiting} of {count} jobs wait again after {seconds:.2f} s (CPU {cpu:.2f})")
    journal.close()


def trial(options: argparse.Namespace, base: Path) -> None:
    chance, began = random.Random(options.seed), time.monotonic()
    server, notes = HostServer(options.comfyui, base / "host", slots="cpu,cpu"), base / "notes"
    server.start()
    clients = [Client(server, notes, number) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    doubled, kills = 0, 0
    while kills < options.kills and time.monotonic() - began < options.budget_s:
        time.sleep(chance.uniform(0, LONGEST_LIFE_S))
        ended = set(server.request("GET", "/history")[1])
        server.stop(signal_number=signal.SIGKILL)
        runs_before = count_runs(notes)
        server.start()
        kills += 1
        runs, texts = (
            count_runs(notes),
            {prompt_id: text for one in clients for text, prompt_id in one.accepted.items()},
        )
        doubled += sum(runs[texts[one]] != runs_before[texts[one]] for one in ended if one in texts)
    for client in clients:
        client.ends.set()
    for client in clients:
        client.join(120)
    report(server, {text: one for client in clients for text, one in client.accepted.items()}, notes, kills, doubled)
    server.stop()


def count_runs(notes: Path) -> Counter[str]:
    return Counter(notes.read_text().split() if notes.exists() else ())


def report(server: HostServer, accepted: dict[str, str], notes: Path, kills: int, doubled: int) -> None:
    deadline = time.monotonic() + 300
    while server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"] and time.monotonic() < deadline:
        time.sleep(0.1)
    history, runs = server.request("GET", "/history")[1], count_runs(notes)
    entries = {text: history.get(prompt_id) for text, prompt_id in accepted.items()}
    kept = {text: entry for text, entry in entries.items() if entry is not None}
    errors = [text for text, entry in kept.items() if entry["status"]["status_str"] == "error"]
    figures = {
        "kills": kills,
        "jobs accepted": len(accepted),
        "of these lost": len(accepted) - len(kept),
        "in the history and never accepted": len(history) - len(kept),
        "that ran again although they had ended": doubled,
        "that ran more often than their attempts": sum(runs[text] > kept[text].get("attempts", 1) for text in kept),
        "that ran more often than is allowed": sum(runs[text] > MOST_ATTEMPTS for text in accepted),
        "that ran a second time": sum(runs[text] == 2 for text in accepted),
        "that ended as an error after two killed runs": len(errors),
        "of these with fewer attempts": sum(kept[text].get("attempts") != MOST_ATTEMPTS for text in errors),
    }
    for name, figure in figures.items():
        print(f"{figure:6d} {name}")


if __name__ == "__main__":
    main()
