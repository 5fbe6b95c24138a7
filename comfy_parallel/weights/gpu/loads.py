"""A model's way to a GPU and back: in blocks when it is loaded whole, weight by weight otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.weights.files.regions import Region
from comfy_parallel.weights.gpu import copies, homes
from comfy_parallel.weights.gpu.blocks import Block, blocks, bytes_of, is_in_one, memory_of, seal
from comfy_parallel.weights.gpu.homes import Arrival, Home

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.files.store import Store

logger = logging.getLogger(__name__)

Pair = tuple[Any, Home]  # a parameter and its home
_COMPARED = 64 << 20  # bytes at once

_lock = threading.Lock()
_arrivals: WeakKeyDictionary[Region, dict[Any, list[ref[Arrival]]]] = WeakKeyDictionary()  # by layout
_claimed: set[tuple[Region, Any]] = set()


def load_whole(store: Store, pairs: Iterable[Pair], device: Any) -> None:
    """Copy parameters from their homes to a CUDA device, in blocks, within `copies.complete()`."""
    alike = [pair for pair in pairs if pair[1].size]
    with _in_order(blocks(alike), device) as ordered:
        for block in ordered:
            copies.give_back()
            _load(store, block, device)


def load_apart(store: Store, pairs: Sequence[Pair], device: Any) -> None:
    """Copy parameters from their homes to a CUDA device, one by one, within `copies.complete()`."""
    for (parameter, home), copy in zip(pairs, copies.apart(pairs, device, store.may_pin), strict=True):
        parameter.data = copy
        homes.remember(parameter, home, None)


def unchanged(store: Store, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of these parameters on a device that still have the numbers of their homes.

    The others are forgotten: somebody wrote to them. A block is compared with its seal, single weights with RAM.
    """
    found: list[Pair] = []
    in_blocks: dict[tuple[Any, Arrival | None], list[Pair]] = {}
    for parameter, home in pairs:
        if home.place[0].is_lost:
            homes.forget(parameter)  # Its numbers are here only.
        else:
            in_blocks.setdefault((parameter.device, home.arrival), []).append((parameter, home))
    for (_, arrival), together in in_blocks.items():
        if arrival is not None and _is_sealed(arrival, together[0][0]):
            found += together
        else:
            found += _compared(store, together)
    return found


def take_apart(store: Store, pairs: Sequence[tuple[Any, Home | None]]) -> None:
    """Give weights in blocks memory of their own, before they go one by one: a block goes with its last.

    Where a block's weights find no other room they stay.
    """
    together: dict[int, list[tuple[Any, Home | None]]] = {}
    for parameter, home in pairs:
        if is_in_one(parameter):
            together.setdefault(parameter.untyped_storage().data_ptr(), []).append((parameter, home))
    for block in together.values():
        known = {id(parameter) for parameter, _ in unchanged(store, [(p, home) for p, home in block if home])}
        _clone(block, known)


def _clone(block: Sequence[tuple[Any, Home | None]], unchanged: Collection[int]) -> None:
    import torch

    made = []
    try:
        for parameter, _ in block:
            with torch.inference_mode(parameter.is_inference()):
                made.append(parameter.data.clone())
    except torch.OutOfMemoryError:
        logger.debug("no room on %s for a block's weights one by one", block[0][0].device)
        return
    for (parameter, home), copy in zip(block, made, strict=True):
        parameter.data = copy
        if home is not None and id(parameter) in unchanged:
            homes.remember(parameter, home, None)


def _load(store: Store, block: Block, device: Any) -> None:
    import torch

    memory = block.memory(device)
    stream = torch.cuda.current_stream(memory.device)
    lender = _lender(block, memory.device.index)
    if lender is not None:
        sealed = copies.borrow(block, memory, *lender, store.may_pin)
    else:
        copies.read(block, memory, store.may_pin)
        sealed = seal(memory)
    arrival = Arrival(block.parameters, stream.record_event(), sealed)
    for parameter, home, weight in zip(block.parameters, block.homes, block.weights(memory), strict=True):
        parameter.data = weight
        homes.remember(parameter, home, arrival)
    with _lock:
        others = _arrivals.setdefault(block.region, {}).setdefault(block.layout, [])
        others[:] = [*(other for other in others if other() is not None), ref(arrival)]


@contextmanager
def _in_order(made: Iterable[Block], device: Any) -> Iterator[Iterator[Block]]:
    """First what neither a GPU has nor another load reads from RAM at the moment, then the rest.

    So of slots that load the same at the same time each reads a share from RAM, and the others' from their GPUs.
    """
    import torch

    gpu = torch.cuda.current_stream(device).device.index
    mine: list[tuple[Region, Any]] = []

    def ordered() -> Iterator[Block]:
        later = []
        for block in made:
            key = block.region, block.layout
            if _lender(block, gpu) is None and _claim(key):
                mine.append(key)
                yield block
            else:
                later.append(block)
        yield from later

    try:
        yield ordered()
    finally:
        with _lock:
            _claimed.difference_update(mine)


def _claim(key: tuple[Region, Any]) -> bool:
    with _lock:
        is_free = key not in _claimed
        _claimed.add(key)
    return is_free


def _lender(block: Block, target: int) -> tuple[Any, Arrival] | None:
    """A tensor in such a block on a GPU, on the target itself if there is one, and its arrival."""
    with _lock:
        arrivals = [one() for one in _arrivals.get(block.region, {}).get(block.layout, ())]
    found = None
    for arrival in arrivals:
        tensor = arrival.tensor() if arrival is not None else None
        if arrival is None or tensor is None or not copies.is_fast(tensor.device.index, target):
            continue
        if tensor.device.index == target:
            return tensor, arrival
        found = found or (tensor, arrival)
    return found


def _is_sealed(arrival: Arrival, parameter: Any) -> bool:
    import torch

    return torch.equal(seal(memory_of(parameter.data)), arrival.seal)


def _compared(store: Store, pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose bytes are those of their homes; the others are forgotten."""
    found: list[Pair] = []
    together: list[Pair] = []
    total = 0
    for pair in pairs:
        together.append(pair)
        total += pair[1].size
        if total >= _COMPARED:
            found += _equal(store, together)
            together, total = [], 0
    found += _equal(store, together)
    kept = {id(parameter) for parameter, _ in found}
    for parameter, _ in pairs:
        if id(parameter) not in kept:
            logger.debug("comfy_parallel: a weight was written to on %s; it is copied back", parameter.device)
            homes.forget(parameter)
    return found


def _equal(store: Store, pairs: Sequence[Pair]) -> list[Pair]:
    import torch

    if not pairs:
        return []
    device = pairs[0][0].device
    try:
        with copies.uncounted(), copies.complete():
            originals = copies.apart(pairs, device, store.may_pin)
    except torch.OutOfMemoryError:
        return [pair for pair in pairs if _are_equal(pair[0].data.cpu(), pair[1].tensor)]
    return [pair for pair, original in zip(pairs, originals, strict=True) if _are_equal(pair[0].data, original)]


def _are_equal(tensor: Any, original: Any) -> bool:
    """Bit for bit: not a number is equal to itself here."""
    import torch

    if not tensor.is_contiguous():
        return False
    return torch.equal(bytes_of(tensor), bytes_of(original))
