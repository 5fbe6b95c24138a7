"""The processes of all slots that are to have one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_parallel.config import PROCESS, Config
from comfy_parallel.fleet import command, local_workers, worker_side
from comfy_parallel.fleet.process_slot import ProcessSlot
from comfy_parallel.host import facts
from comfy_parallel.slots.slot import slots


def make(config: Config, server: Any, kinds: Sequence[str], *, env: Mapping[str, str], visible: str | None) -> None:
    """Give each slot whose kind is `process` what runs its jobs, and know of other ComfyUIs; `start` starts them.

    Args:
        env: the environment that this process was started with.
        visible: its CUDA_VISIBLE_DEVICES now.

    Raises:
        ConfigError: when a device cannot have such a slot.
    """
    for slot, kind in zip(slots(), kinds, strict=False):  # Slots on other machines follow.
        if kind == PROCESS:
            command.can_be(slot.device)
            start_command = functools.partial(
                command.worker_command,
                slot.device,
                started_as=list(sys.orig_argv),
                env=env,
                visible=visible,
                temp=facts.temp_directory(),
                has_argument=facts.has_argument,
                num_slots=len(kinds),
            )
            requeues = config.worker_lost == "requeue"
            slot.process = ProcessSlot(slot, server, start_command, silent_s=config.worker_silent_s, requeues=requeues)
    if not worker_side.is_worker():
        local_workers.use(config, env)


def named(devices: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The slots as `COMFY_PARALLEL_DEVICES` names them."""
    return [name if kind != PROCESS else f"{name}=process" for name, kind in zip(devices, kinds, strict=True)]


def start() -> None:
    """Start them; returns at once."""
    for slot in slots():
        if isinstance(slot.process, ProcessSlot):
            slot.process.start()
    local_workers.launch_at_start()
