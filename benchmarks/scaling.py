"""Whole jobs over HTTP on 1..N GPUs: stock ComfyUI on one, N stock processes, and comfy_parallel, in one run.

    python benchmarks/scaling.py COMFYUI_DIR [--models sd15,sdxl,flux] [--devices cuda:0,cuda:1] [--budget-s 560]

Makes full-size models of random weights (benchmarks/full_size.py), starts all servers once, and measures for each
model, in order of importance and until the budget is spent: images per hour and their ratio to one stock process and
to N of them, the GPUs' busy share, the CPU seconds that the server processes spend per image (all of their threads,
in Python and outside), and how long a first job takes: after start, and with a shape that has not been seen. For one
stock process and for one slot, also how long the interpreter is held per image, if py-spy is installed: it decides how
many GPUs one process can feed. The same jobs on both are compared byte for byte. The short table comes last.
`--slots-per-gpu 2` adds a server with that many slots on each GPU, and times those of the first against one.
Stock runs with OMP_NUM_THREADS=4, which is best for it, and N of them with its defaults as well (--stock-defaults
MODEL). Timings gate nothing. `--devices cpu,cpu --tiny` proves on a laptop that all of it works.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

import interpreter
from budget import Deadline, run_within
from full_size import being_made

from tests.host import graph_cases
from tests.host.server import HostServer, HostServerError, without_front_end
from tests.host.workflows import Workflow, node, txt2img

POLL_S = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
HELD_S = 6  # for how long the interpreter is looked at
COMPARED = 3  # images per model
DEFAULTS_S = 60  # what starting N more stock processes and a first job may take
Use = tuple[HostServer, int | None]  # a server and the slot to send jobs to


@dataclass(frozen=True)
class Model:
    """How a model is used: its job, how many are timed per GPU, and another shape of the job."""

    name: str
    job: Callable[[int], Workflow]
    other_shape: Callable[[int], Workflow]
    jobs_per_gpu: int


@dataclass
class Row:
    model: str
    what: str
    images_per_hour: float
    busy_share: float | None
    cpu_s_per_image: float
    held_ms_per_image: float | None = None  # the interpreter

    @property
    def gpus_fed(self) -> float | None:
        """How many GPUs like this one a process can keep at this speed, before it is always in the interpreter."""
        if not self.held_ms_per_image:
            return None
        return 3600 * 1000 / (self.images_per_hour * self.held_ms_per_image)


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    firsts: list[tuple[str, str, float]] = field(default_factory=list)
    equal: dict[str, str] = field(default_factory=dict)  # by model
    notes: list[str] = field(default_factory=list)


@dataclass
class Servers:
    """All servers of a run; `stock` has one process per device."""

    stock: list[HostServer]
    graphs: HostServer
    eager: HostServer
    shared: HostServer | None  # has several slots on each GPU

    @property
    def all(self) -> list[HostServer]:
        return [*self.stock, self.graphs, self.eager, *([self.shared] if self.shared else [])]


def main() -> None:
    options, results = parse(), Results()
    run_within(
        options, results.notes, functools.partial(measure_all, results=results), lambda: report(results, options)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--models", default="sd15,sdxl,flux")
    parser.add_argument("--devices", help="such as cuda:0,cuda:1 or cpu,cpu; all visible GPUs by default")
    parser.add_argument("--stock-defaults", default="sd15", help="the model that N stock processes also run by default")
    parser.add_argument("--slots-per-gpu", type=int, default=1, help="time as many slots of one GPU against one")
    parser.add_argument("--tiny", action="store_true", help="small models and images")
    parser.add_argument("--budget-s", type=float, default=560)
    options = parser.parse_args()
    options.comfyui = options.comfyui.resolve()
    options.devices = options.devices.split(",") if options.devices else all_gpus()
    options.models = options.models.split(",")
    return options


def all_gpus() -> list[str]:
    listed = subprocess.check_output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], text=True)
    return [f"cuda:{index}" for index in range(len(listed.split()))]


# What is run.


def models(is_tiny: bool) -> dict[str, Model]:
    if is_tiny:
        return {
            "sd15": Model("sd15", lambda seed: txt2img(seed), lambda seed: txt2img(seed, width=96), 3),
            "sdxl": Model("sdxl", graph_cases.sdxl, lambda seed: graph_cases.sdxl(seed, batch=2), 2),
            "flux": Model("flux", graph_cases.flux, lambda seed: graph_cases.flux(seed, batch=2), 2),
        }
    size = {"steps": 20, "width": 512, "height": 512}
    large = {"ckpt": "sdxl.safetensors", "steps": 20, "width": 1024, "height": 1024}
    return {
        "sd15": Model(
            "sd15",
            lambda seed: txt2img(seed, ckpt="sd15.safetensors", **size),
            lambda seed: txt2img(seed, ckpt="sd15.safetensors", **{**size, "width": 768}),
            20,
        ),
        "sdxl": Model(
            "sdxl", lambda seed: txt2img(seed, **large), lambda seed: txt2img(seed, **{**large, "width": 1152}), 6
        ),
        "flux": Model("flux", flux, lambda seed: flux(seed, width=1152), 3),
    }


def flux(seed: int, *, width: int = 1024) -> Workflow:
    return {
        "unet": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="flux.safetensors"),
        "text": node("CPTConditioning", seed=seed, tokens=256, width=4096, pooled=768),
        "positive": node("FluxGuidance", conditioning=["text", 0], guidance=3.5),
        "latent": node("EmptySD3LatentImage", width=width, height=1024, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["unet", 0],
            positive=["positive", 0],
            negative=["positive", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=20,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="flux"),
    }


@contextmanager
def all_servers(options: argparse.Namespace, work_dir: Path, models_dir: Path) -> Iterator[Servers]:
    """Started at once, each with an empty base directory."""
    is_cpu = options.devices[0] == "cpu"
    args = without_front_end(work_dir / "front_end")

    def make(name: str, slots: str | None, **env: str | None) -> HostServer:
        base = work_dir / name
        base.mkdir()
        (base / "models").symlink_to(models_dir, target_is_directory=True)
        env["OMP_NUM_THREADS"] = "1" if is_cpu else "4"
        return HostServer(options.comfyui, base, slots=slots, env=env, args=args, is_cpu=is_cpu)

    slots = ",".join(options.devices)
    stock = [make(f"stock{i}", None, **visible(device)) for i, device in enumerate(options.devices)]
    graphs = make("graphs", slots, COMFY_PARALLEL_GRAPHS="auto")
    eager = make("eager", slots, COMFY_PARALLEL_GRAPHS="off")
    per_gpu = options.slots_per_gpu
    shared = make("shared", slots, COMFY_PARALLEL_SLOTS_PER_GPU=str(per_gpu)) if per_gpu > 1 else None
    servers = Servers(stock, graphs, eager, shared)
    with started(servers.all):
        yield servers


def visible(device: str) -> dict[str, str]:
    return {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device.partition(":")[2]}


@contextmanager
def started(servers: Sequence[HostServer]) -> Iterator[None]:
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(HostServer.start, servers))
        yield
    finally:
        stop_all(servers)


def stop_all(servers: Sequence[HostServer]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(HostServer.stop, servers))


def measure_all(
    options: argparse.Namespace, work_dir: Path, stack: ExitStack, deadline: Deadline, *, results: Results
) -> None:
    began = time.monotonic()
    with being_made(options.comfyui, work_dir / "models", options.models, is_tiny=options.tiny) as (models_dir, makers):
        servers = stack.enter_context(all_servers(options, work_dir, models_dir))
        print(f"servers started after {time.monotonic() - began:.0f} s", flush=True)
        known = models(options.tiny)
        made = [maker.wait(max(1.0, deadline.left_s)) == 0 for maker in makers] or [True] * len(options.models)
        print(f"models made after {time.monotonic() - began:.0f} s", flush=True)
        for name, is_made in zip(options.models, made, strict=True):
            if is_made:
                measure_model(known[name], servers, options, deadline, results)
            else:
                results.notes.append(f"{name} could not be made")
        if options.stock_defaults in options.models:
            measure_stock_defaults(known[options.stock_defaults], servers, options, deadline, results)


# Measuring.


def measure_model(
    model: Model, servers: Servers, options: argparse.Namespace, deadline: Deadline, results: Results
) -> None:
    count = len(options.devices)
    first_jobs(model, servers, min(count, 2 if model.jobs_per_gpu >= 10 else 1), deadline, results)
    warm_up(model, servers, count, deadline)
    stock: list[Use] = [(server, None) for server in servers.stock]
    graphs: list[Use] = [(servers.graphs, slot) for slot in range(count)]
    eager: list[Use] = [(servers.eager, slot) for slot in range(count)]
    plan = {ours(count): graphs, processes(1): stock[:1], ours(1): graphs[:1], processes(count): stock}
    plan |= {ours(number): graphs[:number] for number in (2, 4) if number < count}
    for what, uses in plan.items():
        measure(model, what, uses, options, deadline, results)
        if what in (processes(1), ours(1)):
            look_at_interpreter(model, uses[0], deadline, results)
    results.equal[model.name] = compare(model, servers, deadline)
    for what, uses in ((f"{ours(count)}, graphs off", eager), (f"{ours(1)}, graphs off", eager[:1])):
        measure(with_few_jobs(model), what, uses, options, deadline, results)
    measure_shared(model, servers, options, deadline, results)
    steps = [queue["graphs"] for queue in servers.graphs.request("GET", "/queue/all")[1]["queues"]]
    results.notes.append(f"after {model.name}, graph stepping per slot: {steps}")
    for server in servers.all:
        server.request("POST", "/free", {"unload_models": True, "free_memory": True})


def measure_shared(
    model: Model, servers: Servers, options: argparse.Namespace, deadline: Deadline, results: Results
) -> None:
    """Several slots of the first GPU against one of the same server, which has the GPU for itself meanwhile."""
    if servers.shared is None:
        return
    slots: list[Use] = [(servers.shared, slot) for slot in range(options.slots_per_gpu)]
    run(model, [(*use, 2) for use in slots], deadline)
    for uses in (slots, slots[:1], slots):
        what = f"ours, {len(uses)} of {options.slots_per_gpu} slots on one GPU"
        measure(model, what, uses, options, deadline, results, gpus=1)


def with_few_jobs(model: Model) -> Model:
    return replace(model, jobs_per_gpu=max(2, model.jobs_per_gpu // 4))


def ours(slots: int) -> str:
    return f"ours, {slots} slot{'s' if slots > 1 else ''}"


def processes(count: int) -> str:
    return f"stock, {count} process{'es' if count > 1 else ''}"


def first_jobs(model: Model, servers: Servers, gpus: int, deadline: Deadline, results: Results) -> None:
    """On one GPU after the other; who comes first finds the weights' file where it was written, as the others do."""
    for what, job in (("first job", model.job), ("second job", model.job), ("first of a shape", model.other_shape)):
        for gpu in range(gpus):
            for name, use in (
                ("stock", (servers.stock[gpu], None)),
                ("graphs off", (servers.eager, gpu)),
                ("ours", (servers.graphs, gpu)),
            ):
                work = functools.partial(run_jobs, use[0], [(job(new_seed()), use[1])], deadline)
                results.firsts.append((model.name, f"{what}, {name}, GPU {gpu}", timed(work)))
                print("{:6}{:40}{:10.2f} s".format(*results.firsts[-1]), flush=True)


