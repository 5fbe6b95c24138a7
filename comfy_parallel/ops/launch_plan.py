"""Which ComfyUIs `comfy-parallel launch` starts: their devices, their ports, and what keeps them from being started."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from comfy_parallel.config import Config
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet import ports
from comfy_parallel.fleet.whole_host import WholeHost

MOST_HOSTS = 99
_GPU = re.compile(r"(?:cuda:)?(0|[1-9][0-9]{0,2})")


def devices_of(gpus: str | None, env: Mapping[str, str], count_gpus: Callable[[], int]) -> tuple[str, ...]:
    """The device of each ComfyUI: what `--gpus` names, else COMFY_PARALLEL_DEVICES, else every GPU.

    Raises:
        ConfigError: when a device is none, is not there, or none is there.
    """
    if gpus is None:
        named = Config.from_env({**env, "COMFY_MULTI_GPU_SCHED": "1"}).devices
        where = "COMFY_PARALLEL_DEVICES"
    else:
        named, where = tuple(_device(part.strip(), gpus) for part in gpus.split(",")), "--gpus"
    count = count_gpus() if named is None or any(device != "cpu" for device in named) else 0
    if named is None and not count:
        raise ConfigError("no GPU was found; say --gpus cpu,cpu for two ComfyUIs on the CPU")
    devices = named or tuple(f"cuda:{index}" for index in range(count))
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise ConfigError(f"--gpus {gpus}: name GPUs or cpu, not both")
    for device in devices:
        if device != "cpu" and int(device.partition(":")[2]) >= count:
            there = ", ".join(map(str, range(count))) or "none"
            raise ConfigError(f"{where} names GPU {device.partition(':')[2]}, but the GPUs here are: {there}")
    if len(devices) > MOST_HOSTS:
        raise ConfigError(f"{len(devices)} ComfyUIs; name at most {MOST_HOSTS} devices")
    return devices


def _device(part: str, gpus: str) -> str:
    found = _GPU.fullmatch(part)
    if found is None and part != "cpu":
        raise ConfigError(f"--gpus {gpus!r}: {part!r} is no GPU; write numbers like 0,1 or, without GPUs, cpu,cpu")
    return "cpu" if found is None else f"cuda:{found[1]}"


def count_gpus(python: str, visible: str | None) -> int:
    """How many GPUs ComfyUI's Python would see."""
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    code = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.stdout.strip().isdigit() else 0


def hosts_of(
    devices: Sequence[str],
    *,
    base_port: int,
    listen: str | None,
    arguments: Sequence[str],
    preload: tuple[str, ...] = (),
    model_folders: tuple[tuple[str, str], ...] = (),
) -> list[WholeHost]:
    """One ComfyUI for each device, on ports that follow each other. Raises ConfigError where the ports cannot be."""
    last = base_port + len(devices) - 1
    if not 1 <= base_port <= last <= 65535:
        raise ConfigError(f"--base-port is {base_port}; {len(devices)} ComfyUIs need ports from 1 to 65535")
    return [
        WholeHost(
            label=f"{base_port + index} {device}",
            device=device,
            port=base_port + index,
            listen=listen,
            arguments=tuple(arguments),
            preload=preload,
            model_folders=model_folders,
            num_hosts=len(devices),
        )
        for index, device in enumerate(devices)
    ]


def check_ports(hosts: Iterable[WholeHost]) -> None:
    """Raises ConfigError where a port is taken or an address is not this machine's."""
    for host in hosts:
        ports.check(host.listen, host.port, "end it, or say another --base-port or --listen")


def split(extra_args: str) -> list[str]:
    """Arguments that were written in one line."""
    return shlex.split(extra_args)


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The value that ComfyUI's arguments give an option; the last counts."""
    found = None
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
        elif argument == name and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def user_folder(comfyui: Path, arguments: Sequence[str]) -> Path:
    """ComfyUI's user folder."""
    named = value_of(arguments, "--user-directory")
    return Path(comfyui, named) if named else base_folder(comfyui, arguments) / "user"


def base_folder(comfyui: Path, arguments: Sequence[str]) -> Path:
    """The folder with models/, custom_nodes/, output/."""
    return Path(comfyui, value_of(arguments, "--base-directory") or ".")


def models_folder(comfyui: Path, arguments: Sequence[str]) -> Path:
    """The folder with checkpoints/, vae/, …"""
    named = value_of(arguments, "--models-directory")
    return Path(comfyui, named) if named else base_folder(comfyui, arguments) / "models"
