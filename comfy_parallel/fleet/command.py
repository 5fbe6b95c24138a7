"""How a worker process is started: this very ComfyUI, with its arguments, for one device and without a port."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from comfy_parallel.config import SWITCH
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet.supervisor import Command
from comfy_parallel.fleet.worker_side import WORKER
from comfy_parallel.slots.device import intra_op_threads
from comfy_parallel.weights.files import group

# Each variable is either what a worker is configured by, as the front is, or the front's business alone.
PASSED_ON = frozenset(
    (
        "COMFY_PARALLEL_GRAPHS",
        "COMFY_PARALLEL_MAX_NODES",
        "COMFY_PARALLEL_PACKS",
        "COMFY_PARALLEL_RAM_GB",
        "COMFY_PARALLEL_SERIAL_NODES",
        "COMFY_PARALLEL_STRICT",
        "COMFY_PARALLEL_WARM_UP",
        "COMFY_PARALLEL_WEIGHTS",
    )
)
OF_FRONT = frozenset(
    (
        SWITCH,  # A worker is always on,
        "COMFY_NUM_GPUS",  # and has one slot.
        "COMFY_PARALLEL_DEVICES",
        "COMFY_PARALLEL_GPU_CONFIG",
        "COMFY_PARALLEL_RAY",
        "COMFY_PARALLEL_REMOTE",
        "COMFY_PARALLEL_REMOTE_KEYS",
        "COMFY_PARALLEL_REMOTE_TOKEN",
        "COMFY_PARALLEL_SLOTS_PER_GPU",
        "COMFY_PARALLEL_WORKERS",
        "COMFY_PARALLEL_WORKER_LOST",
        "COMFY_PARALLEL_WORKER_SILENT_S",
        # Who takes what when, and what becomes of slots that fail, hang or end.
        "COMFY_PARALLEL_AFFINITY",
        "COMFY_PARALLEL_ATTEMPTS",
        "COMFY_PARALLEL_BREAKER",
        "COMFY_PARALLEL_CLIENT_ORDER",
        "COMFY_PARALLEL_DEFAULT_GPU",
        "COMFY_PARALLEL_DRAIN_S",
        "COMFY_PARALLEL_EXIT_ON_FAILED",
        "COMFY_PARALLEL_FAIR_BY",
        "COMFY_PARALLEL_MAX_RUNNING_PER_CLIENT",
        "COMFY_PARALLEL_MAX_WAITING",
        "COMFY_PARALLEL_MAX_WAITING_PER_CLIENT",
        "COMFY_PARALLEL_PRELOAD",
        "COMFY_PARALLEL_STALL",
        "COMFY_PARALLEL_STALL_S",
        "COMFY_PARALLEL_STATE",
        "COMFY_PARALLEL_STATE_FSYNC",
        # A worker speaks with nobody else.
        "COMFY_PARALLEL_TRUSTED_PROXIES",
        "COMFY_PARALLEL_WEBHOOK",
        "COMFY_PARALLEL_WEBHOOK_HOSTS",
        "COMFY_PARALLEL_WEBHOOK_SECRET",
    )
)
STATE = "COMFY_PARALLEL_STATE"  # The journal is the front's.
_OURS = ("COMFY_PARALLEL_", "COMFY_NUM_GPUS")
# A browser, the asset database and the end after a test of the start are the front's.
_LEFT_OUT = frozenset(("--auto-launch", "--quick-test-for-ci", "--enable-assets"))


def can_be(device: str) -> None:
    """Check that a slot on this device can have a process of its own.

    Raises:
        ConfigError: saying why not.
    """
    if not hasattr(os, "waitid") or not hasattr(os, "killpg"):
        raise ConfigError("Slots in processes of their own need Linux; leave =process and COMFY_PARALLEL_WORKERS out")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"{device}=process: only cuda and cpu devices can have slots in processes of their own")


def worker_command(
    device: str,
    fd: int,
    *,
    started_as: Sequence[str],
    env: Mapping[str, str],
    visible: str | None,
    temp: str,
    has_argument: Callable[[str], bool],
    num_slots: int,
) -> Command:
    """The command of the worker for a slot on `device`.

    Args:
        fd: the worker's end of the link.
        started_as: how Python was called for the front: `sys.orig_argv`.
        env: the environment that the front was started with.
        visible: the front's CUDA_VISIBLE_DEVICES; the device's number counts these.
        temp: the front's temp folder, which the worker shares. A host empties its own when it starts, so it is told of
            this one later, and at first of one that does not exist.
        has_argument: whether the host's command line knows an argument.
        num_slots: of the whole server; they share the CPU's cores.
    """
    arguments = [argument for argument in started_as[1:] if argument not in _LEFT_OUT]
    arguments += ["--disable-auto-launch", "--temp-directory", os.path.join(temp, "none")]
    if has_argument("database_url"):
        arguments += ["--database-url", "sqlite:///:memory:"]
    told = {*PASSED_ON, group.VARIABLE}
    kept = {name: value for name, value in env.items() if not name.startswith(_OURS) or name in told}
    kept |= {SWITCH: "1", STATE: "off", "COMFY_PARALLEL_DEVICES": "cpu", WORKER: f"{fd}:{num_slots}:{temp}"}
    if device != "cpu":
        arguments += ["--cuda-device", _visible_name(device, visible)]
        kept["COMFY_PARALLEL_DEVICES"] = "cuda:0"
    kept.setdefault("OMP_NUM_THREADS", str(intra_op_threads(device, num_slots, os.cpu_count() or 1)))
    return Command(argv=(sys.executable, *arguments), env=kept, pass_fds=(fd,))


def _visible_name(device: str, visible: str | None) -> str:
    """What the driver calls the device: its number, or its part of CUDA_VISIBLE_DEVICES."""
    index = int(device.partition(":")[2])
    return str(index) if not visible else visible.split(",")[index].strip()