def warm_up(model: Model, servers: Servers, count: int, deadline: Deadline) -> None:
    uses = [(server, None, 2) for server in servers.stock]
    uses += [(server, slot, 2) for server in (servers.graphs, servers.eager) for slot in range(count)]
    run(model, uses, deadline)


def measure_stock_defaults(
    model: Model, servers: Servers, options: argparse.Namespace, deadline: Deadline, results: Results
) -> None:
    """N stock processes with torch's own number of threads. They take the base directories of the others."""
    if deadline.left_s < DEFAULTS_S:
        results.notes.append(f"left out, no time: {model.name}, stock with default threads")
        return
    bases = [server.base_dir for server in servers.stock]
    others = [
        HostServer(
            options.comfyui,
            base,
            slots=None,
            env={"OMP_NUM_THREADS": None, **visible(device)},
            args=[argument for argument in servers.stock[0].args if argument != "--cpu"],
            is_cpu=device == "cpu",
        )
        for base, device in zip(bases, options.devices, strict=True)
    ]
    stop_all(servers.all)
    with started(others):
        run(model, [(server, None, 1) for server in others], deadline)
        uses: list[Use] = [(server, None) for server in others]
        measure(with_few_jobs(model), f"{processes(len(others))}, default threads", uses, options, deadline, results)


