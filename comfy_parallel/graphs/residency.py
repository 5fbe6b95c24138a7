"""Weights that lie in pages of GPU memory which the host may take away: what dynamic VRAM is to a recorded forward.

The host reserves one range of addresses per model (a VBAR) and gives each of its larger modules a place there, `_v`,
for as long as the model lives. Memory is put behind the range page by page, and taken away again when it is short. Each
page has a serial number, which changes when it gets other memory. To fault a part of the range is to make all of its
pages be there, and stay there until they are unpinned; it returns their serial numbers.

A recorded forward holds addresses in the range. It may run while all pages are pinned and have the serial numbers with
which it was recorded: then they still hold what the host had put there. What the host puts into a page that stays (a
LoRA's weights) is told by the objects that it notes on the module whenever it fills its place.

Where memory is short, to fault what is not there takes away pages that are: of other models, and from the end of the
same one, as many as are asked for. So the range is faulted only if all of it is there, or there is room for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from operator import getitem, is_
from typing import Any, NoReturn

from comfy_parallel.graphs.refusal import UncapturableNow, refuse

ELSEWHERE = "weights that live on other devices"
TOO_LARGE = "weights that do not all fit on the GPU"
_PAGE = 32 << 20  # comfy_aimdo, model-vbar.c: VBAR_PAGE_SIZE
_SPARE = 1 << 30  # bytes that the host leaves free, and what a forward needs besides
# What the host notes on modules and models from use to use, or replaces by its equal at each load.
NOTES = frozenset(
    {
        *("_prefetch", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_v_block_faulted"),
        *("_pins", "_pin", "_pin_state", "pin_failed", "weight_lowvram_function", "bias_lowvram_function"),
        *("dynamic_patchers", "dynamic_pins", "model_loaded_weight_memory"),
    }
)
_FILLED = ("_v_signature", "_v_weight", "_v_bias")


class NoPages:
    """Stands for the range of modules whose weights never get pages: the host fetches them whenever it uses them."""

    def fault(self, address: int, size: int) -> None:
        """As a range answers when a place cannot have its pages."""

    def unpin(self, address: int, size: int) -> None:
        """Nothing was pinned."""


NOWHERE = (NoPages(), 0, 0)  # a module's place, `_v`


def is_paged(module: Any, device: Any) -> bool:
    """Whether the host copies a module's weights into its place in the range to use them."""
    weight = module._parameters.get("weight")
    return type(vars(module).get("_v")) is tuple and weight is not None and weight.device != device


class Pages:
    """The pages of a model that has just been used.

    Args:
        modules: those for which `is_paged` is true.

    Raises:
        UncapturableNow: when not all pages can be there at once, or when they are of a kind that we do not know.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        modules = list(modules)
        self._range = _range_of(modules)
        self._end = self._range.offset if modules else 0
        self._serials: bytes | None = None
        if not self._has_room():
            raise UncapturableNow(TOO_LARGE)
        with self._pinned() as serials:
            filled = [_is_filled(module) for module in modules]
        self._serials = serials
        self._used = [vars(module) for module, is_used in zip(modules, filled, strict=True) if is_used]
        self._unused = [vars(module) for module, is_used in zip(modules, filled, strict=True) if not is_used]
        self._notes = list(self._read_notes())

    def hold(self) -> bool:
        """Pin all pages, if they are all as they were; if not, it leaves none pinned. Ask in every step."""
        if self._range is None:
            return True
        if self._range.offset != self._end or self._missing_bytes():
            return False
        serials = self._range.fault(self._range.base_addr, self._end)
        if serials is None:
            return False
        if bytes(serials) == self._serials:
            return True
        self.release()
        return False

    def release(self) -> None:
        """Unpin what `hold` has pinned. What the GPU has been told to do by then still finds the pages."""
        if self._range is not None:
            self._range.unpin(self._range.base_addr, self._end)

    def are_filled_as_before(self) -> bool:
        """Whether the host has put nothing else into the pages, and will not before it uses them."""
        try:
            return all(map(is_, self._read_notes(), self._notes))
        except KeyError:
            return False

    def tensors(self) -> list[Any]:
        """The weights as a forward sees them."""
        return [note[name] for note in self._used for name in ("_v_weight", "_v_bias") if note[name] is not None]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In the body all pages are pinned, and a use of a weight that was not used before is refused.

        Raises:
            UncapturableNow: when the pages are no longer as they were.
        """
        places = [note["_v"] for note in self._unused]
        if not self.hold():
            raise UncapturableNow(TOO_LARGE)
        try:
            for note in self._unused:
                note["_v"] = _NotFilled()
            yield
        finally:
            for note, place in zip(self._unused, places, strict=True):
                note["_v"] = place
            self.release()

    def _missing_bytes(self) -> int:
        """How much of the range has no memory now."""
        pages: int = -(-self._end // _PAGE)
        there: int = self._range.loaded_size()
        return max(0, pages * _PAGE - there)

    def _has_room(self) -> bool:
        """Whether all pages can be there without taking any away."""
        import torch

        missing = self._missing_bytes() if self._range is not None else 0
        return not missing or bool(missing + _SPARE <= torch.cuda.mem_get_info(self._range.device)[0])

    @contextmanager
    def _pinned(self) -> Iterator[bytes | None]:
        if self._range is None:
            yield None
            return
        serials = self._range.fault(self._range.base_addr, self._end)
        if serials is None:
            raise UncapturableNow(TOO_LARGE)
        try:
            yield bytes(serials)
        finally:
            self.release()

    def _read_notes(self) -> Iterator[Any]:
        for name in _FILLED:
            yield from map(getitem, self._used, repeat(name))


class _NotFilled:
    """Stands in for a module's place while a forward is recorded: the host would copy its weights there to use them."""

    def __iter__(self) -> NoReturn:
        refuse("weights that it did not use before")


def _range_of(modules: list[Any]) -> Any:
    ranges = {id(module._v[0]): module._v[0] for module in modules}
    if id(NOWHERE[0]) in ranges:
        raise UncapturableNow(ELSEWHERE)
    if len(ranges) > 1:
        raise UncapturableNow("weights in more than one range")
    for found in ranges.values():
        if all(hasattr(found, name) for name in ("fault", "unpin", "base_addr", "offset", "loaded_size", "device")):
            return found
        raise UncapturableNow("dynamic VRAM of a kind we do not know")
    return None


def _is_filled(module: Any) -> bool:
    """Whether a module's place holds its weights. If not, the last forward has not used them, for its pages fit."""
    signature, (pages, address, size) = vars(module).get("_v_signature"), module._v
    if signature is None or any(name not in vars(module) for name in _FILLED):
        return False
    now = pages.fault(address, size)
    if now is None:
        return False
    try:
        return bytes(now) == bytes(signature)
    finally:
        pages.unpin(address, size)
