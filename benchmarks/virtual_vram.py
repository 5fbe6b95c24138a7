"""Virtual VRAM against what ComfyUI itself does when a model does not fit, on one GPU, whole jobs over HTTP.

    python benchmarks/virtual_vram.py COMFYUI_DIR [--models sdxl,flux] [--shares 50,90,25] [--budget-s 230]

Makes full-size models of random weights (benchmarks/full_size.py). For each model and each share of its weights that
lives on the CPU, it times a job on the plain loader, on ours with that share, and on stock ComfyUI with the same share
offloaded by its own means: lowvram, or dynamic VRAM where the host has it on (the test node CPTHostOffload gives it as
much VRAM for weights). A column each:

    s/image   of a job of `--steps` steps, by the times in its history; the best of two
    s/step    of steps alone: the difference between such a job and one of few steps
    GB/s      what is fetched for a step, by its time, and the share of what a pinned copy reached in this run
    freed     VRAM against the plain loader when the job has ended, and how far that is from what was asked
    peak      VRAM while it runs, beyond what was used before

`bytes` says whether the image is the one of the stock host's plain loader. A third server, without copy streams of the
host (`--disable-async-offload`), shows at the first share what fetching ahead is worth. Timings gate nothing. When time
is up the table is printed all the same. `--tiny` proves with small models that all of it works, also on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from budget import Deadline, run_within
from full_size import being_made
from scaling import flux, images_of, started

from tests.host import graph_cases
from tests.host.server import HostServer, HostServerError, without_front_end
from tests.host.workflows import Workflow, node, txt2img

FEW = 4  # steps
MIB = 1 << 20
GB = 1e9
PROBE = 1 << 30  # bytes


@dataclass
class Row:
    model: str
    what: str
    image_s: float
    step_s: float
    used: int  # VRAM, when the job has ended
    peak: int
    away: int = 0  # bytes that are fetched in each step
    asked: int = 0
    freed: int | None = None
    equal: bool | None = None


@dataclass
class Results:
    pinned: float = 0.0  # bytes per second
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Servers:
    stock: HostServer
    ours: HostServer
    without_streams: HostServer

    @property
    def all(self) -> list[HostServer]:
        return [self.stock, self.ours, self.without_streams]


def main() -> None:
    options, results = parse(), Results()
    run_within(
        options, results.notes, functools.partial(measure_all, results=results), lambda: report(results, options)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--models", default="sdxl,flux")
    parser.add_argument("--shares", default="50,90,25", help="percent of the weights that live on the CPU")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget-s", type=float, default=230)
    parser.add_argument("--cpu", action="store_true", help="with --tiny, on a machine without a GPU")
    parser.add_argument("--tiny", action="store_true", help="small models and images")
    options = parser.parse_args()
    options.comfyui = options.comfyui.resolve()
    options.models = options.models.split(",")
    options.shares = [int(share) for share in options.shares.split(",")]
    return options


def measure_all(
    options: argparse.Namespace, work_dir: Path, stack: ExitStack, deadline: Deadline, *, results: Results
) -> None:
    began = time.monotonic()
    with being_made(options.comfyui, work_dir / "models", options.models, is_tiny=options.tiny) as (models_dir, makers):
        servers = stack.enter_context(all_servers(options, work_dir, models_dir))
        results.pinned = 0.0 if options.cpu else pinned_bytes_per_s()
        print(f"servers started after {time.monotonic() - began:.0f} s", flush=True)
        for index, name in enumerate(options.models):
            if makers and makers[index].wait(max(1.0, deadline.left_s)) != 0:
                results.notes.append(f"{name} could not be made")
                continue
            print(f"{name} is there after {time.monotonic() - began:.0f} s", flush=True)
            measure_model(name, servers, options, deadline, results)


@contextmanager
def all_servers(options: argparse.Namespace, work_dir: Path, models_dir: Path) -> Iterator[Servers]:
    args = without_front_end(work_dir / "front_end")

    def make(name: str, slots: str | None, *more: str) -> HostServer:
        base = work_dir / name
        base.mkdir()
        (base / "models").symlink_to(models_dir, target_is_directory=True)
        env = {"OMP_NUM_THREADS": "1" if options.cpu else "4"}
        return HostServer(options.comfyui, base, slots=slots, env=env, args=[*args, *more], is_cpu=options.cpu)

    slot = "cpu" if options.cpu else "cuda:0"
    servers = Servers(make("stock", None), make("ours", slot), make("no_streams", slot, "--disable-async-offload"))
    with started(servers.all):
        yield servers


def pinned_bytes_per_s() -> float:
    """What this machine copies from pinned memory to its first GPU, by the best of five copies."""
    import torch

    source = torch.empty(PROBE, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PROBE, dtype=torch.uint8, device="cuda:0")
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    del source, target
    torch.cuda.empty_cache()
    return PROBE / min(taken)


# What is run.

Job = Callable[[int, int], Workflow]  # of a seed and a number of steps


def job_of(name: str, is_tiny: bool) -> Job:
    def job(seed: int, steps: int) -> Workflow:
        if is_tiny:
            workflow = graph_cases.sdxl(seed) if name == "sdxl" else tiny_flux(seed)
        elif name == "flux":
            workflow = flux(seed)
        else:
            workflow = txt2img(seed, ckpt="sdxl.safetensors", width=1024, height=1024)
        workflow["sampler"]["inputs"]["steps"] = steps
        return workflow

    return job


def tiny_flux(seed: int) -> Workflow:
    """With the node of a sampler that takes a number of steps."""
    workflow = graph_cases.flux(seed)
    sampler = graph_cases.sdxl(seed)["sampler"]
    sampler["inputs"] |= {"positive": ["positive", 0], "negative": ["positive", 0], "cfg": 1.0}
    kept = {name: workflow[name] for name in ("unet", "text", "positive", "latent", "save")}
    return {**kept, "sampler": sampler}


def placed(workflow: Workflow, share: int) -> Workflow:
    """By our loader: `share` percent of the model live on the CPU."""
    loader = workflow.get("ckpt") or workflow["unet"]
    loader["class_type"] += "DisTorch2MultiGPU"
    loader["inputs"] |= {"expert_mode_allocations": f"cpu,{share}%;slot,{100 - share}%", "eject_models": False}
    return workflow


def offloaded(workflow: Workflow, share: int) -> Workflow:
    """By the host, so much of them."""
    model = workflow["sampler"]["inputs"]["model"]
    workflow["offload"] = node("CPTHostOffload", model=model, percent=float(share))
    workflow["sampler"]["inputs"]["model"] = ["offload", 0]
    return workflow


# Measuring.


def measure_model(
    name: str, servers: Servers, options: argparse.Namespace, deadline: Deadline, results: Results
) -> None:
    job = job_of(name, options.tiny)

    def add(what: str, server: HostServer, change: Callable[[Workflow], Workflow]) -> tuple[Row, Any, list[bytes]]:
        row, entry, images = measure(name, what, server, lambda *of: change(job(*of)), options, deadline)
        results.rows.append(row)
        print(f"{row.model:6}{row.what:32}{row.image_s:8.2f} s/image{row.step_s:8.3f} s/step", flush=True)
        return row, entry, images

    plain, _, expected = add("stock, all on the GPU", servers.stock, lambda workflow: workflow)
    for number, share in enumerate(options.shares):
        if deadline.left_s < 20:
            results.notes.append(f"left out, no time: {name}, {share}% and what follows")
            return
        ours, entry, images = add(f"ours, {share}%", servers.ours, functools.partial(placed, share=share))
        ours.away, ours.asked = sizes_shown(entry, share)
        ours.freed = plain.used - ours.used
        ours.equal = images == expected
        if deadline.left_s < 15:
            continue
        host, _, images = add(f"stock's own, {share}%", servers.stock, functools.partial(offloaded, share=share))
        host.away, host.asked, host.freed = ours.away, ours.asked, plain.used - host.used
        host.equal = images == expected
        if number == 0 and deadline.left_s > 15:
            what, server = f"ours, {share}%, no streams", servers.without_streams
            row, _, images = add(what, server, functools.partial(placed, share=share))
            row.away, row.equal = ours.away, images == expected


def measure(
    name: str, what: str, server: HostServer, job: Job, options: argparse.Namespace, deadline: Deadline
) -> tuple[Row, Any, list[bytes]]:
    """A row, the history entry of the first job, and the images of it."""
    before = settled_bytes(server)
    left_s = max(1.0, deadline.left_s)
    with peak_of(options) as peak:
        first = server.run(job(1, FEW), timeout_s=left_s)  # loads the model
        check(first, what)
        few = min(seconds(server.run(job(seed, FEW), timeout_s=left_s)) for seed in (2, 3))
        many = min(seconds(server.run(job(seed, options.steps), timeout_s=left_s)) for seed in (4, 5))
    used = settled_bytes(server) - before
    row = Row(name, what, many, (many - few) / (options.steps - FEW), used, peak.bytes)
    images = [graph_cases.latents(server, first)] if options.tiny else images_of(server, [first])
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    settled_bytes(server)
    return row, first, images


def check(entry: Any, what: str) -> None:
    if not entry["status"]["completed"]:
        raise HostServerError(f"{what}: {entry['status']}")


def seconds(entry: Any) -> float:
    """How long a job ran, by its own times."""
    check(entry, "a timed job")
    times = {kind: told["timestamp"] for kind, told in entry["status"]["messages"] if "timestamp" in told}
    return float(times["execution_success"] - times["execution_start"]) / 1000


def sizes_shown(entry: Any, share: int) -> tuple[int, int]:
    """The bytes that leave by the plan that the loader shows, and those that were asked for."""
    (text,) = [output["text"] for output in entry["outputs"].values() if "text" in output]
    words = text[-2].split()
    return int(words[0]), int(words[2]) * share // 100


def settled_bytes(server: HostServer) -> int:
    """The GPU's memory in use without what torch keeps for later, once that stays the same."""
    seen: list[int] = []
    end = time.monotonic() + 8
    while len(seen) < 3 or (len(set(seen[-3:])) > 1 and time.monotonic() < end):
        time.sleep(0.15)
        (device, *_) = server.request("GET", "/system_stats")[1]["devices"]
        seen.append(int(device["vram_total"] - device["vram_free"]))
    return seen[-1]