def measure(
    model: Model,
    what: str,
    uses: list[Use],
    options: argparse.Namespace,
    deadline: Deadline,
    results: Results,
    *,
    gpus: int | None = None,
) -> None:
    """Time `jobs_per_gpu` jobs on each of these at once, which are on as many GPUs unless `gpus` says otherwise."""
    if deadline.left_s < 5:
        results.notes.append(f"left out, no time: {model.name}, {what}")
        return
    servers = list({id(server): server for server, _ in uses}.values())
    before = sum(map(cpu_seconds, servers))
    with busy_share(options.devices[: gpus or len(uses)]) as busy:
        seconds = timed(lambda: run(model, [(*use, model.jobs_per_gpu) for use in uses], deadline))
    images = model.jobs_per_gpu * len(uses)
    spent = sum(map(cpu_seconds, servers)) - before
    row = Row(model.name, what, 3600 * images / seconds, busy.mean(), spent / images)
    results.rows.append(row)
    print(f"{row.model:6}{row.what:40}{row.images_per_hour:10.0f} images/h", flush=True)


def look_at_interpreter(model: Model, use: Use, deadline: Deadline, results: Results) -> None:
    """Add to the last row how long the interpreter was held. In a run of its own: to look takes time, too."""
    if not interpreter.is_available() or deadline.left_s < 2 * HELD_S or not results.rows:
        results.notes.append(f"left out, no py-spy or no time: {model.name}, how long the interpreter is held")
        return
    row, (server, slot) = results.rows[-1], use
    per_s = row.images_per_hour / 3600
    jobs = [model.job(new_seed()) for _ in range(2 + int(per_s * (HELD_S + 3)))]
    ids = [server.submit(job, slot)["prompt_id"] for job in jobs]
    time.sleep(0.5)  # The requests are answered; none is sent while the interpreter is looked at.
    share = interpreter.held_share(server.pid, HELD_S)
    server.wait(ids, max(1.0, deadline.left_s))
    row.held_ms_per_image = None if share is None else 1000 * share / per_s


