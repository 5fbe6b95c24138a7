"""The command `comfy-parallel`: link, unlink, doctor."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from comfy_parallel import __version__, patches
from comfy_parallel.config import Config
from comfy_parallel.errors import ComfyParallelError, HostMismatch
from comfy_parallel.host import facts
from comfy_parallel.isolation.packs.clashes import clashes
from comfy_parallel.isolation.packs.findings import findings
from comfy_parallel.isolation.packs.verdicts import verdicts
from comfy_parallel.ops import link
from comfy_parallel.patching import scan
from comfy_parallel.patching.engine import survey


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0 when all is well, 1 when doctor found a problem, 2 on an error."""
    options = _parser().parse_args(arguments)
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
    if not (host_dir / "main.py").is_file():
        raise ComfyParallelError(f"{host_dir} holds no main.py; name the folder of a ComfyUI checkout")
    print(f"host           ComfyUI {facts.version(host_dir)} in {host_dir}\n")
    problems = _print_patches(host_dir)
    unknown = _print_unknown(host_dir)
    _print_packs(host_dir / "custom_nodes")
    print(f"\n{'does not fit' if problems else 'fits'}: {problems} patches do not fit, {unknown} unknown globals")
    return 1 if problems else 0


def _print_machine() -> None:
    config = Config.from_env(os.environ)
    print(f"comfy_parallel {__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    print(f"configuration  {config}")
    if importlib.util.find_spec("torch") is None:
        print("devices        torch is not installed here; run this with ComfyUI's own Python")
        return
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices        torch {torch.__version__}: {', '.join(names) or 'no GPU visible; ComfyUI needs --cpu'}")


def _print_patches(host_dir: Path) -> int:
    rows = [("fit", "target", "why")]
    problems = 0
    for patch, result in survey(patches.ALL, host_dir):
        if isinstance(result, HostMismatch):
            problems += 1
            rows.append(("NO", patch.target, str(result)))
        else:
            rows.append((result.value, patch.target, patch.why))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for fit, target, why in rows:
        print(f"{fit:{widths[0]}}  {target:{widths[1]}}  {why}")
    return problems


def _print_packs(folder: Path) -> None:
    packs = [path for path in sorted(folder.glob("*")) if _is_pack(path)]
    print(f"\nnode packs     {len(packs)} in {folder}")
    found, clashing = {path: findings(path) for path in packs}, {path: clashes(path) for path in packs}
    for verdict in verdicts(found, clashing, Config.from_env(os.environ).packs):
        lines = list(verdict.lines())
        print("\n".join(lines) if lines else f"node pack {verdict.name}: keeps nothing for the whole process")


def _is_pack(path: Path) -> bool:
    is_ours = path.resolve() == Path(__file__).resolve().parents[2]
    return not is_ours and (path.suffix == ".py" or (path / "__init__.py").is_file())


def _print_unknown(host_dir: Path) -> int:
    unknown = scan.unknown_globals(host_dir)
    for path, name, line in unknown:
        print(f"unknown global {name} ({path}:{line}): the host changes it at run time; slots may race on it")
    return len(unknown)
