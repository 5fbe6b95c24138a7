"""All slots of the process: they are made when the host's server exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy_parallel.config import THREAD
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import Slot, set_slots, slots

ServerMade = Callable[[Any], None]


def _nobody(server: Any) -> None:
    raise RuntimeError("the host made its server before comfy_parallel.install() said what to do then")


_server_made: ServerMade = _nobody
_packs_loaded: ServerMade = _nobody


def when_server_is_made(callback: ServerMade, packs_loaded: ServerMade) -> None:
    """Have `callback(server)` called once the host's server exists, with its queue, and `packs_loaded(server)` when
    the node packs have done to it what they do, before its worker starts."""
    global _server_made, _packs_loaded
    _server_made, _packs_loaded = callback, packs_loaded


def server_made(server: Any) -> None:
    """Called by the patch on the host's server when that is complete."""
    _server_made(server)


def packs_loaded(server: Any) -> None:
    """Called by the patch on the host's server before that adds its routes: the host's last step before its worker."""
    _packs_loaded(server)


def start_slots(front: Any, devices: Sequence[str], kinds: Sequence[str], remotes: Sequence[str] = ()) -> None:
    """Make one slot and its queue per device, after each device of a slot of this process was used once.

    `remotes`: what people see of each slot on another machine; these come last.

    Raises:
        DeviceError: naming the first device that cannot be used.
    """
    check_devices([name for name, kind in zip(devices, kinds, strict=True) if kind == THREAD])
    made = [Slot(index, name) for index, name in enumerate(devices)]
    set_slots((*made, *(Slot(len(made) + number, "cpu", place) for number, place in enumerate(remotes))))
    for slot in slots():
        front.add_slot(slot)


def check_devices(chosen: Sequence[str]) -> None:
    """Use each device once, so that a broken one is reported at start and not by a job.

    Raises:
        DeviceError: naming the first that fails.
    """
    for name in dict.fromkeys(chosen):
        device.check(name)
    device.load_linear_algebra(chosen)
