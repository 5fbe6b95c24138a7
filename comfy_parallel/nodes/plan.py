"""Which weight of a model lives on which device: a pure function of their sizes and of what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes.allocation import BYTES, CPU, FRACTION, RATIO, Allocation, Request

_SMALL = 10_000  # A weight of less than such a part of the model is small.
_CLOSE = 1_000  # A device that lacks less than such a part of the model has what it was to get.


@dataclass(frozen=True, slots=True)
class Weight:
    """What can only be moved as a whole: a name and bytes. One that is not `movable` stays where the maths is done."""

    name: str
    size: int
    movable: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each weight lives. `quotas` are the bytes that each device was to hold, before weights were placed."""

    compute: str
    homes: Mapping[str, str]
    sizes: Mapping[str, int]
    quotas: Mapping[str, int]

    @property
    def held(self) -> dict[str, int]:
        """Bytes by device; the device that computes is always there."""
        held = {self.compute: 0}
        for name, device in self.homes.items():
            held[device] = held.get(device, 0) + self.sizes[name]
        return held

    @property
    def away(self) -> int:
        """Bytes that are not on the device that computes."""
        return sum(self.sizes.values()) - self.held[self.compute]

    def lines(self) -> list[str]:
        """The plan for people: a line for each device, and one for what leaves the device that computes."""
        counts = {device: sum(home == device for home in self.homes.values()) for device in self.held}
        total = sum(self.sizes.values())
        rows = [
            f"{device:<10} {size:>16} bytes  {100 * size / total if total else 0:6.2f}%  {counts[device]} weights"
            for device, size in self.held.items()
        ]
        return [*rows, f"{self.away} of {total} bytes leave {self.compute}"]


def place(request: Request, weights: Sequence[Weight], totals: Mapping[str, int]) -> Plan:
    """Give every weight a home. `totals` is the memory of each device in bytes.

    Devices hold at most their quotas; what fits nowhere goes to the device that takes the rest. Every device gets its
    share of each stretch of the model, so that what is fetched for the next layers comes while these compute. Weights
    of less than a ten-thousandth of the model take longer to fetch than they are worth: they stay while others can go.

    Raises:
        AllocationError: when a device's memory is needed and not known.
    """
    size = sum(weight.size for weight in weights)
    quotas, rest = _quotas(request, size, totals)
    room = dict(quotas)
    room[request.compute] = room.get(request.compute, 0) - sum(weight.size for weight in weights if not weight.movable)
    homes = {weight.name: request.compute for weight in weights if not weight.movable}
    movable = [weight for weight in weights if weight.movable]
    large = [weight for weight in movable if weight.size * _SMALL >= size]
    homes |= _interleaved(large, room, rest)
    for weight in movable:
        if weight.name not in homes:
            homes[weight.name] = request.compute if weight.size <= room[request.compute] else rest
            room[homes[weight.name]] = room.get(homes[weight.name], 0) - weight.size
    _fill(movable, homes, room, rest, size // _CLOSE)
    sizes = {weight.name: weight.size for weight in weights}
    return Plan(request.compute, {name: homes[name] for name in sizes}, sizes, quotas)


def _interleaved(weights: Sequence[Weight], room: dict[str, int], rest: str) -> dict[str, str]:
    """Homes for these in their order: each goes to the device that is furthest behind its share. Takes from `room`."""
    shares = {device: max(0, number) for device, number in room.items()}
    whole = max(1, sum(shares.values()))
    homes, given, seen = {}, dict.fromkeys(shares, 0), 0
    for weight in weights:
        seen += weight.size
        fits = [device for device in shares if weight.size <= room[device]]
        home = max(fits, key=lambda device: shares[device] * seen - given[device] * whole, default=rest)
        homes[weight.name] = home
        given[home] = given.get(home, 0) + weight.size
        room[home] = room.get(home, 0) - weight.size
    return homes


def _fill(weights: Sequence[Weight], homes: dict[str, str], room: dict[str, int], rest: str, close: int) -> None:
    """Move what is at `rest` to devices with room, the largest first, until there is less of it than `close` bytes."""
    for device in room:
        for weight in sorted(weights, key=lambda weight: -weight.size):
            if device == rest or room[device] <= close:
                break
            if homes[weight.name] == rest and weight.size <= room[device]:
                homes[weight.name] = device
                room[device] -= weight.size
                room[rest] = room.get(rest, 0) + weight.size


def _quotas(request: Request, size: int, totals: Mapping[str, int]) -> tuple[dict[str, int], str]:
    """The bytes for each device, donors first, and the device that takes the rest."""
    if request.expert is None:
        quotas = _virtual(request, size, totals)
        return {**quotas, request.compute: size - sum(quotas.values())}, request.compute
    asked = _asked(request.expert, size, totals)
    rest = request.expert.rest or (CPU if request.expert.grammar == BYTES else request.compute)
    quotas, left = {}, size
    for device, number in asked.items():
        quotas[device] = min(number, left)
        left -= quotas[device]
    quotas[rest] = quotas.get(rest, 0) + left
    donors_first = sorted(quotas, key=lambda device: device == request.compute)
    return {device: quotas[device] for device in donors_first}, rest


def _virtual(request: Request, size: int, totals: Mapping[str, int]) -> dict[str, int]:
    quotas, needed = {}, min(request.virtual_bytes, size)
    for donor in request.donors:
        if donor != request.compute and needed:
            quotas[donor] = min(needed, _total(donor, totals))
            needed -= quotas[donor]
    return quotas


def _asked(allocation: Allocation, size: int, totals: Mapping[str, int]) -> dict[str, int]:
    """What an allocation string gives each device, in bytes; without the device that takes the rest."""
    named = [(device, amount) for device, amount in allocation.entries if amount.unit != "*"]
    if allocation.grammar == FRACTION:
        return {device: int(amount.number * _total(device, totals)) for device, amount in named}
    if allocation.grammar != RATIO:
        return {device: amount.size for device, amount in named}
    whole = Fraction(100) if allocation.rest else sum((amount.number for _, amount in named), Fraction(0))
    quotas, share, given = {}, Fraction(0), 0
    for device, amount in named:
        share += amount.number
        quotas[device] = int(share * size / whole) - given
        given += quotas[device]
    return quotas


def _total(device: str, totals: Mapping[str, int]) -> int:
    if device not in totals:
        raise AllocationError(f"the memory of {device} is not known here; write bytes, as {device},4gb")
    return totals[device]
