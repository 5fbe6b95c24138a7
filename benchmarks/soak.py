"""Runs mixed jobs and faults for a long time, and tells whether memory, descriptors and threads stay flat.

    python benchmarks/soak.py COMFYUI_DIR [--minutes 60] [--slots cpu,cpu] [--gpu] [--seed 1] [--only KINDS] [--stock]

Jobs: small images, progress with previews of steps, workflows that are cached. Faults: nodes that raise in every way,
run out of memory, end their thread, leave settings changed, keep the queue's lock, show what is no JSON; interrupts,
clients that come and go, malformed requests, `POST /free`. What has ended is taken out of the history. Every 15 s:
resident memory (of its own, of mapped files, shared), descriptors and threads of ComfyUI's process, with `--gpu` the
memory in use on its devices. At the end, also when a signal ends it: jobs by outcome, jobs that have not ended,
and of each measure the median of the second quarter of the time against that of the last. Exit status 1 if a job was
lost or the server died. `--stock` and `--only` tell where memory goes: stock runs the sound jobs only.

On one GPU, 10 minutes in all: python benchmarks/soak.py COMFYUI_DIR --gpu --minutes 9
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import outcome, progress, quick
from tests.host.models import cached_models
from tests.host.server import HostServer, HostServerError
from tests.host.workflows import Workflow, node, txt2img

SAMPLE_S = 15.0
MOST_AT_ONCE = 6
LAST_JOBS_S = 60.0
SOUND = {"image": 35, "steps": 15, "quick": 16}  # how many of a hundred jobs are of this kind
FAULTS = ("fails", "raises", "memory", "leaves", "lock", "no json", "one call", "interrupted")
KINDS = {**SOUND, **dict.fromkeys(FAULTS, 34 / len(FAULTS))}
MEMORY = {"RSS MiB": "VmRSS", "of its own MiB": "RssAnon", "of files MiB": "RssFile", "shared MiB": "RssShmem"}


def shown(class_type: str, **inputs: Any) -> Workflow:
    return {"work": node(class_type, **inputs), "out": node("CPTOut", value=["work", 0])}


class Soak:
    """Keeps a server busy, and counts what comes of it."""

    def __init__(self, server: HostServer, chance: random.Random, kinds: Iterable[str] = KINDS) -> None:
        self.server, self.chance = server, chance
        self.failure = ""
        self._kinds = {kind: KINDS[kind] for kind in kinds}
        self.pending: dict[str, str] = {}  # the kind of each job that has not ended, by its id
        self.ended: Counter[tuple[str, str]] = Counter()
        self.samples: list[dict[str, float]] = []
        self.clients = [server.websocket() for _ in range(3)]
        self.refused = 0
        self._choices = {name: self._named(*name) for name in (("CPTRaises", "kind"), ("CPTLeave", "kind"))}

    def _named(self, class_type: str, name: str) -> list[str]:
        info = self.server.request("GET", f"/object_info/{class_type}")[1][class_type]
        found: list[str] = info["input"]["required"][name][0]
        return found

    def make(self) -> tuple[str, Workflow]:
        """A job, two of three of them sound."""
        number = self.chance.getrandbits(48)
        kind = self.chance.choices(list(self._kinds), list(self._kinds.values()))[0]
        if kind == "image":
            return kind, txt2img(number, steps=2)
        if kind == "steps":
            return kind, progress(number, steps=10, ms=10)
        if kind == "quick":
            return kind, quick(number % 50)
        return kind, self.make_fault(kind, number)

    def make_fault(self, kind: str, number: int) -> Workflow:
        choose = self.chance.choice
        if kind == "raises":
            return shown("CPTRaises", kind=choose(self._choices["CPTRaises", "kind"]))
        if kind == "memory":
            return shown("CPTRunsOut", key=str(number), times=number % 3, kind="torch", interrupts=False)
        if kind == "leaves":
            end = choose(("return", "raise", "die"))
            return shown("CPTLeave", kind=choose(self._choices["CPTLeave", "kind"]), end=end)
        if kind == "interrupted":
            return progress(number, steps=1000, ms=10)
        return {
            "fails": shown("CPTFail", message="by soak"),
            "lock": shown("CPTLock", kind="leaves"),
            "no json": {"show": node("CPTNoJson", kind="bytes", how="ui")},
            "one call": shown("CPTLosesDevice", way="one_call_only"),
        }[kind]

    def step(self) -> None:
        """Submit until enough jobs are under way, disturb, and collect what has ended."""
        while len(self.pending) < MOST_AT_ONCE:
            kind, workflow = self.make()
            client = self.chance.choice(self.clients)
            body = {"prompt": workflow, "client_id": client.client_id, "prompt_id": str(uuid.uuid4())}
            headers = {} if self.chance.random() < 0.7 else {"X-TARGET-GPU": str(self.chance.randrange(2))}
            status, reply = self.server.request("POST", "/prompt", body, headers=headers)
            if status != 200:
                self.refused += 1
                print(f"refused: {status} {str(reply)[:200]}")
                break
            self.pending[reply["prompt_id"]] = kind
        self.disturb()
        self.collect()
        time.sleep(0.05)

    def disturb(self) -> None:
        """Interrupts what is meant to be, and now and then something else."""
        for prompt_id, kind in self.pending.items():
            if kind == "interrupted":
                self.server.request("POST", "/interrupt", {"prompt_id": prompt_id})
        dice = self.chance.random()
        if dice < 0.01:
            self.server.request("POST", "/free", {"unload_models": True, "free_memory": True})
        elif dice < 0.03:
            place = self.chance.randrange(3)
            self.clients[place].close()
            self.clients[place] = self.server.websocket()
        elif dice < 0.05:
            self.server.request("POST", "/prompt", data=b'{"prompt": {"1": ')
        elif dice < 0.07:
            self.server.request("POST", "/parallel/resume", {})

    def collect(self) -> None:
        """Note which jobs have ended, and take them out of the history, which is bounded only at 10,000 entries."""
        for prompt_id, kind in list(self.pending.items()):
            entry = self.server.request("GET", f"/history/{prompt_id}")[1].get(prompt_id)
            if entry is not None:
                self.ended[kind, outcome(entry)] += 1
                del self.pending[prompt_id]
                self.server.request("POST", "/history", {"delete": [prompt_id]})

    def sample(self, *, is_gpu: bool) -> None:
        """Measure the server's process."""
        proc = Path(f"/proc/{self.server.pid}")
        told = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        now = {name: int(told[field].split()[0]) / 1024 for name, field in MEMORY.items()}
        now |= {"descriptors": len(list((proc / "fd").iterdir())), "threads": int(told["Threads"])}
        if is_gpu:
            slots = self.server.request("GET", "/queue/all")[1]["queues"]
            vram = {slot["device"]: slot["vram"] for slot in slots if slot["vram"]}
            now["VRAM MiB"] = sum(one["total_bytes"] - one["free_bytes"] for one in vram.values()) / 2**20
        self.samples.append(now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--slots", help="cpu,cpu; with --gpu cuda:0,cuda:0")
    parser.add_argument("--gpu", action="store_true", help="slots are on GPUs; measure their memory too")
    parser.add_argument("--only", help=f"jobs of these kinds, as in {','.join(KINDS)}")
    parser.add_argument("--stock", action="store_true", help="without our scheduler, sound jobs only, to compare")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    kinds = options.only.split(",") if options.only else SOUND if options.stock else KINDS
    if unknown := set(kinds) - set(SOUND if options.stock else KINDS):
        parser.error(f"no such jobs here: {', '.join(sorted(unknown))}")
    slots = options.slots or ("cuda:0,cuda:0" if options.gpu else "cpu,cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        home = Path(base) / "host"
        home.mkdir()
        models = cached_models(options.comfyui, Path.home() / ".cache" / "comfy_parallel")
        (home / "models").symlink_to(models, target_is_directory=True)
        slots_or_none = None if options.stock else slots
        with HostServer(options.comfyui, home, slots=slots_or_none, is_cpu=not options.gpu) as server:
            soak = Soak(server, random.Random(options.seed), kinds)
            try:
                run(soak, options.minutes * 60, is_gpu=options.gpu)
            except (OSError, HostServerError) as error:  # It has died; what was counted is told all the same.
                soak.failure = f"{type(error).__name__}: {error}\n{server.log()[-2000:]}"
            finally:
                status = report(soak)
    raise SystemExit(status)


def run(soak: Soak, seconds: float, *, is_gpu: bool) -> None:
    """Submit jobs for so long, then wait for those that have not ended."""
    began = sampled = time.monotonic()
    pause = min(SAMPLE_S, seconds / 40)
    while time.monotonic() - began < seconds:
        soak.step()
        if time.monotonic() - sampled >= pause:
            sampled = time.monotonic()
            soak.sample(is_gpu=is_gpu)
            if len(soak.samples) % 8 == 0:
                minutes, jobs = (sampled - began) / 60, sum(soak.ended.values())
                shown = "  ".join(f"{name} {value:.0f}" for name, value in soak.samples[-1].items())
                print(f"{minutes:5.1f} min  {jobs} jobs  {shown}", flush=True)
    deadline = time.monotonic() + LAST_JOBS_S
    while soak.pending and time.monotonic() < deadline:
        soak.disturb()
        soak.collect()
        time.sleep(0.2)


def report(soak: Soak) -> int:
    """Print what came of it; the exit status."""
    for (kind, end), count in sorted(soak.ended.items()):
        print(f"{count:6d} {kind}: {end}")
    print(f"{sum(soak.ended.values()):6d} jobs in all, {soak.refused} refused, {len(soak.pending)} have not ended")
    quarter = max(1, len(soak.samples) // 4)
    for name in soak.samples[0] if soak.samples else ():
        values = [sample[name] for sample in soak.samples]
        early, late = statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])
        print(f"{name}: second quarter {early:.0f}, last quarter {late:.0f}, most {max(values):.0f}", flush=True)
    if soak.failure:
        print(f"it ended early: {soak.failure}", flush=True)
    return int(bool(soak.pending or soak.refused or soak.failure))


if __name__ == "__main__":
    main()
