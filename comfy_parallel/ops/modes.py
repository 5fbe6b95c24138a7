"""The commands that `launch_distributed.bat` has: start what `gpu_config.json` names, and keep ComfyUI up to date."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_parallel.core.gpu_config import GpuConfig, Master, Worker
from comfy_parallel.errors import ComfyParallelError, ConfigError
from comfy_parallel.fleet import ports, watched_host, whole_host
from comfy_parallel.fleet.gpu_config_file import GpuConfigFile, named_file
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.ops import launch, launch_plan
from comfy_parallel.ops.plain_running import PlainRunning
from comfy_parallel.ops.running import Running

PAUSE_S = 2.0
PORT = 8188  # of a master that names none
_STARTING = {
    "master": "start the master of gpu_config.json",
    "all-fast": "start the master and the enabled workers, one every two seconds",
    "all-slow": "start them one by one, each when the one before is ready",
}


def add_to(commands: Any) -> None:
    """Declare the commands and their arguments."""
    for name, help in _STARTING.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("--config", metavar="FILE", type=Path, help="gpu_config.json (COMFY_PARALLEL_GPU_CONFIG)")
        launch.add_install(command)
        command.set_defaults(run=_start, mode=name)
    for name, help, run in (
        ("update", "update ComfyUI by git, and what it requires", _update),
        ("update-nodes", "update all custom nodes by git", _update_nodes),
        ("venv", "open a shell in which python is ComfyUI's", _shell),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("--comfyui", metavar="DIR", type=Path, help="its folder (COMFYUI_PATH)")
        command.add_argument("--python", metavar="FILE", help="its Python (COMFYUI_PYTHON)")
        command.set_defaults(run=run)


def _start(options: argparse.Namespace) -> int:
    hosts, install = plan(options, options.env)
    if options.dry_run:
        return launch.print_plan(hosts, install)
    hosts = [host for host in hosts if not _is_there(host)]
    for host in hosts:
        ports.check(host.listen, host.port, "end it, or change gpu_config.json")
    if not hosts:
        return 0
    is_fast = options.mode == "all-fast"
    if not hasattr(os, "waitid"):
        return PlainRunning(hosts, install, pause_s=PAUSE_S if is_fast else 0.0).until_ended()
    running = Running(
        hosts,
        install,
        silent_s=options.silent_s,
        one_by_one=options.mode == "all-slow",
        pause_s=PAUSE_S if is_fast else 0.0,
        grace_s=launch.grace_of(options.env),
    )
    return running.until_ended()


def plan(options: argparse.Namespace, env: Mapping[str, str]) -> tuple[list[WholeHost], Install]:
    """What the mode starts, whether it runs already or not.

    Raises:
        ConfigError: before anything was started; the message says what to do.
    """
    install = launch.install_of(options, options.arguments, env)
    file = config_file(options, install, env)
    path = file.path
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there; write one (docs/launcher.md has an example), or use comfy-parallel launch"
        )
    config = file.read()
    hosts = [_master(config.master, options.arguments, path)]
    if options.mode != "master":
        hosts += [_worker(worker, config, options.arguments) for worker in config.enabled_workers() if worker.is_local]
    return hosts, install


def config_file(options: argparse.Namespace, install: Install, env: Mapping[str, str]) -> GpuConfigFile:
    """The gpu_config.json that is meant. Raises ConfigError where that is none."""
    if options.config:
        return GpuConfigFile(Path(os.path.abspath(options.config.expanduser())))
    usual = launch_plan.user_folder(install.comfyui, options.arguments) / "__comfy_parallel" / "gpu_config.json"
    file = named_file(env.get("COMFY_PARALLEL_GPU_CONFIG", "").strip() or None, Path(os.path.abspath(usual)))
    if file is None:
        raise ConfigError("COMFY_PARALLEL_GPU_CONFIG=off: there is no master to start; take it away, or name --config")
    return file


def _master(master: Master, arguments: list[str], path: Path) -> WholeHost:
    own = launch_plan.split(master.extra_args)
    return WholeHost(
        label=f"{master.name} {master.port or PORT}",
        device=_device(master.cuda_device, [*arguments, *own]),
        port=master.port or PORT,
        arguments=(*arguments, *own),
        gpu_config=str(path),
    )


def _worker(worker: Worker, config: GpuConfig, arguments: list[str]) -> WholeHost:
    if worker.port == (config.master.port or PORT):
        raise ConfigError(f"gpu_config.json: worker {worker.id} has the master's port, {worker.port}; give it another")
    device = _device(worker.cuda_device, [*arguments, *worker.arguments])
    if device is None:
        raise ConfigError(f"gpu_config.json: worker {worker.id} names no GPU; say its cuda_device")
    return WholeHost(
        label=f"{worker.name} {worker.port}",
        device=device,
        port=worker.port,
        arguments=(*arguments, *worker.arguments),
    )


def _device(cuda_device: int | None, arguments: Sequence[str]) -> str | None:
    whole_host.refuse_ours(arguments, may_say=whole_host.WORKER_MAY_SAY)
    if "--cpu" in arguments:
        return "cpu"
    return None if cuda_device is None else f"cuda:{cuda_device}"


def _is_there(host: WholeHost) -> bool:
    """Whether a ComfyUI answers there already."""
    is_there = watched_host.answer(f"{host.url}/queue") == 200
    if is_there:
        _say(f"{host.label}: runs already on {host.url}")
    return is_there


# Keeping it up to date.


def _update(options: argparse.Namespace) -> int:
    comfyui, python = _comfyui_and_python(options)
    _pull(comfyui)
    _do([python, "-m", "pip", "install", "-r", str(comfyui / "requirements.txt")], comfyui)
    return 0


def _update_nodes(options: argparse.Namespace) -> int:
    """Each is tried, whatever became of the ones before."""
    comfyui, python = _comfyui_and_python(options)
    failed = [pack.name for pack in sorted((comfyui / "custom_nodes").iterdir()) if not _updated(pack, python)]
    if failed:
        raise ComfyParallelError(f"these were not updated: {', '.join(failed)}; what git or pip said is above")
    return 0


def _updated(pack: Path, python: str) -> bool:
    if not (pack / ".git").exists():
        return True
    try:
        _pull(pack)
        requirements = pack / "requirements.txt"
        if requirements.is_file():
            _do([python, "-m", "pip", "install", "-r", str(requirements)], pack)
    except ComfyParallelError as error:
        _say(f"{pack.name}: {error}")
        return False
    return True


def _pull(folder: Path) -> None:
    if not (folder / ".git").exists():
        raise ComfyParallelError(f"{folder} was not made by git clone, so git cannot update it; update it as it came")
    _do(["git", "-C", str(folder), "pull", "--ff-only"], folder)


def _do(command: list[str], folder: Path) -> None:
    _say(f"{folder.name}: {' '.join(command)}")
    try:
        status = subprocess.run(command, check=False, cwd=folder).returncode
    except OSError as error:
        raise ComfyParallelError(f"{command[0]} could not be started: {error.strerror}") from error
    if status != 0:
        raise ComfyParallelError(f"{' '.join(command)} ended with status {status}")


def _shell(options: argparse.Namespace) -> int:
    comfyui, python = _comfyui_and_python(options)
    folder = Path(python).parent
    env = {**options.env, "PATH": os.pathsep.join([str(folder), options.env.get("PATH", "")])}
    if (folder.parent / "pyvenv.cfg").is_file():
        env["VIRTUAL_ENV"] = str(folder.parent)
    shell = options.env.get("COMSPEC" if os.name == "nt" else "SHELL") or "/bin/sh"
    return subprocess.run([shell], check=False, cwd=comfyui, env=env).returncode


def _comfyui_and_python(options: argparse.Namespace) -> tuple[Path, str]:
    comfyui = launch.comfyui_of(options.comfyui, options.env)
    return comfyui, launch.python_of(options.python, comfyui, options.env)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
