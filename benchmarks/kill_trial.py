"""Kills loaded ComfyUIs again and again at random moments, and counts what was lost or came twice.

    python benchmarks/kill_trial.py COMFYUI_DIR [--kills 200] [--at-once 1] [--budget-s 3600] [--seed 1]
    python benchmarks/kill_trial.py --restore 10000

Clients submit short jobs without a pause, each with an `Idempotency-Key` of its own; a request that a kill leaves
without an answer is sent again after the restart. Each job notes in a file that it began. One kill of five comes while
the server starts. In the end every job that was accepted must be in the history once, with no more runs than its
attempts allow, and none that was in the history before a kill may have run after it.

`--at-once` servers are tried beside each other, which takes two to three processor cores for each; the kills are those
of all of them. When the time is nearly up no more kills come, and what was counted until then is printed. Exit status 1
if anything was lost, came twice or could not be told.

With `--restore` no ComfyUI is started: it measures how long it takes to put back so many waiting jobs of 8 nodes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_parallel.journal.journal import Journal
from comfy_parallel.slots.recovery import Recovery
from tests.fakes import make_front
from tests.host.server import JSON, HostServer, HostServerError
from tests.host.workflows import node, txt2img

CLIENTS = 4
MOST_ATTEMPTS = 2
LONGEST_LIFE_S = 3.0
LONGEST_JOB_S = 0.4
MOST_WAITING = 40
EARLY = 0.2  # so many of the kills come while the server starts
WIND_DOWN_S = 75.0  # of the budget, for the jobs that wait in the end
FORBIDDEN = (
    LOST := "of these lost",
    UNKNOWN := "in the history and never accepted",
    DOUBLED := "that ran again although they had ended",
    BEYOND_TOLD := "that ran more often than their attempts",
    BEYOND_ALLOWED := "that ran more often than is allowed",
    DISTURBED := "of these with fewer attempts",
    REFUSED := "requests refused",
    UNTOLD := "servers whose end was not told",
)


class Kills:
    """How many kills are left to all trials, and until when."""

    def __init__(self, count: int, seconds: float) -> None:
        self.began = time.monotonic()
        self.stops_at, self.ends_at = self.began + max(seconds - WIND_DOWN_S, seconds / 2), self.began + seconds
        self.done = 0
        self._count, self._lock = count, threading.Lock()

    def take(self) -> bool:
        """Whether there is to be one more."""
        with self._lock:
            if self.done >= self._count or time.monotonic() > self.stops_at:
                return False
            self.done += 1
            return True


class Client(threading.Thread):
    """Submits jobs until it is told to end, each until it is accepted."""

    def __init__(self, server: HostServer, notes: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.accepted: dict[str, str] = {}  # the id of each job, by its text
        self.ends = threading.Event()
        self.refusal = ""
        self._server, self._notes, self._random = server, notes, random.Random(seed)

    def run(self) -> None:
        while not self.ends.is_set() and not self.refusal:
            text, seconds = uuid.uuid4().hex, self._random.uniform(0, LONGEST_JOB_S)
            note = node("CPTNote", path=str(self._notes), text=text, seconds=seconds, ends_server=False)
            self._submit({"prompt": {"note": note, "out": node("CPTOut", value=["note", 0])}}, text)
            while self._waiting() > MOST_WAITING and not self.ends.is_set():
                time.sleep(0.05)

    def _submit(self, body: JSON, key: str) -> None:
        """Also after the last kill, for it may have been accepted before that."""
        while not self.refusal:
            with suppress(OSError):
                sent = {**body, "client_id": self.name}
                status, reply = self._server.request("POST", "/prompt", sent, headers={"Idempotency-Key": key})
                if status == 200:
                    self.accepted[key] = reply["prompt_id"]
                    return
                self.refusal = f"POST /prompt answered {status}: {reply}"
            time.sleep(0.05)

    def _waiting(self) -> int:
        with suppress(OSError):
            count: int = self._server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]
            return count
        return 0


class Trial(threading.Thread):
    """One server that is killed until no more kills are left, and in the end what became of its jobs."""

    def __init__(self, host_dir: Path, base: Path, seed: int, kills: Kills) -> None:
        super().__init__(daemon=True)
        self.server, self.notes = HostServer(host_dir, base / "host", slots="cpu,cpu"), base / "notes"
        self.figures: Counter[str] | None = None
        self.failure = ""
        self._chance, self._kills = random.Random(seed), kills
        self._clients = [Client(self.server, self.notes, 1000 * seed + number) for number in range(CLIENTS)]
        self._start_s = 10.0
        self._doubled = 0

    def run(self) -> None:
        try:
            self._start()
            for client in self._clients:
                client.start()
            while self._kills.take():
                self._kill()
            for client in self._clients:
                client.ends.set()
            for client in self._clients:
                client.join(max(0.0, self._kills.ends_at - time.monotonic()))
            self.figures = self._outcome()
        except Exception as error:  # noqa: BLE001 - told in the end; the other trials go on
            self.failure = f"{type(error).__name__}: {error}"

    def _start(self) -> None:
        began = time.monotonic()
        self.server.start()
        self._start_s = time.monotonic() - began

    def _kill(self) -> None:
        """Kill it after a while, perhaps once more while it starts again, and see whether what had ended ran again."""
        time.sleep(self._chance.uniform(0, LONGEST_LIFE_S))
        ended = set(self.server.request("GET", "/history")[1])
        self.server.stop(signal_number=signal.SIGKILL)
        before = self._runs()
        if self._chance.random() < EARLY and self._kills.take():
            self._kill_early()
        self._start()
        runs, texts = self._runs(), {prompt_id: text for text, prompt_id in self._accepted().items()}
        self._doubled += sum(runs[texts[one]] != before[texts[one]] for one in ended if one in texts)

    def _kill_early(self) -> None:
        """Kill it while it starts, more likely towards the end, when it puts its jobs back and starts its workers."""
        killer = threading.Timer(self._start_s * self._chance.triangular(0.3, 1.1, 1.0), self._end_process)
        killer.start()
        with suppress(HostServerError, OSError):  # It ends while it is asked whether it answers.
            self.server.start()
        killer.join()
        self.server.stop(signal_number=signal.SIGKILL)

    def _end_process(self) -> None:
        with suppress(HostServerError, ProcessLookupError):
            os.kill(self.server.pid, signal.SIGKILL)

    def _accepted(self) -> dict[str, str]:
        return {text: prompt_id for client in self._clients for text, prompt_id in list(client.accepted.items())}

    def _runs(self) -> Counter[str]:
        return Counter(self.notes.read_text().split() if self.notes.exists() else ())

    def _outcome(self) -> Counter[str]:
        while self.server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]:
            time.sleep(0.1)
        accepted, history, runs = self._accepted(), self.server.request("GET", "/history")[1], self._runs()
        kept = {text: history[prompt_id] for text, prompt_id in accepted.items() if prompt_id in history}
        errors = [text for text, entry in kept.items() if entry["status"]["status_str"] == "error"]
        return Counter(
            {
                "jobs accepted": len(accepted),
                LOST: len(accepted) - len(kept),
                UNKNOWN: len(history) - len(kept),
                DOUBLED: self._doubled,
                BEYOND_TOLD: sum(runs[text] > kept[text].get("attempts", 1) for text in kept),
                BEYOND_ALLOWED: sum(runs[text] > MOST_ATTEMPTS for text in accepted),
                "that ran a second time": sum(runs[text] == 2 for text in accepted),
                "that ended as an error after two killed runs": len(errors),
                DISTURBED: sum(kept[text].get("attempts") != MOST_ATTEMPTS for text in errors),
                REFUSED: sum(bool(client.refusal) for client in self._clients),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, nargs="?")
    parser.add_argument("--restore", type=int, default=0, metavar="JOBS")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="servers beside each other")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=3600.0)
    options = parser.parse_args()
    if options.comfyui is None and not options.restore:
        parser.error("name COMFYUI_DIR, or --restore")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        if options.restore:
            measure_restore(Path(base) / "queue.sqlite3", options.restore)
        else:
            raise SystemExit(run(options, Path(base)))


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


def run(options: argparse.Namespace, base: Path) -> int:
    """Run all trials, and print what came of them also when the time or a signal ends them; the exit status."""
    kills = Kills(options.kills, options.budget_s)
    trials = []
    for number in range(options.at_once):
        (home := base / str(number)).mkdir()
        trials.append(Trial(options.comfyui, home, options.seed + number, kills))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    try:
        for trial in trials:
            trial.start()
        await_end(trials, kills)
    finally:
        status = report(trials, kills)
        for trial in trials:
            with suppress(HostServerError):
                trial.server.stop(signal_number=signal.SIGKILL)
    return status


def await_end(trials: list[Trial], kills: Kills) -> None:
    told = kills.began
    while any(trial.is_alive() for trial in trials) and time.monotonic() < kills.ends_at:
        time.sleep(0.5)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{told - kills.began:5.0f} s  {kills.done} kills", flush=True)


def report(trials: list[Trial], kills: Kills) -> int:
    total: Counter[str] = Counter()
    for number, trial in enumerate(trials):
        if trial.figures is None:
            total[UNTOLD] += 1
            log = "" if trial.failure else f"; its log ends with\n{trial.server.log()[-1000:]}"
            print(f"server {number} did not come to its end: {trial.failure or 'the time was up'}{log}")
        for name, figure in (trial.figures or {}).items():
            total[name] += figure
    print(f"{kills.done:6d} kills of {len(trials)} servers in {time.monotonic() - kills.began:.0f} s")
    for name, figure in total.items():
        print(f"{figure:6d} {name}", flush=True)
    return int(any(total[name] for name in FORBIDDEN))


if __name__ == "__main__":
    main()
