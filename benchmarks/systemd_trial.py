"""The shipped service under a real systemd: start, kill -9, stop while jobs run, start again, a wrong setting.

    python benchmarks/systemd_trial.py COMFYUI_DIR

systemd is the first process of namespaces of its own (tests/deploy/real_systemd.py), so that it neither needs nor
touches that of the machine; root is needed. ComfyUI has two CPU slots. Each step prints what systemd and ComfyUI say;
the exit status is 1 when one of them is not as docs/configuration.md promises. About two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from tests.deploy.real_systemd import UNIT, Systemd, running_systemd
from tests.host.jobs import progress, quick
from tests.ports import free_port

LIMIT_S = 240.0
SETTINGS = {"COMFY_PARALLEL_DEVICES": "cpu,cpu", "COMFYUI_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
Ids = list[str]


class Trial:
    """One server under systemd, and what was found to be wrong."""

    def __init__(self, systemd: Systemd, port: int) -> None:
        self.systemd = systemd
        self.url = f"http://127.0.0.1:{port}"
        self.wrong: list[str] = []

    def expect(self, what: str, found: object, expected: object) -> None:
        print(f"  {what}: {found}")
        if found != expected:
            self.wrong.append(f"{what}: {found}, not {expected}")

    def request(self, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as reply:
            return json.loads(reply.read() or b"null")

    def await_ready(self) -> float:
        """Seconds until the server takes jobs."""
        began = time.monotonic()
        while time.monotonic() - began < LIMIT_S:
            try:
                self.request("/ready")
                return time.monotonic() - began
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        raise SystemExit(f"the server is not ready after {LIMIT_S} s\n{self.systemd.output()[-4000:]}")

    def submit(self, prompt: Any, slot: int) -> str:
        return str(self.request("/prompt", {"prompt": prompt}, **{"X-TARGET-GPU": str(slot)})["prompt_id"])

    def submit_all(self, *, steps: int) -> Ids:
        """A job that runs on each slot, and three that wait for it."""
        running = [self.submit(progress(int(time.time() * 1000) + slot, steps=steps, ms=100), slot) for slot in (0, 1)]
        while sum(len(slot["running"]) for slot in self.request("/queue/all")["queues"]) < 2:
            time.sleep(0.05)
        return [*running, *(self.submit(quick(int(time.time() * 1e6) % 10**9), slot) for slot in (0, 1, 0))]

    def outcomes(self, ids: Ids) -> list[str]:
        """How jobs ended, once all have."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            history = self.request("/history")
            if set(ids) <= history.keys():
                return [history[one]["status"]["status_str"] for one in ids]
            time.sleep(0.1)
        raise SystemExit(f"jobs are lost: {set(ids) - history.keys()}")


def starts(trial: Trial) -> None:
    began = time.monotonic()
    trial.systemd.ctl("start", UNIT)
    trial.await_ready()
    print(f"start\n  ready after {time.monotonic() - began:.1f} s")
    pid = trial.systemd.properties("MainPID")["MainPID"]
    status = trial.systemd.run("cat", f"/proc/{pid}/status")
    facts = {
        name: value.split()[0] for name, _, value in (line.partition(":") for line in status.splitlines()) if value
    }
    shown = {name: facts[name] for name in ("Uid", "NoNewPrivs", "Seccomp", "CapEff")}
    trial.expect("user, privileges", shown, {"Uid": "12345", "NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16})
    trial.expect("a job", trial.outcomes([trial.submit(quick(1), 1)]), ["success"])


def killed(trial: Trial) -> None:
    print("kill -9 with two jobs running and three waiting")
    ids = trial.submit_all(steps=60)
    trial.systemd.ctl("kill", "--signal=SIGKILL", "--kill-who=main", UNIT)
    began = time.monotonic()
    trial.systemd.await_state("active", timeout_s=LIMIT_S)
    trial.await_ready()
    print(f"  ready again after {time.monotonic() - began:.1f} s, of which the unit waits 10")
    trial.expect("restarts", trial.systemd.properties("NRestarts")["NRestarts"], "1")
    trial.expect("the five jobs", trial.outcomes(ids), ["success"] * 5)


def stopped(trial: Trial) -> None:
    print("stop with two jobs of 6 s running and three waiting")
    ids = trial.submit_all(steps=60)
    began = time.monotonic()
    trial.systemd.ctl("stop", UNIT)
    took_s = time.monotonic() - began
    print(f"  stopped after {took_s:.1f} s")
    found = trial.systemd.properties("Result", "ActiveState", "NRestarts")
    trial.expect("state", found["ActiveState"], "inactive")
    trial.expect("result", found["Result"], "success")
    trial.expect("it waited for what ran, and not for its limit", 3 < took_s < 60, True)
    trial.systemd.ctl("start", UNIT)
    trial.await_ready()
    trial.expect(
        "those that ran have ended before", sorted(trial.request("/history").keys() & set(ids[:2])), sorted(ids[:2])
    )
    trial.expect("the five jobs", trial.outcomes(ids), ["success"] * 5)


def wrongly_set(trial: Trial) -> None:
    print("a wrong setting")
    trial.systemd.ctl("stop", UNIT)
    trial.systemd.run(
        "sh", "-c", "sed -i 's/^COMFY_PARALLEL_DEVICES=.*/COMFY_PARALLEL_DEVICES=gpu,gpu/' /etc/comfy-parallel.env"
    )
    trial.systemd.ctl("start", UNIT, check=False)
    trial.systemd.await_state("failed", timeout_s=LIMIT_S)
    found = trial.systemd.properties("ExecMainStatus", "NRestarts")
    trial.expect("status, restarts", found, {"ExecMainStatus": "2", "NRestarts": "0"})
    print(f"  its last words: {trial.systemd.output().strip().splitlines()[-1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_DIR")
    comfyui = parser.parse_args().comfyui.resolve()
    port = free_port()
    arguments = f"--cpu --listen 127.0.0.1 --port {port} --disable-api-nodes"
    nodes = REPO_DIR / "tests" / "host" / "nodes"
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SETTINGS, "COMFYUI_ARGS": arguments}
        with running_systemd(Path(folder), comfyui, settings, nodes=nodes) as systemd:
            trial = Trial(systemd, port)
            for step in (starts, killed, stopped, wrongly_set):
                step(trial)
    print("\n".join(["", *(trial.wrong or ["all as promised"])]))
    return bool(trial.wrong)


if __name__ == "__main__":
    sys.exit(main())