def compare(model: Model, servers: Servers, deadline: Deadline) -> str:
    """How many images of the same jobs are the same bytes on stock and on ours."""
    jobs = [model.job(new_seed()) for _ in range(COMPARED)]
    stock, graphs = servers.stock[0], servers.graphs
    expected = images_of(stock, run_jobs(stock, [(job, None) for job in jobs], deadline))
    found = images_of(graphs, run_jobs(graphs, [(job, 0) for job in jobs], deadline))
    return f"{sum(map(bytes.__eq__, expected, found))} of {len(expected)}"


def images_of(server: HostServer, entries: Sequence[Any]) -> list[bytes]:
    saved = [image for entry in entries for output in entry["outputs"].values() for image in output.get("images", ())]
    folder = server.base_dir / "output"
    return [(folder / image["subfolder"] / image["filename"]).read_bytes() for image in saved]


def run(model: Model, uses: Sequence[tuple[HostServer, int | None, int]], deadline: Deadline) -> None:
    """`(server, slot, jobs)` each; return when all have ended."""
    work: dict[int, tuple[HostServer, list[tuple[Workflow, int | None]]]] = {}
    for server, slot, count in uses:
        work.setdefault(id(server), (server, []))[1].extend((model.job(new_seed()), slot) for _ in range(count))
    with ThreadPoolExecutor(len(work)) as pool:
        list(pool.map(lambda server_jobs: run_jobs(*server_jobs, deadline), work.values()))