class Peak:
    """The most of the GPU's memory in use, as the driver tells it, beyond what was used at the start."""

    def __init__(self) -> None:
        self.start = self.most = in_use()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        return self.most - self.start

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, in_use())


def in_use() -> int:
    import torch

    free, total = torch.cuda.mem_get_info(0)
    return total - free


class NoPeak:
    bytes = 0


@contextmanager
def peak_of(options: argparse.Namespace) -> Iterator[Peak | NoPeak]:
    if options.cpu:
        yield NoPeak()
        return
    peak = Peak()
    try:
        yield peak
    finally:
        peak.end()


def report(results: Results, options: argparse.Namespace) -> None:
    print(f"\n{options.steps} steps; a pinned copy: {results.pinned / GB:.1f} GB/s")
    titles = ("s/image", "s/step", "GB/s", "of pinned", "freed MiB", "asked", "off by", "peak MiB", "bytes")
    print(f"{'':6}{'':32}" + "".join(f"{title:>11}" for title in titles))
    for row in results.rows:
        rate = row.away / row.step_s if row.away and row.step_s > 0 else None
        cells = [f"{row.image_s:.2f}", f"{row.step_s:.3f}"]
        cells += [f"{rate / GB:.1f}" if rate else "-"]
        cells += [f"{rate / results.pinned:.0%}" if rate and results.pinned else "-"]
        if row.freed is None:
            cells += ["-"] * 3
        else:
            cells += [f"{row.freed / MIB:.0f}", f"{row.asked / MIB:.0f}", f"{row.freed / row.asked - 1:+.1%}"]
        cells += [f"{row.peak / MIB:.0f}", {None: "-", True: "equal", False: "DIFFER"}[row.equal]]
        print(f"{row.model:6}{row.what:32}" + "".join(f"{cell:>11}" for cell in cells))
    for note in results.notes:
        print(note)


if __name__ == "__main__":
    main()
