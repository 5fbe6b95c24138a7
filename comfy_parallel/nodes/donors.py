"""Memory of a device that weights of another slot's model use: counted before it is taken, and given back on request.

A slot whose card is a donor does not notice it: what is promised is no longer free in the host's arithmetic, what is
taken goes back to RAM before the slot would have to unload a model of its own, and before a job that ran out of memory
runs again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from comfy_parallel.errors import AllocationError

logger = logging.getLogger(__name__)


class Loan:
    """The weights of one model on one donor. Sizes are bytes.

    It is promised until its model is loaded. A model that is loaded again takes it again, if there is room.

    Args:
        size: of all of them.
        room: tells how much the donor can lend now.
    """

    def __init__(self, device: str, size: int, room: Callable[[], int]) -> None:
        self.device = device
        self.size = size
        self._room = room
        self._is_promised = True
        self._taken: list[tuple[Any, Any, int]] = []  # parameters, what they were in RAM, where they are now
        self._lock = threading.Lock()
        _loans.add(self)

    @property
    def promised(self) -> int:
        """What will be taken yet, and is still free as torch counts it."""
        return self.size if self._is_promised else 0

    @property
    def taken(self) -> int:
        return self.size if self._taken else 0

    def take(self, parameters: Iterable[Any]) -> None:
        """Move parameters to the donor, if they are not there and it has room; else they stay in RAM."""
        with self._lock:
            if not self._is_promised and not self._taken and self.size > self._room():
                return
            self._is_promised = False
            for parameter in parameters:
                if str(parameter.device) != self.device:
                    before = parameter.data
                    parameter.data = _moved(before, self.device)
                    self._taken.append((parameter, before, parameter.data_ptr()))

    def give_back(self) -> int:
        """Have them in RAM again; returns how many bytes that gives back.

        Whoever uses them at this moment keeps what it reads until its copy is made: that runs where the donor computes,
        in order.
        """
        with self._lock:
            for parameter, before, address in self._taken:
                if parameter.data_ptr() == address:
                    parameter.data = before
                elif str(parameter.device) == self.device:  # A hook has written another one.
                    parameter.data = parameter.data.cpu()
            given_back = self.taken
            self._taken.clear()
            self._is_promised = False
        return given_back


_loans: WeakSet[Loan] = WeakSet()


def _moved(tensor: Any, device: str) -> Any:
    """A copy of the same kind: a parameter's tensor may be made in inference mode and used outside, or the reverse."""
    import torch

    with torch.inference_mode(tensor.is_inference()):
        return tensor.to(device)


def lend(device: str, size: int, room: Callable[[], int]) -> Loan:
    """Promise a part of a device's memory.

    Args:
        room: tells how much it can lend.

    Raises:
        AllocationError: when that is too little.
    """
    if size > (left := room()):
        raise AllocationError(
            f"{device} can lend {left} bytes beside what its slot needs, and not the {size} of this model; "
            "ask for less, or name cpu as the donor"
        )
    return Loan(device, size, room)


def promised_bytes(device: str) -> int:
    """What is promised of a device's memory and not taken yet."""
    return sum(loan.promised for loan in list(_loans) if loan.device == device)


def take_back(device: str, size: int) -> int:
    """Have what is lent of a device given back until that is so many bytes or all; returns how many they are."""
    found = 0
    for loan in sorted((loan for loan in list(_loans) if loan.device == device), key=lambda loan: -loan.taken):
        if found >= size:
            break
        given_back = loan.give_back()
        found += given_back
        if given_back:
            logger.info("comfy_parallel: %s needs its memory: %d lent bytes are in RAM again", device, given_back)
    return found


def counting(original: Callable[..., Any], name_of: Callable[[Any], str]) -> Callable[..., Any]:
    """Wrap the host's `get_free_memory`: what is promised is not free."""

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        found = original(dev, torch_free_too)
        promised = promised_bytes(name_of(dev)) if _loans else 0
        if not promised:
            return found
        if torch_free_too:
            free, of_torch = found
            return max(0, free - promised), min(of_torch, max(0, free - promised))
        return max(0, found - promised)

    return get_free_memory


def yielding(
    original: Callable[..., Any], free_bytes: Callable[[Any], float], name_of: Callable[[Any], str]
) -> Callable[..., Any]:
    """Wrap the host's `free_memory`: what is lent goes back before a model of the slot is unloaded."""

    def free_memory(memory_required: float, device: Any, *args: Any, **kwargs: Any) -> Any:
        if _loans and device is not None:
            missing = memory_required - free_bytes(device)
            if missing > 0:
                take_back(name_of(device), int(min(missing, 1 << 62)))
        return original(memory_required, device, *args, **kwargs)

    return free_memory
