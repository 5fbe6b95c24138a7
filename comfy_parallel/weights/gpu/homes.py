"""Parameters that are shared tensors, and those on a device that were copied from one.

The way back costs nothing where nobody wrote to the copy, and other slots may copy from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from comfy_parallel.weights.files.regions import Region, origin_of, span_of
from comfy_parallel.weights.spans import Span

HOME = "comfy_parallel_home"  # of a parameter, as an attribute
Place = tuple[Region, Span]


class Arrival:
    """A block of copies on a GPU.

    Attributes:
        event: of CUDA, after which it is complete.
        seal: of its bytes as they arrived.
    """

    __slots__ = ("__weakref__", "_holders", "event", "seal")

    def __init__(self, parameters: list[Any], event: Any, seal: Any) -> None:
        self.event = event
        self.seal = seal
        self._holders = [ref(parameter) for parameter in parameters]

    def tensor(self) -> Any:
        """One of its tensors, which keeps its memory; None where none is left there."""
        for holder in self._holders:
            parameter = holder()
            home = home_of(parameter) if parameter is not None else None
            if parameter is None or home is None or home.arrival is not self:
                continue
            data = parameter.data  # It may go home at any time.
            if data.data_ptr() == home.copy_address:
                return data
        return None


class Home:
    """The shared tensor that a parameter is an alias of, or was copied from.

    Attributes:
        place: where the tensor lies.
        copy_address: where its copy on a device lies; 0 while it is an alias.
        arrival: of the copy, where it came in a block.
        size: in bytes.
    """

    __slots__ = ("__weakref__", "address", "arrival", "copy_address", "place", "size", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.place = place_of(tensor)
        self.address = tensor.data_ptr()
        self.copy_address = 0
        self.arrival: Arrival | None = None
        self.size = tensor.nbytes

    def is_like(self, parameter: Any) -> bool:
        """Whether they have the same dtype and shape."""
        span = self.place[1]
        return bool(parameter.dtype == span.dtype and parameter.shape == span.shape)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Parameters may be pickled; what they are read as has no home."""
        return _no_home, ()


def _no_home() -> None:
    pass


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
    """Say that a parameter was copied from a shared tensor to where it is.

    Args:
        arrival: None where it did not come in a block.
    """
    home.arrival = arrival  # first: others look at the parameter at any time
    home.copy_address = parameter.data_ptr()
    setattr(parameter, HOME, home)


def home_of(parameter: Any) -> Home | None:
    """The home of a parameter on a device; None if it has none, or is another tensor by now."""
    home: Home | None = getattr(parameter, HOME, None)
    if home is None or not home.copy_address or home.copy_address != parameter.data_ptr():
        return None
    return home if home.is_like(parameter) else None


def go_home(parameter: Any, home: Home) -> None:
    """Let a parameter on a device be the shared tensor again that it was copied from."""
    parameter.data = home.tensor  # Who copies from it keeps its memory until that is done.
    home.copy_address = 0
    home.arrival = None


def forget(parameter: Any) -> None:
    """The parameter is about to be written to or replaced, or has been."""
    home: Home | None = getattr(parameter, HOME, None)
    if home is not None:
        home.arrival = None
        delattr(parameter, HOME)
