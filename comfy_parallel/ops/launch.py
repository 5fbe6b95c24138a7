"""The command `comfy-parallel launch`: one complete ComfyUI per GPU, which read their weights once."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from comfy_parallel.config import SWITCH, Config
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet import whole_host
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.ops import launch_files, launch_plan, link
from comfy_parallel.ops.running import GRACE_S, Running

FOLDER = "__comfy_parallel/launch"  # in the user folder, out of its users' reach


def add_to(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    command.add_argument(
        "--gpus", metavar="LIST", help="0,1 or cpu,cpu (COMFY_PARALLEL_DEVICES, else every GPU): one ComfyUI each"
    )
    command.add_argument("--listen", metavar="ADDRESS", help="as ComfyUI's (127.0.0.1)")
    command.add_argument(
        "--base-port", metavar="PORT", type=int, default=8188, help="of the first; the next has the next (8188)"
    )
    for option, (kind, _) in launch_files.KINDS.items():
        command.add_argument(
            f"--{option}",
            metavar="FILE",
            action="append",
            default=[],
            help=f"a file of {kind}, by path or by its name there, to be loaded at once; may be repeated",
        )
    command.add_argument("--weight-dtype", metavar="KIND", help="for --unet, as its loader's: fp8_e4m3fn, …")
    add_install(command)
    command.set_defaults(run=run)


def add_install(command: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which ComfyUI is meant."""
    command.add_argument(
        "--comfyui",
        metavar="DIR",
        type=Path,
        help="its folder (COMFYUI_PATH, else the ComfyUI that this is in)",
    )
    command.add_argument(
        "--python", metavar="FILE", help="its Python (COMFYUI_PYTHON, else venv or .venv in its folder, else this one)"
    )
    command.add_argument(
        "--folder", metavar="DIR", type=Path, help=f"for logs and what each has for itself (user/{FOLDER})"
    )
    command.add_argument(
        "--silent-s", metavar="S", type=float, default=300.0, help="one that does not answer so long is ended (300)"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would be started, start nothing")
    command.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="after --, for each ComfyUI: -- --lowvram")


def run(options: argparse.Namespace) -> int:
    """Start what was asked for and keep it running; returns when it was told to end, or cannot be kept running."""
    if not hasattr(os, "waitid"):
        raise ConfigError("comfy-parallel launch needs Linux; start ComfyUI itself with COMFY_MULTI_GPU_SCHED=1")
    hosts, install = plan(options, options.env)
    if options.dry_run:
        return print_plan(hosts, install)
    return Running(hosts, install, silent_s=options.silent_s, grace_s=grace_of(options.env)).until_ended()


def grace_of(env: Mapping[str, str]) -> float:
    """How long ComfyUIs have to end, in seconds: those that drain have longer. Raises ConfigError."""
    return GRACE_S + Config.from_env({**env, SWITCH: "1"}).drain_s


def print_plan(hosts: list[WholeHost], install: Install) -> int:
    """Write what would be started to standard output."""
    sys.stdout.write("\n".join(line for host in hosts for line in lines_of(host, install)) + "\n")
    return 0


def plan(options: argparse.Namespace, env: Mapping[str, str]) -> tuple[list[WholeHost], Install]:
    """What to start.

    Raises:
        ConfigError: before anything was started; the message says what to do.
    """
    install = install_of(options, options.arguments, env)
    named = [(option, name) for option in launch_files.KINDS for name in getattr(options, option)]
    models_dir = launch_plan.models_folder(install.comfyui, options.arguments)
    weights = launch_files.find(named, models_dir, options.weight_dtype)
    whole_host.refuse_ours(options.arguments)
    devices = launch_plan.devices_of(options.gpus, env, lambda: launch_plan.count_gpus(install.python, install.visible))
    hosts = launch_plan.hosts_of(
        devices,
        base_port=options.base_port,
        listen=options.listen,
        arguments=options.arguments,
        preload=weights.preload,
        model_folders=weights.folders,
    )
    launch_plan.check_ports(hosts)
    return hosts, install


def install_of(options: argparse.Namespace, arguments: list[str], env: Mapping[str, str]) -> Install:
    """The ComfyUI that is meant. Raises ConfigError where there is none, or our package is not in it."""
    comfyui = comfyui_of(options.comfyui, env)
    _check_linked(launch_plan.base_folder(comfyui, arguments))
    folder = options.folder or launch_plan.user_folder(comfyui, arguments) / FOLDER
    arguments_known = (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    return Install(
        comfyui=comfyui,
        python=python_of(options.python, comfyui, env),
        folder=Path(os.path.abspath(folder)),
        has_database='"--database-url"' in arguments_known,
        env=env,
        visible=env.get("CUDA_VISIBLE_DEVICES"),
    )


def comfyui_of(named: Path | None, env: Mapping[str, str]) -> Path:
    """The folder of the ComfyUI that is meant. Raises ConfigError where it is none."""
    around = link.ROOT.parents[1] if link.ROOT.parent.name == "custom_nodes" else None
    given = named or (Path(env["COMFYUI_PATH"]) if env.get("COMFYUI_PATH") else around)
    if given is None:
        raise ConfigError("which ComfyUI? Name its folder with --comfyui DIR or COMFYUI_PATH=DIR")
    comfyui = Path(os.path.abspath(given.expanduser()))
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy" / "cli_args.py").is_file():
        raise ConfigError(f"{comfyui} is no ComfyUI: it holds no main.py with a comfy folder beside it; name another")
    return comfyui


def _check_linked(base: Path) -> None:
    if not link.is_linked(base / "custom_nodes"):
        raise ConfigError(
            f"comfy_parallel is no custom node in {base / 'custom_nodes'}, and without it the ComfyUIs would share no "
            "weights; run comfy-parallel link PATH_TO_COMFYUI, or clone it there"
        )


def python_of(named: str | None, comfyui: Path, env: Mapping[str, str]) -> str:
    """Its Python. Raises ConfigError where the one that is named is no program."""
    places = [comfyui / venv / part for venv in ("venv", ".venv") for part in ("bin/python", "Scripts/python.exe")]
    given = named or env.get("COMFYUI_PYTHON") or next((str(path) for path in places if path.is_file()), sys.executable)
    found = shutil.which(given)
    if found is None:
        raise ConfigError(f"{given} is no program; name ComfyUI's Python with --python FILE or COMFYUI_PYTHON=FILE")
    return found


def lines_of(host: WholeHost, install: Install) -> list[str]:
    """What would be started, as a shell would be told."""
    command = whole_host.command_of(host, install)
    changed = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.env.items()) if _is_told(name, install)]
    taken = [f"unset {name}" for name in sorted(install.env) if name not in command.env]
    return [
        f"# {host.label}: {host.url}, log {whole_host.log_file(host, install)}",
        *taken,
        f"cd {shlex.quote(str(install.comfyui))}",
        " ".join([*changed, shlex.join(command.argv)]),
    ]


def _is_told(name: str, install: Install) -> bool:
    return name.startswith(("COMFY", "CUDA_VISIBLE", "OMP_")) and name not in ("COMFYUI_PATH", "COMFYUI_PYTHON")
