"""What weights cost: memory with 1 to N slots, and time to switch models, stock ComfyUI beside comfy_parallel.

    python benchmarks/weights.py COMFYUI_DIR [--devices cuda:0,cuda:1,… | cpu,cpu,cpu,cpu] [--switches 6]

Memory is the host process's proportional set size after one image on each slot, with one model and after two models
in turns. A switch is a job that loads the other model and decodes one small latent image with its VAE.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.host.models import cached_models
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node, txt2img

LARGE, SMALL = "wide.safetensors", "a.safetensors"


def main() -> None:
    options = parse()
    devices = options.devices.split(",")
    cache = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
    models = cached_models(options.comfyui, cache, ("a", "wide"))
    counts = [count for count in (1, 2, 4, 8) if count <= len(devices)]
    rows = []
    for count in (None, *counts):
        slots = None if count is None else ",".join(devices[:count])
        with started(options.comfyui, models, slots, is_cpu=devices[0] == "cpu") as server:
            one, two = (memory_after(server, count, names) for names in ((LARGE,), (SMALL, LARGE)))
            seconds = switch_seconds(server, options.switches) if count in (None, 1) else None
        rows.append(("stock" if count is None else f"{count} slot(s)", one, two, seconds))
    report(rows, counts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=lambda text: Path(text).resolve())
    parser.add_argument("--devices", default="cpu,cpu,cpu,cpu")
    parser.add_argument("--switches", type=int, default=6)
    return parser.parse_args()


@contextmanager
def started(comfyui: Path, models: Path, slots: str | None, *, is_cpu: bool) -> Iterator[HostServer]:
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "models").symlink_to(models, target_is_directory=True)
        front_end = Path(base) / "front_end"
        front_end.mkdir()
        (front_end / "index.html").write_text("<html></html>")
        args = ["--front-end-root", str(front_end)]
        with HostServer(comfyui, Path(base), slots=slots, args=args, link=slots is not None, is_cpu=is_cpu) as server:
            yield server


def memory_after(server: HostServer, count: int | None, names: tuple[str, ...]) -> int:
    """Bytes, once every slot has made an image with each of these checkpoints."""
    for name in names:
        slots = [None] if count is None else range(count)
        ids = [server.submit(txt2img(1, ckpt=name, steps=1), slot)["prompt_id"] for slot in slots]
        for entry in server.wait(ids, 300).values():
            assert entry["status"]["completed"], entry["status"]
    return server.pss_bytes


def switch_seconds(server: HostServer, switches: int) -> float:
    """The median over jobs that each load the other model."""
    taken = []
    for number in range(2 * switches):
        began = time.perf_counter()
        server.run(load_and_decode((SMALL, LARGE)[number % 2]))
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


def report(rows: list[tuple[str, int, int, float | None]], counts: list[int]) -> None:
    print(f"\n{'':12}{'one model, MiB':>16}{'two in turns, MiB':>19}{'of one slot':>13}{'switch, s':>11}")
    ours = dict(zip(counts, rows[1:], strict=True))
    for name, one, two, seconds in rows:
        shown = "" if seconds is None else f"{seconds:.2f}"
        print(f"{name:12}{one >> 20:16}{two >> 20:19}{one / ours[1][1]:13.2f}{shown:>11}")
    stock_seconds, our_seconds = rows[0][3], ours[1][3]
    assert stock_seconds is not None
    assert our_seconds is not None
    print(f"switching to the large model: stock / ours = {stock_seconds / our_seconds:.1f}")


if __name__ == "__main__":
    main()