def run_jobs(server: HostServer, jobs: Sequence[tuple[Workflow, int | None]], deadline: Deadline) -> list[Any]:
    """One small request at a time asks a server whether it is done: what is measured is not to be the asking."""
    ids = [server.submit(job, slot)["prompt_id"] for job, slot in jobs]
    while server.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]:
        if deadline.left_s < 0:
            raise HostServerError(f"no time left for {len(ids)} jobs")
        time.sleep(POLL_S)
    entries = server.wait(ids)
    for job_id, entry in entries.items():
        if not entry["status"]["completed"]:
            raise HostServerError(f"job {job_id} failed: {entry['status']}")
    return [entries[job_id] for job_id in ids]


_seeds = iter(range(1, 1 << 30))


def new_seed() -> int:
    return next(_seeds)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(server: HostServer) -> float:
    """User and system time of all threads of the server's process."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class BusyShare:
    """The share of time in which a GPU computed, as nvidia-smi sees it."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def mean(self) -> float | None:
        return sum(self.samples) / len(self.samples) / 100 if self.samples else None


@contextmanager
def busy_share(devices: Sequence[str]) -> Iterator[BusyShare]:
    busy = BusyShare()
    if devices[0] == "cpu":
        yield busy
        return
    ids = ",".join(device.partition(":")[2] for device in devices)
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    process = subprocess.Popen(["nvidia-smi", "-i", ids, *query], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: busy.samples.extend(int(line) for line in lines if line.strip().isdigit()))
    reader.start()
    try:
        yield busy
    finally:
        process.terminate()
        process.wait()
        reader.join()


# Showing.


def report(results: Results, options: argparse.Namespace) -> None:
    count = len(options.devices)
    print(f"\n{device_names(options.devices)}, {'tiny' if options.tiny else 'full-size'} models of random weights")
    print(f"\n{'':46}{'images/h':>10}{'/ stock':>9}{f'/ {count} stock':>10}{'GPU busy':>10}{'CPU s/image':>13}")
    for row in results.rows:
        one, all_of_them = (rate_of(results, row.model, processes(number)) for number in (1, count))
        print(
            f"{row.model:6}{row.what:40}{row.images_per_hour:10.0f}{ratio(row, one):>9}{ratio(row, all_of_them):>10}"
            f"{'' if row.busy_share is None else f'{row.busy_share:.0%}':>10}{row.cpu_s_per_image:13.3f}"
        )
    print(f"\n{'seconds until the result of one job':46}{'s':>10}")
    for model, what, seconds in results.firsts:
        print(f"{model:6}{what:40}{seconds:10.2f}")
    print(*results.notes, sep="\n")
    report_shortly(results, options)


def report_shortly(results: Results, options: argparse.Namespace) -> None:
    print(f"\n{'':46}{'images/h':>10}{'/ stock':>9}{'ms in Python':>14}{'GPUs fed':>10}{'same bytes':>12}")
    for row in results.rows:
        if row.what not in (processes(1), ours(1), ours(len(options.devices))):
            continue
        held = "" if row.held_ms_per_image is None else f"{row.held_ms_per_image:.0f}"
        fed = "" if row.gpus_fed is None else f"{row.gpus_fed:.1f}"
        equal = results.equal.get(row.model, "") if row.what == ours(1) else ""
        rates = f"{row.images_per_hour:10.0f}{ratio(row, rate_of(results, row.model, processes(1))):>9}"
        print(f"{row.model:6}{row.what:40}{rates}{held:>14}{fed:>10}{equal:>12}", flush=True)


def rate_of(results: Results, model: str, what: str) -> float | None:
    return next((row.images_per_hour for row in results.rows if (row.model, row.what) == (model, what)), None)


def ratio(row: Row, other: float | None) -> str:
    return "" if other is None else f"{row.images_per_hour / other:.2f}"


def device_names(devices: Sequence[str]) -> str:
    if devices[0] == "cpu":
        return f"{len(devices)} x CPU"
    name = subprocess.check_output(["nvidia-smi", "-i", "0", "--query-gpu=name", "--format=csv,noheader"], text=True)
    return f"{len(devices)} x {name.strip()}"


if __name__ == "__main__":
    main()
