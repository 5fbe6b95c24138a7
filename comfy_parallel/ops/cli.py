"""The command `comfy-parallel`: link, unlink, doctor, launch, master, all-fast, all-slow, update and others."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from comfy_parallel import __version__, patches
from comfy_parallel.config import Config, misspelt
from comfy_parallel.errors import ComfyParallelError, HostMismatch
from comfy_parallel.host import facts
from comfy_parallel.isolation.packs.clashes import clashes
from comfy_parallel.isolation.packs.findings import findings
from comfy_parallel.isolation.packs.verdicts import not_there, packs_in, verdicts
from comfy_parallel.ops import launch, link, modes, plan, proxy
from comfy_parallel.patching import scan
from comfy_parallel.patching.engine import OtherShape
from comfy_parallel.patching.patch_set import Surveyed, judge, missing_files, survey
from comfy_parallel.patching.sources import Checkout, HostFiles, file_of
from comfy_parallel.patching.unknown import describe


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0 when all is well, 1 when doctor found a problem, 2 on an error."""
    options = _parser().parse_args(arguments)
    options.env = os.environ
    try:
        return int(options.run(options))
    except ComfyParallelError as error:
        print(f"comfy-parallel: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy-parallel", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("link", _link, "make comfy_parallel a custom node of a ComfyUI"),
        ("unlink", _unlink, "take it out again"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("comfyui", metavar="PATH_TO_COMFYUI", type=Path)
        command.set_defaults(run=run)
    doctor = commands.add_parser("doctor", help="say whether a ComfyUI can be patched, and what the machine has")
    doctor.add_argument(
        "comfyui", metavar="PATH_TO_COMFYUI", type=Path, nargs="?", default=os.environ.get("COMFYUI_PATH")
    )
    doctor.set_defaults(run=_doctor)
    for program, config in (("nginx", "nginx's configuration"), ("caddy", "a Caddyfile")):
        proxy.add_to(commands.add_parser(program, help=f"write {config}: one port per slot, TLS, passwords"), program)
    launch.add_to(commands.add_parser("launch", help="start one complete ComfyUI per GPU, which share their weights"))
    modes.add_to(commands)
    plan.add_to(commands.add_parser("plan", help="say which weights of a model file would live on which device"))
    return parser


def _link(options: argparse.Namespace) -> int:
    print(f"linked: {link.link(options.comfyui)}\nstart ComfyUI with COMFY_MULTI_GPU_SCHED=1 python main.py")
    return 0


def _unlink(options: argparse.Namespace) -> int:
    was_there = link.unlink(options.comfyui)
    print("unlinked" if was_there else "nothing to unlink")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    _print_machine()
    if options.comfyui is None:
        print("host           none given: name its folder, or set COMFYUI_PATH")
        return 1
    host_dir = Path(options.comfyui).resolve()
    files = Checkout(host_dir)
    if not any(True for _ in files.python_files()):
        raise ComfyParallelError(f"{host_dir} holds no Python file; name the folder of a ComfyUI checkout")
    print(f"host           ComfyUI {facts.version(host_dir)} in {host_dir}")
    missing = missing_files(patches.ALL, files)
    if missing:
        print(f"incomplete     these files are missing, and what is in them was not checked: {', '.join(missing)}")
    checkable = [patch for patch in patches.ALL if not {file_of(module) for module in patch.modules} & set(missing)]
    surveyed = list(survey(checkable, files))
    _print_patches(surveyed)
    unknown = _print_unknown(files)
    _print_packs(host_dir / "custom_nodes")
    return _print_verdict(surveyed, missing, unknown)


def _print_verdict(surveyed: list[Surveyed], missing: list[str], unknown: int) -> int:
    verdict = judge(surveyed)
    problems = sum(isinstance(result, HostMismatch) for _, result in surveyed)
    without = f", without {', '.join(verdict.off)}" if verdict.off else ""
    fits = f"{'what is there fits' if missing else 'fits'}{without}"
    gaps = f", {len(missing)} files are missing" if missing else ""
    result = "does not fit" if verdict.problems else fits
    print(f"\n{result}: {problems} patches do not fit, {unknown} unknown globals{gaps}")
    return 1 if verdict.problems or missing else 0


def _print_machine() -> None:
    config = Config.from_env(os.environ)
    print(f"comfy_parallel {__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    print(f"configuration  {config}")
    for sentence in misspelt(os.environ):
        print(f"               {sentence}")
    if importlib.util.find_spec("torch") is None:
        print("devices        torch is not installed here; run this with ComfyUI's own Python")
        return
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices        torch {torch.__version__}: {', '.join(names) or 'no GPU visible; ComfyUI needs --cpu'}")


def _print_patches(surveyed: list[Surveyed]) -> None:
    rows = [("fit", "feature", "target", "why")]
    for patch, result in surveyed:
        if isinstance(result, OtherShape):
            rows.append(("left out", patch.feature, patch.target, str(result)))
        elif isinstance(result, HostMismatch):
            rows.append(("NO", patch.feature, patch.target, str(result)))
        else:
            rows.append((result.value, patch.feature, patch.target, patch.why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for row in rows:
        print("  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]))


def _print_packs(folder: Path) -> None:
    packs, modes = packs_in(folder), Config.from_env(os.environ).packs
    print(f"\nnode packs     {len(packs)} in {folder}")
    found, clashing = {path: findings(path) for path in packs}, {path: clashes(path) for path in packs}
    for verdict in verdicts(found, clashing, modes):
        lines = list(verdict.lines())
        print("\n".join(lines) if lines else f"node pack {verdict.name}: keeps nothing for the whole process")
    for name in not_there(packs, modes):
        print(f"COMFY_PARALLEL_PACKS names {name!r}, but no node pack's folder is called so")


def _print_unknown(files: HostFiles) -> int:
    unknown = scan.unknown_globals(files)
    for row in unknown:
        print(describe(*row))
    return len(unknown)
