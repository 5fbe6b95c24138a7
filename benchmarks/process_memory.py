"""What two processes with one model have in RAM, against one process, and against two plain ComfyUIs.

usage: python benchmarks/process_memory.py HOST MODELS_DIR

A model of 0.8 billion parameters is made in MODELS_DIR, or found there. It is loaded as a checkpoint, as the same
numbers pickled (.ckpt), and by UNETLoader as fp8_e4m3fn. Sizes are proportional set sizes (PSS) of all processes of a
server: before any model was loaded (the fixed cost), and after one image from each slot.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from full_size import start_making

from tests.host.jobs import outcome
from tests.host.server import HostServer, without_front_end
from tests.host.workflows import Workflow, node, txt2img

MIB = 1 << 20


def checkpoint(ending: str) -> Workflow:
    return txt2img(1, ckpt=f"small.{ending}", steps=1)


def eighth(_: str = "") -> Workflow:
    workflow = txt2img(1, steps=1)
    for name in ("ckpt", "decode"):
        workflow.pop(name)
    workflow["unet"] = node("UNETLoader", unet_name="small.safetensors", weight_dtype="fp8_e4m3fn")
    for number, name in enumerate(("positive", "negative")):
        workflow[name] = node("CPTConditioning", seed=number, tokens=77, width=768, pooled=768)
    workflow["sampler"]["inputs"]["model"] = ["unet", 0]
    workflow["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="memory")
    return workflow


CASES: dict[str, Callable[[], Workflow]] = {
    "safetensors": lambda: checkpoint("safetensors"),
    ".ckpt": lambda: checkpoint("ckpt"),
    "fp8_e4m3fn": eighth,
}


def models_in(host: Path, models: Path) -> None:
    """Make what is not there."""
    if any(maker.wait() for maker in start_making(host, models, ("small",))):
        raise RuntimeError("the model could not be made")
    source = models / "checkpoints" / "small.safetensors"
    pickled, unet = source.with_suffix(".ckpt"), models / "diffusion_models" / source.name
    if not unet.exists():
        unet.symlink_to(source)
    if not pickled.exists():
        import torch
        from safetensors.torch import load_file

        torch.save({"state_dict": load_file(source)}, pickled)


def pss(servers: list[HostServer]) -> int:
    """Of all their processes; the smallest of some readings, for memory is given back just after a job's end."""
    readings = []
    for _ in range(5):
        found = 0
        for server in servers:
            if server.slots is None:
                found += server.pss_bytes
            else:
                found += server.request("GET", "/parallel/weights")[1]["pss_bytes"]
        readings.append(found)
        time.sleep(0.3)
    return min(readings)


def measure(host: Path, models: Path, slots: str | None, count: int) -> dict[str, int]:
    """PSS before any job, and after each case; one plain ComfyUI for each of `count` where `slots` is None."""
    with ExitStack() as started:
        servers = []
        for _ in range(count if slots is None else 1):
            base = Path(started.enter_context(tempfile.TemporaryDirectory()))
            (base / "models").symlink_to(models, target_is_directory=True)
            args = without_front_end(base / "front_end")
            servers.append(started.enter_context(HostServer(host, base, slots=slots, args=args)))
        found = {"nothing": pss(servers)}
        for name, make in CASES.items():
            for server in servers:
                for slot in [None] if slots is None else range(count):
                    entry = server.run(make(), slot, 300)
                    assert outcome(entry) == "success", entry["status"]
            found[name] = pss(servers)
            for server in servers:
                server.request("POST", "/free", {"unload_models": True, "free_memory": True})
            time.sleep(3)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("models", type=Path)
    given = parser.parse_args()
    models_in(given.host.resolve(), given.models.resolve())
    rows = {
        "one process": measure(given.host, given.models.resolve(), "cpu=process", 1),
        "two processes": measure(given.host, given.models.resolve(), "cpu=process,cpu=process", 2),
        "two plain ComfyUIs": measure(given.host, given.models.resolve(), None, 2),
    }
    print(f"{'PSS, MiB':20}{'nothing':>9}" + "".join(f"{name:>13}{'besides':>9}" for name in CASES))
    for name, row in rows.items():
        besides = {case: row[case] - row["nothing"] for case in CASES}
        figures = "".join(f"{row[case] // MIB:13}{besides[case] // MIB:9}" for case in CASES)
        print(f"{name:20}{row['nothing'] // MIB:9}{figures}")
    one, two = rows["one process"], rows["two processes"]
    for case in CASES:
        ratio = (two[case] - two["nothing"]) / (one[case] - one["nothing"])
        print(f"{case}: two processes have {ratio:.2f} times the weights of one")


if __name__ == "__main__":
    main()
