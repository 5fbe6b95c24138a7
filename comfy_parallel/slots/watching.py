"""What closes slots and ends the server: jobs that fail in a row, lost devices, signals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from comfy_parallel.config import Config
from comfy_parallel.core.breaker import Limits
from comfy_parallel.slots import device, lost_devices, warming
from comfy_parallel.slots.breaking import Breaking
from comfy_parallel.slots.leaving import Leaving
from comfy_parallel.slots.lost_devices import LostDevices
from comfy_parallel.slots.slot import Slot
from comfy_parallel.slots.stopping import Stopping
from comfy_parallel.slots.stopping_at_once import StoppingAtOnce


def watch(
    front: Any, loop: asyncio.AbstractEventLoop, config: Config, leave: Callable[[str], object] | None = None
) -> None:
    """Look at how jobs end. In the process of one slot `leave(reason)` has it end after its job; the front, which
    starts it again, sees the rest."""
    queues = front.slot_queues
    warming.use(config.warm_up)
    if leave is not None:
        lost_devices.use(LostDevices(queues, device.check, tell=leave))
        return
    lost = LostDevices(
        queues, device.check, Leaving(front, config.drain_s, loop).leave if config.exit_on_failed else None
    )
    lost_devices.use(lost)
    breaking = Breaking(queues, Limits(in_a_row=config.breaker), device.check)

    def job_ended(slot: Slot, item: Any) -> None:
        lost.job_ended(slot, item)
        breaking.job_ended(slot, item)

    for queue in queues:
        queue.when_ended = job_ended


def listen(front: Any, loop: asyncio.AbstractEventLoop, config: Config, *, is_worker: bool) -> Callable[[], None]:
    """Handle the signals that end the server from now on; returns what takes that back."""
    taken: list[Callable[[], object]] = []
    if config.drain_s:
        taken.append(Stopping(front, config.drain_s, loop).listen())
    if not is_worker and front.ledger.keeps:
        taken.append(StoppingAtOnce(front).listen())

    def take_back() -> None:
        while taken:
            taken.pop()()

    return take_back


def stop() -> None:
    """Look at no more errors, and warm nothing up."""
    warming.use(False)
    lost_devices.use(None)
