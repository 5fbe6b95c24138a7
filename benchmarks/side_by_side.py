"""Whole jobs on one GPU by several servers, which take turns: hosts, versions of comfy_parallel, and stock.

    python benchmarks/side_by_side.py stock@HOST_DIR ours@HOST_DIR stock@OTHER_HOST ours*2@OTHER_HOST OLD_TREE@HOST_DIR
        [--models sdxl,sd15,flux] [--vram-left-gib 12] [--models-dir DIR] [--rounds 2] [--budget-s 300]

Each server is named by what runs in it (`stock`, `ours`, or the directory of another version of comfy_parallel; `*2`
gives it two slots on the GPU, `+NAME=VALUE` a variable of the environment) and by its ComfyUI. All start at once and
wait; each in its turn loads a model, runs the same jobs, and frees the GPU. The next round goes through them backwards.
The table shows images per hour (the best turn), the ratio to the first server of the same ComfyUI, whose images are
compared byte for byte, the GPU's busy share, the memory that the process needs (MiB), and why steps ran eagerly; for
one slot of ours also how long an image holds the interpreter, if py-spy is installed. `--vram-left-gib` takes so much
memory of the GPU that this is left. Timings gate nothing. `--device cpu --tiny` proves on a laptop that all of it
works.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from budget import Deadline, run_within
from full_size import being_made
from scaling import (
    Model,
    Results,
    Row,
    busy_share,
    images_of,
    look_at_interpreter,
    models,
    new_seed,
    run,
    run_jobs,
    started,
    timed,
)

from tests.host.server import NODES_DIR, HostServer, HostServerError, without_front_end

COMPARED_SEEDS = (1_000_001, 1_000_002)
MIB = 1 << 20
HOG = """
import sys, torch
left = float(sys.argv[1]) * 2**30
free, _ = torch.cuda.mem_get_info()
taken = torch.empty(int(max(0, free - left)), dtype=torch.uint8, device="cuda")
print(f"{taken.numel() / 2**30:.1f} GiB taken", flush=True)
sys.stdin.read()
"""


@dataclass
class Turns:
    """What one server did with one model."""

    seconds_per_image: list[float] = field(default_factory=list)
    busy: float | None = None
    used_mib: int = 0
    images: list[bytes] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)
    held_ms: float | None = None  # the interpreter, per image


@dataclass
class Contender:
    name: str
    host_dir: Path
    server: HostServer
    slots: int
    turns: dict[str, Turns] = field(default_factory=dict)


def main() -> None:
    options = parse()
    contenders: list[Contender] = []
    notes: list[str] = []
    run_within(
        options,
        notes,
        functools.partial(measure_all, contenders=contenders),
        lambda: report(contenders, options, notes),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="WHAT@COMFYUI_DIR")
    parser.add_argument("--models", default="sdxl,sd15,flux")
    parser.add_argument("--models-dir", type=Path, help="kept; models that it lacks are made")
    parser.add_argument("--vram-left-gib", type=float)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small models and images")
    parser.add_argument("--budget-s", type=float, default=300)
    options = parser.parse_args()
    options.models = options.models.split(",")
    if any("@" not in server for server in options.servers):
        parser.error("name each server as stock@COMFYUI_DIR, ours@COMFYUI_DIR or TREE@COMFYUI_DIR")
    return options


def make(named: str, options: argparse.Namespace, work_dir: Path, models_dir: Path) -> Contender:
    what, _, host = named.partition("@")
    what, *assignments = what.split("+")
    tree, _, count = what.partition("*")
    env = dict(assignment.split("=", 1) for assignment in assignments)
    slots, host_dir = int(count or 1), Path(host).resolve()
    base = work_dir / "_".join([host_dir.name, Path(tree).name, count, *env])
    base.mkdir()
    (base / "models").symlink_to(models_dir, target_is_directory=True)
    is_cpu = options.device == "cpu"
    server = HostServer(
        host_dir,
        base,
        slots=None if tree == "stock" else ",".join([options.device] * (slots if is_cpu else 1)),
        env={"OMP_NUM_THREADS": "1" if is_cpu else "4", "COMFY_PARALLEL_SLOTS_PER_GPU": str(slots), **env},
        args=without_front_end(work_dir / "front_end"),
        link=tree in ("stock", "ours"),
        packs=() if tree in ("stock", "ours") else linked(Path(tree).resolve(), work_dir),
        is_cpu=is_cpu,
    )
    name = " ".join([Path(tree).name, *([f"x{slots}"] if slots > 1 else []), *assignments])
    return Contender(name, host_dir, server, slots)


def linked(tree: Path, work_dir: Path) -> list[Path]:
    """Another version under the name that a custom node of this project has, and the test nodes of this one."""
    folder = work_dir / f"packs_{tree.name}"
    folder.mkdir(exist_ok=True)
    links = {"comfy_parallel": tree, "comfy_parallel_test_nodes": NODES_DIR}
    for name, target in links.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target, target_is_directory=True)
    return [folder / name for name in links]


@contextmanager
def memory_taken(left_gib: float | None) -> Iterator[None]:
    if left_gib is None:
        yield
        return
    command = [sys.executable, "-c", HOG, str(left_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            print(process.stdout.readline().strip(), flush=True)
            yield
        finally:
            process.kill()


def measure_all(
    options: argparse.Namespace,
    work_dir: Path,
    stack: ExitStack,
    deadline: Deadline,
    *,
    contenders: list[Contender],
) -> None:
    comfyui, models_dir = (
        Path(options.servers[0].partition("@")[2]).resolve(),
        options.models_dir or work_dir / "models",
    )
    making = being_made(comfyui, models_dir.resolve(), options.models, is_tiny=options.tiny)
    models_dir, makers = stack.enter_context(making)
    if any(maker.wait(max(1.0, deadline.left_s)) for maker in makers):
        raise HostServerError("a model could not be made")
    contenders += [make(one, options, work_dir, models_dir) for one in options.servers]
    stack.enter_context(started([one.server for one in contenders]))
    stack.enter_context(memory_taken(options.vram_left_gib))
    known = models(options.tiny)
    for name in options.models:
        for number in range(options.rounds):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                if deadline.left_s < 10:
                    print(f"left out, no time: {name}, round {number + 1}, {contender.name} {contender.host_dir.name}")
                    continue
                take_turn(contender, known[name], options, deadline)


def take_turn(contender: Contender, model: Model, options: argparse.Namespace, deadline: Deadline) -> None:
    server, turns = contender.server, contender.turns.setdefault(model.name, Turns())
    slots = range(contender.slots) if server.slots else [None]
    uses = [(server, slot) for slot in slots]
    if not turns.images:
        jobs = [(model.job(seed), slots[0]) for seed in COMPARED_SEEDS]
        turns.images = images_of(server, run_jobs(server, jobs, deadline))
    run(model, [(*use, 2) for use in uses], deadline)
    with busy_share([options.device]) as busy:
        seconds = timed(lambda: run(model, [(*use, model.jobs_per_gpu) for use in uses], deadline))
    images = model.jobs_per_gpu * len(uses)
    turns.seconds_per_image.append(seconds / images)
    turns.busy, turns.used_mib = busy.mean(), server.used_bytes // MIB
    if server.slots:
        turns.steps = server.request("GET", "/queue/all")[1]["queues"][0]["graphs"]
    if contender.name == "ours" and turns.held_ms is None:
        row = Row(model.name, contender.name, 3600 * images / seconds, None, 0.0)
        look_at_interpreter(model, uses[0], deadline, Results([row]))
        turns.held_ms = row.held_ms_per_image
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    run_jobs(server, [(nothing(), None)], deadline)  # /free is done when the worker has had its turn
    label = f"{contender.name} {contender.host_dir.name}"
    print(f"{model.name:6}{label:44}{images / seconds * 3600:10.0f} images/h", flush=True)


def nothing() -> dict[str, Any]:
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": new_seed()}}
    return {"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}


def report(contenders: list[Contender], options: argparse.Namespace, notes: list[str]) -> None:
    print(*notes, sep="\n")
    print(f"\n{'':50}{'images/h':>10}{'ratio':>8}{'busy':>6}{'MiB':>8}{'same bytes':>12}  seconds a job, by turns")
    for name in options.models:
        for one in contenders:
            if name in one.turns and one.turns[name].seconds_per_image:
                show(name, one, next(first for first in contenders if first.host_dir == one.host_dir))


def show(model: str, one: Contender, first: Contender) -> None:
    turns, base = one.turns[model], first.turns[model]
    best, best_base = min(turns.seconds_per_image), min(base.seconds_per_image)
    same = sum(map(bytes.__eq__, turns.images, base.images))
    busy = "" if turns.busy is None else f"{turns.busy:.0%}"
    label = f"{one.name} {one.host_dir.name}"
    turn_by_turn = " ".join(f"{seconds:.2f}" for seconds in turns.seconds_per_image)
    print(
        f"{model:6}{label:44}{3600 / best:10.0f}{best_base / best:8.2f}{busy:>6}{turns.used_mib:8}"
        f"{f'{same} of {len(turns.images)}':>12}  {turn_by_turn}"
    )
    if turns.steps:
        held = "" if turns.held_ms is None else f"interpreter held {turns.held_ms:.0f} ms an image; "
        print(f"      {held}{turns.steps}"[:400], flush=True)


if __name__ == "__main__":
    main()
