"""What weights cost: memory with 1 to N slots, and time to switch models, stock ComfyUI beside comfy_parallel.

    python benchmarks/weights.py COMFYUI_DIR [--devices cuda:0,cuda:1,… | cpu,cpu,cpu,cpu]
        [--only memory|loading|alternating] [--slots-per-gpu N] [--models-dir DIR]

Memory is the host process's proportional set size after one image on each slot, with one model, after two models in
turns, and after ten images more. On CPU slots a switch is a job that loads the other model and decodes one small
latent image with its VAE. On GPUs, with full-size models of random weights (benchmarks/full_size.py), ComfyUI's own
functions load and unload an SDXL and a Flux-shaped model: from RAM, from another GPU that holds it, and on all slots
at once, of which a GPU has --slots-per-gpu. The models are kept in --models-dir, if it is given.

--only alternating: whole jobs on one GPU, with an SDXL- and an SD1.5-shaped model in turns, where ComfyUI unloads each
model before it loads another (--disable-smart-memory) and keeps what it has read (--cache-lru).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from full_size import start_making

from tests.host.models import cached_models
from tests.host.server import HostServer, without_front_end
from tests.host.workflows import Workflow, node, txt2img

CPU_MODELS = ("a.safetensors", "wide.safetensors")  # a small one and a large one
GPU_MODELS = ("sd15.safetensors", "sdxl.safetensors")
LOADED = {
    "sdxl": node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors"),
    "flux": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
}
ALTERNATING = {"sdxl.safetensors": 1024, "sd15.safetensors": 512}  # and the size of their images
UNLOADING = ("--disable-smart-memory", "--cache-lru", "20")
PAIRS = 10  # of jobs with two models in turns, after two that warm up
SWITCHES = 6
ROUNDS = 11
STOCK_ROUNDS = {"sdxl": 5, "flux": 1}  # Stock takes 20 s for one of Flux.
RAM_GB = "64"  # for the Flux-shaped model's 24 GB and the others
GIB = 1 << 30
_seeds = itertools.count(1)


def main() -> None:
    options = parse()
    devices = options.devices.split(",")
    counts = [count for count in (1, 2, 4, 8) if count <= len(devices)]
    with tempfile.TemporaryDirectory() as made:
        if devices[0] == "cpu":
            compare_memory(options.comfyui, cpu_models(options.comfyui), devices, counts, CPU_MODELS)
        else:
            models = gpu_models(options.comfyui, options.models_dir or Path(made))
            if options.only in (None, "loading"):
                compare_loading(options.comfyui, models, devices, options.slots_per_gpu)
            if options.only == "alternating":
                compare_alternating(options.comfyui, models, devices)
            if options.only in (None, "memory"):
                compare_memory(options.comfyui, models, devices, counts, GPU_MODELS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=lambda text: Path(text).resolve())
    parser.add_argument("--devices", default="cpu,cpu,cpu,cpu")
    parser.add_argument("--models-dir", type=lambda text: Path(text).resolve(), help="of full-size models, on GPUs")
    parser.add_argument("--slots-per-gpu", type=int, default=1, help="when models are loaded")
    parser.add_argument("--only", choices=("memory", "loading", "alternating"), help="on GPUs")
    return parser.parse_args()


def cpu_models(comfyui: Path) -> Path:
    cache = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
    return cached_models(comfyui, cache, ("a", "wide"))


def gpu_models(comfyui: Path, models: Path) -> Path:
    codes = [maker.wait() for maker in start_making(comfyui, models, ("sd15", "sdxl", "flux"))]
    if any(codes):
        raise RuntimeError("models could not be made")
    return models


@contextmanager
def started(
    comfyui: Path,
    models: Path,
    devices: list[str],
    slots: str | None,
    slots_per_gpu: int = 1,
    args: Sequence[str] = (),
) -> Iterator[HostServer]:
    """A host on all of these devices, or, where `slots` is None, stock on the first."""
    is_cpu = devices[0] == "cpu"
    env = {} if is_cpu else {"OMP_NUM_THREADS": "4", "COMFY_PARALLEL_WEIGHTS": "map", "COMFY_PARALLEL_RAM_GB": RAM_GB}
    if not is_cpu and slots is None:
        env["CUDA_VISIBLE_DEVICES"] = devices[0].partition(":")[2]
    elif not is_cpu:
        env["COMFY_PARALLEL_SLOTS_PER_GPU"] = str(slots_per_gpu)
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "models").symlink_to(models, target_is_directory=True)
        args = [*without_front_end(Path(base) / "front_end"), *args]
        with HostServer(comfyui, Path(base), slots=slots, args=args, env=env, is_cpu=is_cpu) as server:
            yield server


# Memory, and on CPU slots switches.


@dataclass
class Memory:
    """Of one server. All but `resident` are proportional set sizes, in bytes."""

    name: str
    one: int  # every slot has made an image with the large model
    two: int  # and then with the small one and the large one
    repeated: int  # and then ten more
    resident: int
    switch_s: float | None


def compare_memory(comfyui: Path, models: Path, devices: list[str], counts: list[int], names: tuple[str, str]) -> None:
    rows = []
    for count in (None, *counts):
        slots = None if count is None else ",".join(devices[:count])
        with started(comfyui, models, devices, slots) as server:
            one, two, repeated = (memory_after(server, count, used) for used in (names[1:], names, names * 5))
            can_switch = devices[0] == "cpu" and count in (None, 1)
            seconds = switch_seconds(server, names) if can_switch else None
            name = "stock" if count is None else f"{count} slot(s)"
            rows.append(Memory(name, one, two, repeated, server.rss_bytes, seconds))
    report_memory(rows, counts)


def memory_after(server: HostServer, count: int | None, names: tuple[str, ...]) -> int:
    """Proportional set size once every slot has made an image with each of these checkpoints."""
    for name in names:
        slots = [None] if count is None else range(count)
        ids = [server.submit(txt2img(next(_seeds), ckpt=name, steps=1), slot)["prompt_id"] for slot in slots]
        for entry in server.wait(ids, 300).values():
            assert entry["status"]["completed"], entry["status"]
    return server.used_bytes


def switch_seconds(server: HostServer, names: tuple[str, str]) -> float:
    """The median over jobs that each load the large model after the other."""
    taken = []
    for number in range(2 * SWITCHES):
        began = time.perf_counter()
        server.run(load_and_decode(names[number % 2]))
        if number % 2:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def load_and_decode(name: str) -> Workflow:
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name=name),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "decode": node("VAEDecode", samples=["latent", 0], vae=["ckpt", 2]),
        "save": node("PreviewImage", images=["decode", 0]),
    }


def report_memory(rows: list[Memory], counts: list[int]) -> None:
    print(
        f"\nPSS, MiB:   {'one model':>11}{'two in turns':>14}{'of one slot':>13}{'10 jobs more':>14}"
        f"{'RSS, MiB':>10}{'switch, s':>11}"
    )
    ours = dict(zip(counts, rows[1:], strict=True))
    for row in rows:
        switch = "" if row.switch_s is None else f"{row.switch_s:.2f}"
        print(
            f"{row.name:12}{row.one >> 20:11}{row.two >> 20:14}{row.two / ours[1].two:13.2f}"
            f"{row.repeated / row.two - 1:14.1%}{row.resident >> 20:10}{switch:>11}"
        )
    stock_seconds, our_seconds = rows[0].switch_s, ours[1].switch_s
    if stock_seconds is not None and our_seconds is not None:
        print(f"switching to the large model: stock / ours = {stock_seconds / our_seconds:.1f}")


# Loading onto GPUs and unloading.


def compare_loading(comfyui: Path, models: Path, devices: list[str], slots_per_gpu: int) -> None:
    count = len(devices) * slots_per_gpu
    rows: list[tuple[str, str, dict[str, Any], float]] = []
    with started(comfyui, models, devices, None) as stock:
        for name in LOADED:
            rows.append((name, "stock", load_times(stock, name, None), 1))
    with started(comfyui, models, devices, ",".join(devices), slots_per_gpu) as ours:
        for name in LOADED:
            rows.append((name, "ours, from RAM", load_times(ours, name, 0), 1))
            if len(devices) > 1:
                rows.append((name, "ours, from another GPU", load_times(ours, name, slots_per_gpu), 1))
            free(ours)
            with ThreadPoolExecutor(count) as pool:
                at_once = list(pool.map(lambda slot, name=name: load_times(ours, name, slot, count), range(count)))
            rows.append((name, f"ours, {count} slots at once, each", slowest(at_once), count))
            free(ours)
        print(*ours.request("GET", "/parallel/weights")[1]["slots"], sep="\n")
    report_loading(rows)


def load_times(server: HostServer, name: str, slot: int | None, at_once: int = 1) -> dict[str, Any]:
    """What the test node CPTLoadTimes tells; of stock, where `slot` is None. So many slots begin each load together."""
    rounds = STOCK_ROUNDS[name] if slot is None else ROUNDS
    times = node("CPTLoadTimes", model=["loader", 0], rounds=rounds, jobs_at_once=at_once)
    workflow = {"loader": LOADED[name], "times": times}
    entry = server.run(workflow, slot)
    assert entry["status"]["completed"], entry["status"]
    found: dict[str, Any] = entry["outputs"]["times"]["value"][0]
    return found


def slowest(found: list[dict[str, Any]]) -> dict[str, Any]:
    return max(found, key=lambda times: statistics.median(times["load_s"][1:]))


def free(server: HostServer) -> None:
    """Unload everything on every slot."""
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    deadline = time.monotonic() + 60
    while any(queue["models"] for queue in server.request("GET", "/queue/all")[1]["queues"]):
        if time.monotonic() > deadline:
            raise TimeoutError("models are still loaded")
        time.sleep(0.1)


def report_loading(rows: list[tuple[str, str, dict[str, Any], float]]) -> None:
    """GB/s are 10^9 bytes a second, of all slots together."""
    print(
        f"\n{'':36}{'GiB':>6}{'first s':>9}{'load s':>8}{'unload s':>10}{'GB/s':>7}{'of pinned':>11}"
        f"{'load x':>8}{'unload x':>10}{'switch x':>10}"
    )
    stock = {name: times for name, what, times, _ in rows if what == "stock"}
    for name, what, times, slots in rows:
        load, unload, rate = median(times, "load_s"), median(times, "unload_s"), times["bytes"] / 1e9
        pinned = GIB / 1e9 / times["pinned_s_per_gib"]
        stock_load, stock_unload = median(stock[name], "load_s"), median(stock[name], "unload_s")
        switch = (stock_load + stock_unload) / (load + unload)
        print(
            f"{name:6}{what:30}{times['bytes'] / GIB:6.1f}{times['load_s'][0]:9.3f}{load:8.3f}{unload:10.3f}"
            f"{slots * rate / load:7.1f}{rate / load / pinned:11.0%}"
            f"{stock_load / load:8.1f}{stock_unload / unload:10.1f}{switch:10.1f}"
        )
    alone = next(times for _, what, times, _ in rows if what == "ours, from RAM")
    if (between := alone["peer_s_per_gib"]) is not None:
        pinned = GIB / 1e9 / alone["pinned_s_per_gib"]
        print(f"a plain copy: {pinned:.1f} GB/s from pinned memory, {GIB / 1e9 / between:.1f} GB/s from another GPU")


# Whole jobs with two models in turns.


def compare_alternating(comfyui: Path, models: Path, devices: list[str]) -> None:
    print(f"\n{'seconds a job':26}" + "".join(f"{name:>20}" for name in ALTERNATING))
    for name, slots in (("stock", None), ("ours", devices[0])):
        with started(comfyui, models, devices, slots, args=UNLOADING) as server:
            report_alternating(name, alternating_seconds(server, None if slots is None else 0))


def alternating_seconds(server: HostServer, slot: int | None) -> dict[str, list[float]]:
    """How long each job takes, by its model; every job loads its text encoder, its model and its VAE."""
    taken: dict[str, list[float]] = {name: [] for name in ALTERNATING}
    for number in range(2 + PAIRS):
        for name, size in ALTERNATING.items():
            began = time.perf_counter()
            text = f"a lighthouse at dusk, {number}"
            entry = server.run(txt2img(next(_seeds), ckpt=name, steps=20, width=size, height=size, text=text), slot)
            assert entry["status"]["completed"], entry["status"]
            taken[name].append(time.perf_counter() - began)
    return {name: seconds[2:] for name, seconds in taken.items()}


def report_alternating(name: str, taken: dict[str, list[float]]) -> None:
    each = {model: statistics.median(seconds) for model, seconds in taken.items()}
    images = 3600 * len(each) / sum(each.values())
    print(f"{name:26}" + "".join(f"{seconds:20.3f}" for seconds in each.values()) + f"{images:12.0f} images/h")


def median(times: dict[str, Any], what: str) -> float:
    """Without the first load, which may read and register the file."""
    return statistics.median(times[what][1:] if what == "load_s" else times[what])


if __name__ == "__main__":
    main()
