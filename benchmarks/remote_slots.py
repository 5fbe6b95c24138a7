"""Two ComfyUIs on machines of their own (network namespaces) as slots of a third. Needs root, `ip`, and no GPU.

    python benchmarks/remote_slots.py FRONT_DIR REMOTE_DIR [--remote-python PYTHON] [--front-python PYTHON] [--jobs 24]

Compares images with those of the front's own slot, interrupts, takes a machine off the network in the middle of
a job and brings it back, asks for a model that one lacks, and measures the throughput of both remotes against one. One
remote is stock, the other has this package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.jobs import hold, outcome, progress, start_held
from tests.host.models import cached_models
from tests.host.server import NODES_DIR, HostServer
from tests.host.workflows import Workflow, node, txt2img

HERE, STOCK, OURS = 0, 1, 2
LIMIT_S = 180.0
JOB_S = 0.5


class Machine:
    """A network namespace `number`, joined to this one by a pair of devices."""

    def __init__(self, number: int) -> None:
        self.name, self._link = f"comfy{number}", f"comfy{number}-here"
        self.address, self._ours = f"10.77.{number}.2", f"10.77.{number}.1"

    @contextmanager
    def made(self) -> Iterator[Machine]:
        run("ip", "netns", "add", self.name)
        try:
            inside = ("ip", "netns", "exec", self.name, "ip")
            run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "there", "netns", self.name)
            run("ip", "address", "add", f"{self._ours}/24", "dev", self._link)
            run("ip", "link", "set", self._link, "up")
            run(*inside, "address", "add", f"{self.address}/24", "dev", "there")
            run(*inside, "link", "set", "there", "up")
            run(*inside, "link", "set", "lo", "up")
            yield self
        finally:
            run("ip", "netns", "delete", self.name)

    def join(self, is_joined: bool) -> None:
        """Plug the cable in, or pull it out."""
        run("ip", "link", "set", self._link, "up" if is_joined else "down")


class Remote(HostServer):
    """A host in a namespace, run by a Python of its own."""

    def __init__(self, machine: Machine, python: str, *args: Any, **options: Any) -> None:
        self._machine, self._python = machine, python
        super().__init__(*args, **options)

    @property
    def url(self) -> str:
        return f"http://{self._machine.address}:{self.port}"

    def _command(self) -> list[str]:
        command = [self._python, *super()._command()[1:], "--listen", self._machine.address]
        return ["ip", "netns", "exec", self._machine.name, *command]


class Front(HostServer):
    """A host run by a Python of its own."""

    def __init__(self, python: str, *args: Any, **options: Any) -> None:
        self._python = python
        super().__init__(*args, **options)

    def _command(self) -> list[str]:
        return [self._python, *super()._command()[1:]]


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def eventually(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(what)
        time.sleep(0.05)


def slots(front: HostServer) -> Any:
    return front.request("GET", "/queue/all")[1]["queues"]


def check(holds: object, what: str) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        raise SystemExit(1)


def images(front: HostServer, entry: Any) -> list[bytes]:
    told = entry["outputs"]["save"]["images"]
    return [(front.base_dir / "output" / one["subfolder"] / one["filename"]).read_bytes() for one in told]


def compare(front: HostServer) -> None:
    """Images are the same wherever the job ran; previews come; a model that is missing is told."""
    entries = [front.run(txt2img(11, prefix="same"), slot) for slot in (HERE, STOCK, OURS)]
    made = [images(front, entry) for entry in entries]
    is_same = made[STOCK] == made[HERE] and made[OURS] == made[HERE]
    told = "the same bytes" if is_same else f"of sizes {[len(one[0]) for one in made]}"
    print(f"{'ok  ' if is_same else 'note'} images of the three: {told}", flush=True)
    for slot in (STOCK, OURS):
        with front.websocket() as client:
            job_id = front.submit(progress(slot), slot, client.client_id)["prompt_id"]
            client.wait_for_end(job_id, LIMIT_S)
            check(len(client.frames) == 3, f"three previews from slot {slot}")
    lacking = txt2img(12, ckpt="b.safetensors")
    reply = front.request("POST", "/prompt", {"prompt": lacking}, headers={"X-TARGET-GPU": str(STOCK)})[1]
    check("no model b.safetensors" in json.dumps(reply), f"a model that is missing: {reply['error']['message']}")


def interrupt(front: HostServer) -> None:
    with front.websocket() as client:
        for slot in (STOCK, OURS):
            job_id = start_held(front, client, slot, slot)
            began = time.monotonic()
            front.request("POST", "/interrupt", {"prompt_id": job_id})
            entry = front.wait([job_id], LIMIT_S)[job_id]
            took_s = time.monotonic() - began
            check(outcome(entry) == "interrupted", f"an interrupt reached slot {slot} within {took_s:.2f} s")


def pull_the_cable(front: HostServer, machine: Machine) -> None:
    """A machine that is out of reach in the middle of a job loses it to another slot, and is used again later."""
    front.request("POST", "/parallel/pause", {"gpu_ids": [HERE]})
    with front.websocket() as client:
        kept = start_held(front, client, OURS, 1)
        moved = front.submit(hold(2), client_id=client.client_id)["prompt_id"]
        eventually(lambda: slots(front)[STOCK]["running"] == [moved], "the job is not on the stock machine")
        began = time.monotonic()
        machine.join(False)
        front.request("POST", "/parallel/resume", {"gpu_ids": [HERE]})
        eventually(lambda: slots(front)[HERE]["running"] == [moved], "no other slot took the job")
        check(True, f"a machine that is gone: another slot has its job after {time.monotonic() - began:.1f} s")
        bound = front.submit(progress(99), STOCK)["prompt_id"]
        machine.join(True)
        began = time.monotonic()
        check(outcome(front.wait([bound], LIMIT_S)[bound]) == "success", "it takes jobs again when it is back")
        print(f"     after {time.monotonic() - began:.1f} s", flush=True)
        for job_id in (kept, moved):
            front.request("POST", "/interrupt", {"prompt_id": job_id})
        ends = [outcome(entry) for entry in front.wait([kept, moved], LIMIT_S).values()]
        check(ends == ["interrupted"] * 2, "no job was lost")


def throughput(front: HostServer, count: int) -> None:
    """Jobs of a fixed time each, which save a picture of 512x512: what the way there costs."""

    def work(number: int) -> Workflow:
        image = node("EmptyImage", width=512, height=512, batch_size=1, color=number)
        save = node("SaveImage", images=["image", 0], filename_prefix="rate")
        return {**progress(number, steps=10, ms=int(JOB_S * 100)), "image": image, "save": save}

    rates = []
    for closed in ([HERE, OURS], [HERE]):
        front.request("POST", "/parallel/resume", {})
        front.request("POST", "/parallel/pause", {"gpu_ids": closed})
        began = time.monotonic()
        ids = [front.submit(work(len(rates) * 1000 + number))["prompt_id"] for number in range(count)]
        entries = front.wait(ids, LIMIT_S)
        rates.append(count / (time.monotonic() - began))
        check(
            {outcome(entry) for entry in entries.values()} == {"success"},
            f"{count} jobs with {3 - len(closed)} remotes",
        )
    front.request("POST", "/parallel/resume", {})
    print(
        f"jobs of {JOB_S} s each second: one remote {rates[0]:.2f} ({rates[0] * JOB_S:.0%} of what it could be), "
        f"two {rates[1]:.2f}, {rates[1] / rates[0]:.2f} times as many",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("front", type=Path)
    parser.add_argument("remote", type=Path)
    parser.add_argument("--front-python", default=sys.executable)
    parser.add_argument("--remote-python", default=sys.executable)
    parser.add_argument("--jobs", type=int, default=24)
    options = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remote_slots_")))
        models = cached_models(options.front, home)
        machines = [stack.enter_context(Machine(number).made()) for number in (1, 2)]
        checkpoints = home / "stock" / "models" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "a.safetensors").symlink_to(models / "checkpoints" / "a.safetensors")
        for name in ("ours", "front"):
            (home / name).mkdir()
            (home / name / "models").symlink_to(models, target_is_directory=True)
        stock = Remote(
            machines[0],
            options.remote_python,
            options.remote,
            home / "stock",
            slots=None,
            link=False,
            packs=[NODES_DIR],
        )
        ours = Remote(machines[1], options.remote_python, options.remote, home / "ours", slots="cpu")
        stack.enter_context(stock)
        stack.enter_context(ours)
        env = {"COMFY_PARALLEL_REMOTE": f"{stock.url},{ours.url}"}
        front = Front(options.front_python, options.front, home / "front", slots="cpu", env=env)
        stack.enter_context(front)
        eventually(lambda: all(one["worker"]["state"] == "ready" for one in slots(front)[1:]), "no remote is ready")
        compare(front)
        interrupt(front)
        pull_the_cable(front, machines[0])
        throughput(front, options.jobs)


if __name__ == "__main__":
    main()
