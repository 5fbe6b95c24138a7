"""The command `comfy-parallel plan`: which weights of a model file would live on which device."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import allocation
from comfy_parallel.nodes.plan import Weight, place
from comfy_parallel.weights.files.formats import read_entries


def add_to(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    command.add_argument("model", metavar="MODEL", type=Path, help="a safetensors file")
    command.add_argument("--virtual-vram", metavar="GB", default="0", help="how many GB leave the compute device")
    command.add_argument("--donor", action="append", default=[], help="a device that takes them; may be repeated (cpu)")
    command.add_argument("--compute", metavar="DEVICE", default="cuda:0", help="where the maths is done (cuda:0)")
    command.add_argument("--expert", metavar="ALLOCATION", default="", help="as cuda:0,4gb;cpu,* ; wins over the rest")
    command.add_argument(
        "--memory", metavar="DEVICE=GB", action="append", default=[], help="the size of a device that is not here"
    )
    command.add_argument("--weights", action="store_true", help="list every weight with its home")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the plan to standard output."""
    request = allocation.make_request(
        compute=options.compute,
        virtual_gb=options.virtual_vram,
        donors=",".join(options.donor or ["cpu"]),
        expert=options.expert,
    )
    plan = place(request, _weights(options.model), {**_known(), **dict(map(_memory, options.memory))})
    homes = [f"{plan.homes[name]:<10} {size:>16} bytes  {name}" for name, size in plan.sizes.items()]
    sys.stdout.write("\n".join([*(homes if options.weights else []), *plan.lines(), str(request)]) + "\n")
    return 0


def _weights(path: Path) -> list[Weight]:
    try:
        with path.open("rb") as file:
            entries = read_entries(file.fileno())
    except (OSError, ValueError) as error:
        raise AllocationError(f"{path} cannot be read as a safetensors file: {error}") from error
    return [Weight(name, entry.end - entry.start) for name, entry in entries.items()]


def _memory(text: str) -> tuple[str, int]:
    device, _, size = text.partition("=")
    amounts = allocation.parse(f"{device},{size}gb").entries
    return amounts[0][0], amounts[0][1].size


def _known() -> dict[str, int]:
    return {"cpu": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), **_gpus()}


def _gpus() -> dict[str, int]:
    try:
        import torch
    except ImportError:
        return {}
    cuda = torch.cuda
    return {
        f"cuda:{index}": int(cuda.get_device_properties(index).total_memory) for index in range(cuda.device_count())
    }
