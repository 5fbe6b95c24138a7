"""Parameters that are shared tensors, and those on a device that are unchanged copies of one.

The way back costs nothing, and other slots may copy from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.weights.files.regions import Region, origin_of, span_of
from comfy_parallel.weights.gpu import peers
from comfy_parallel.weights.spans import Span

HOME = "comfy_parallel_home"  # of a parameter, as an attribute
Place = tuple[Region, Span]


@dataclass(slots=True, eq=False)
class Arrival:
    """Copies on a device that were made together.

    Attributes:
        event: of CUDA, after which they are complete.
        layout: how they lie in memory that they alone have; None where each has its own.
        is_whole: whether all of them still are there, unchanged.
    """

    event: Any
    layout: Hashable = None
    is_whole: bool = True


class Home:
    """The shared tensor that a parameter is an alias of, or a copy of.

    Attributes:
        copy_address: where its copy on a device lies; 0 while it is an alias.
        arrival: of the copy; None where others may not copy from it.
        is_listed: among those that others may copy from.
        holders: all that are, of the same place.
        size: in bytes.
    """

    __slots__ = ("__weakref__", "address", "arrival", "copy_address", "holders", "is_listed", "place", "size", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.place = region, span = place_of(tensor)
        self.address = tensor.data_ptr()
        self.copy_address = 0
        self.arrival: Arrival | None = None
        self.is_listed = False
        self.size = tensor.nbytes
        with _lock:
            self.holders = _holders.setdefault(region, {}).setdefault(span, [])

    def depart(self) -> None:
        """The copy is not what arrived, from now on: nobody copies from it, nor from all of its block at once."""
        if self.arrival is not None:
            self.arrival.is_whole = False
            self.arrival = None

    def is_like(self, parameter: Any) -> bool:
        """Whether they have the same dtype and shape."""
        span = self.place[1]
        return bool(parameter.dtype == span.dtype and parameter.shape == span.shape)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Parameters may be pickled; what they are read as has no home."""
        return _no_home, ()


def _no_home() -> None:
    pass


_lock = threading.Lock()
_holders: WeakKeyDictionary[Region, dict[Span, list[ref[Any]]]] = WeakKeyDictionary()


def place_of(tensor: Any) -> Place:
    """Where a shared tensor lies."""
    origin = origin_of(tensor)
    assert origin is not None
    return origin.region, span_of(tensor, origin)


def home_at(parameter: Any, shared_data: Callable[[Any], Any]) -> Home | None:
    """The home of a parameter that is an alias of a shared tensor; None if it is none.

    Args:
        shared_data: gives that tensor, or None. Not asked while the parameter's memory is the same as before.
    """
    home: Home | None = getattr(parameter, HOME, None)
    if (
        home is not None
        and not home.copy_address
        and parameter.data_ptr() == home.address
        and home.is_like(parameter)
        and parameter.stride() == home.place[1].stride
    ):
        return home
    data = shared_data(parameter)
    if data is None:
        return None
    home = Home(data)
    setattr(parameter, HOME, home)
    return home


def remember(parameter: Any, home: Home, arrival: Arrival | None) -> None:
    """Say that a parameter is a copy of a shared tensor, or will be one with this arrival.

    Args:
        arrival: None where others may not copy from it.
    """
    home.depart()
    home.arrival = arrival  # first: others look at the parameter at any time
    home.copy_address = parameter.data_ptr()
    setattr(parameter, HOME, home)
    if arrival is not None and not home.is_listed:
        _list(parameter, home)


def _list(parameter: Any, home: Home) -> None:
    with _lock:
        others = [holder for holder in home.holders if holder() is not None and holder() is not parameter]
        home.holders[:] = [*others, ref(parameter)]
        home.is_listed = True


def home_of(parameter: Any) -> Home | None:
    """The home of a parameter on a device; None if it has none, or is another tensor by now."""
    home: Home | None = getattr(parameter, HOME, None)
    if home is None or not home.copy_address or home.copy_address != parameter.data_ptr():
        return None
    return home if home.is_like(parameter) else None


def send_home(parameter: Any) -> None:
    """Let a parameter on a device that still is a copy of a shared tensor be that tensor again."""
    home = home_of(parameter)
    if home is not None:
        parameter.data = home.tensor  # Who copies from it keeps its memory until that is done.
        home.copy_address = 0
        home.depart()


def forget(parameter: Any) -> None:
    """Call this before a parameter is written to or replaced: GPUs that copy from it finish first."""
    with _lock:
        home: Home | None = getattr(parameter, HOME, None)
        if home is not None:
            home.depart()
            delattr(parameter, HOME)
    if home is not None and parameter.device.type == "cuda":
        peers.wait_for_readers(parameter.device.index)


def is_lent(homes: Sequence[Home], target: int) -> bool:
    """Whether a GPU has some of these, from which that GPU gets them faster than from RAM: a look at a few of them."""
    return any(_lender(homes[number], target) is not None for number in {0, len(homes) // 2, len(homes) - 1})


def borrow(homes: Sequence[Home], copies: Sequence[Any], layout: Hashable = None) -> dict[int, Any]:
    """Queue copies of these homes to the tensors in `copies` from parameters that are on a GPU, where that is fast.

    A parameter whose own copy is still under way is copied from as soon as that is complete, so that slots that load
    the same at the same time read it once.

    Args:
        layout: how the copies lie in memory that they alone have.

    Returns what is copied from, by its number, to be kept until that is done. The others are not copied.
    """
    target = copies[0].device.index
    if not is_lent(homes, target):
        return {}
    with _lock:
        whole = _lender(homes[0], target)
        if layout is not None and whole is not None and whole[1].is_whole and whole[1].layout == layout:
            peers.copy([(_memory_of(whole[0]), _memory_of(copies[0]))], [whole[1].event])
            return dict.fromkeys(range(len(homes)), whole[0])
        lenders = [_lender(home, target) for home in homes]
        found = {number: lender for number, lender in enumerate(lenders) if lender is not None}
        pairs = [(source, copies[number]) for number, (source, _) in found.items()]
        peers.copy(pairs, {arrival.event for _, arrival in found.values()})
    return {number: source for number, (source, _) in found.items()}


def _memory_of(tensor: Any) -> Any:
    """All bytes of the memory that it lies in."""
    import torch

    with torch.inference_mode():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _lender(home: Home, target: int) -> tuple[Any, Arrival] | None:
    """The numbers of a parameter on a GPU, on the target itself if there is one, and when they arrive."""
    found = None
    for holder in home.holders:
        parameter = holder()
        own: Home | None = getattr(parameter, HOME, None)
        if parameter is None or own is None or own.arrival is None or own.holders is not home.holders:
            continue
        # The parameter may go home or leave again at any time; so this order, that of `remember`.
        data = parameter.data
        is_copy = data.is_cuda and own.copy_address == data.data_ptr()
        arrival = own.arrival
        is_still = own.copy_address == data.data_ptr()  # else the arrival may be another one's
        if is_copy and is_still and arrival is not None and peers.is_faster_than_ram(data.device.index, target):
            if data.device.index == target:
                return data, arrival
            found = found or (data, arrival)
    return found
