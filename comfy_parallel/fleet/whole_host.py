"""How complete ComfyUIs of one checkout are started beside each other: each with a device, a port and what it must not
share with the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_parallel.config import SWITCH
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet.command import STATE, _visible_name
from comfy_parallel.fleet.supervisor import Command
from comfy_parallel.fleet.worker_side import NUMBERS
from comfy_parallel.slots.device import intra_op_threads

# Variables that begin like this say how a server's slots are laid out, or are about one server of several.
_NOT_PASSED_ON = (
    "COMFY_NUM_GPUS",
    "COMFY_PARALLEL_DEVICES",
    "COMFY_PARALLEL_WORKERS",
    "COMFY_PARALLEL_SLOTS_PER_GPU",
    "COMFY_PARALLEL_DEFAULT_GPU",
    "COMFY_PARALLEL_PRELOAD",
    "COMFY_PARALLEL_REMOTE",
    "COMFY_PARALLEL_RAY",
)
WORKER_MAY_SAY = ("--listen", "--cpu")
# What comes from us, so that it may not be among the arguments for ComfyUI; what to say instead.
OURS = {
    "--port": "--base-port",
    "--listen": "--listen before the --",
    "--cuda-device": "--gpus",
    "--cpu": "--gpus cpu",
    "--temp-directory": "nothing: each ComfyUI has a temp folder of its own",
    "--database-url": "nothing: each ComfyUI has a database of its own",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """A ComfyUI checkout and how it is called.

    Attributes:
        python: its own Python.
        folder: where the ComfyUIs keep what each has for itself; absolute.
        has_database: whether its command line knows `--database-url`.
        visible: CUDA_VISIBLE_DEVICES; a device's number counts these.
    """

    comfyui: Path
    python: str
    folder: Path
    has_database: bool
    env: Mapping[str, str]
    visible: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeHost:
    """One complete ComfyUI.

    Attributes:
        device: `cpu` or `cuda:1`; None where it has as many slots as the environment says.
        listen: as ComfyUI's, None for this machine only, unless `arguments` say something else.
        preload: the files to load at once, as COMFY_PARALLEL_PRELOAD names them.
        model_folders: kinds and folders of models that ComfyUI would not look into.
        gpu_config: the COMFY_PARALLEL_GPU_CONFIG that it gets.
        num_hosts: how many share the CPU's cores.
    """

    label: str
    device: str | None
    port: int
    listen: str | None = None
    arguments: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    model_folders: tuple[tuple[str, str], ...] = ()
    gpu_config: str = "off"
    num_hosts: int = 1

    @property
    def is_with_tls(self) -> bool:
        """Whether it answers https only."""
        return any(argument.partition("=")[0] == "--tls-keyfile" for argument in self.arguments)

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        address = (self.listen or "127.0.0.1").split(",")[0].strip()
        address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, address)
        address = f"[{address}]" if ":" in address and not address.startswith("[") else address
        return f"{'https' if self.is_with_tls else 'http'}://{address}:{self.port}"


def command_of(host: WholeHost, install: Install) -> Command:
    """The command that runs it; it writes no file."""
    arguments = [*host.arguments, "--port", str(host.port), *(["--listen", host.listen] if host.listen else [])]
    if host.device == "cpu":
        arguments += ["--cpu"] if "--cpu" not in arguments else []
    elif host.device is not None:
        arguments += ["--cuda-device", _visible_name(host.device, install.visible)]
    arguments += ["--disable-auto-launch", "--temp-directory", str(_own(install, host, "temp"))]
    if install.has_database:
        arguments += ["--database-url", f"sqlite:///{_own(install, host, 'comfyui.db')}"]
    if host.model_folders:
        arguments += ["--extra-model-paths-config", str(models_file(install))]
    left_out: tuple[str, ...] = () if host.device is None else _NOT_PASSED_ON
    env = {name: value for name, value in install.env.items() if not name.startswith(left_out)}
    env |= {SWITCH: "1", "COMFY_PARALLEL_GPU_CONFIG": host.gpu_config}
    if host.device is not None:
        env["COMFY_PARALLEL_DEVICES"] = "cpu" if host.device == "cpu" else "cuda:0"
    if os.name == "posix":
        env[NUMBERS] = str(install.folder / "numbers")
    if env.get(STATE, "").strip() != "off":
        env[STATE] = str(_own(install, host, "queue.sqlite3"))
    if host.preload:
        env["COMFY_PARALLEL_PRELOAD"] = ",".join(host.preload)
    if host.device is not None:
        env.setdefault("OMP_NUM_THREADS", str(intra_op_threads(host.device, host.num_hosts, os.cpu_count() or 1)))
    return Command(argv=(install.python, "main.py", *arguments), env=env, cwd=str(install.comfyui))


def prepare(host: WholeHost, install: Install) -> Command:
    """The same, after making the folder of what it has for itself.

    Raises:
        OSError: when that cannot be written.
    """
    (install.folder / str(host.port)).mkdir(parents=True, exist_ok=True)
    (install.folder / "numbers").mkdir(exist_ok=True)
    if host.model_folders:
        models_file(install).write_text(_model_paths(host.model_folders), encoding="utf-8")
    return command_of(host, install)


def models_file(install: Install) -> Path:
    """Tells ComfyUI of model folders that are none of its own. JSON, which is YAML too."""
    return install.folder / "model_folders.yaml"


def log_file(host: WholeHost, install: Install) -> Path:
    """Where what it writes is kept."""
    return install.folder / "logs" / f"comfyui-{host.port}.log"


def refuse_ours(arguments: Sequence[str], *, may_say: Sequence[str] = ()) -> None:
    """Raises ConfigError where the arguments for ComfyUI hold one that comes from us, other than those of `may_say`."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in OURS and name not in may_say:
            raise ConfigError(f"{name} cannot be passed on to several ComfyUIs; use {OURS[name]}")


def _model_paths(folders: Iterable[tuple[str, str]]) -> str:
    paths: dict[str, list[str]] = {}
    for kind, folder in folders:
        paths.setdefault(kind, []).append(folder)
    return json.dumps({"comfy_parallel": {kind: "\n".join(dict.fromkeys(found)) for kind, found in paths.items()}})


def _own(install: Install, host: WholeHost, name: str) -> Path:
    return install.folder / str(host.port) / name
