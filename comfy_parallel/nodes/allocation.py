"""Allocation strings: how much of a model each device holds, read and written exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction

from comfy_parallel.errors import AllocationError

_UNITS = {"b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30}
_DEVICE = re.compile(r"[a-z_][a-z0-9_]*(:[0-9]+)?")
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[a-z]+)?")
_MAX_DIGITS = 40
_EXAMPLES = "write cuda:0,4gb;cpu,* or cuda:0,25%;cpu,75% or cuda:0,0.5;cpu,0.5"

BYTES, RATIO, FRACTION, WILDCARD = "bytes", "ratio", "fraction", "wildcard"
CPU = "cpu"
SLOT = "slot"  # the device of the slot that runs the job


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with its unit as it was written: ``, `%`, `*` or one of bytes (`b`, `kb`, `m`, …)."""

    number: Fraction
    unit: str = ""

    @property
    def size(self) -> int:
        """In bytes, where it is an amount of bytes; what is less than a byte is left out."""
        return int(self.number * _UNITS[self.unit or "b"])

    def __str__(self) -> str:
        return "*" if self.unit == "*" else f"{decimal(self.number)}{self.unit}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """Devices with their amounts, in the order in which they were written.

    `grammar` says what plain numbers mean: bytes, shares of the model (ratio) or of the device (fraction); it is
    `wildcard` where only `*` was written.
    """

    entries: tuple[tuple[str, Amount], ...]

    @property
    def grammar(self) -> str:
        return _grammar(amount.unit for _, amount in self.entries)

    @property
    def rest(self) -> str | None:
        """The device that takes what the others leave; None where none was named."""
        return next((device for device, amount in self.entries if amount.unit == "*"), None)

    def __str__(self) -> str:
        return ";".join(f"{device},{amount}" for device, amount in self.entries)


@dataclass(frozen=True, slots=True)
class Request:
    """What one node asks for. `expert` wins over the sizes; without both nothing leaves `compute`."""

    compute: str
    virtual_gb: Fraction = Fraction(0)
    donors: tuple[str, ...] = ()
    expert: Allocation | None = None

    @property
    def virtual_bytes(self) -> int:
        return int(self.virtual_gb * _UNITS["gb"])

    def __str__(self) -> str:
        tail = f"{self.compute};{decimal(self.virtual_gb)};{','.join(self.donors)}" if self.donors else self.compute
        return f"{self.expert or ''}#{tail}"


def parse(text: str, devices: Collection[str] | None = None) -> Allocation:
    """Read `device,amount;device,amount`; `devices` are those of this machine, None to take any.

    Raises:
        AllocationError: when it cannot be understood; the message says what to write.
    """
    parts = [part.strip() for part in text.strip().strip(";").split(";")]
    if parts == [""]:
        raise AllocationError(f"the allocation is empty; {_EXAMPLES}")
    entries = tuple(_entry(part, text, devices) for part in parts)
    _check_names([device for device, _ in entries], text)
    allocation = Allocation(entries)
    _check_amounts(allocation, text)
    return allocation


def parse_request(text: str, devices: Collection[str] | None = None) -> Request:
    """Read `allocation#compute;gigabytes;donor,donor`, as `str(request)` writes it.

    Raises:
        AllocationError: when it cannot be understood.
    """
    expert, hash_sign, tail = text.partition("#")
    fields = [field.strip() for field in tail.split(";")]
    if not hash_sign or len(fields) not in (1, 3) or "#" in tail:
        raise AllocationError(f"{text!r} is no allocation#compute;gigabytes;donors; write #cuda:0;4;cpu")
    return make_request(
        compute=fields[0],
        virtual_gb=fields[1] if len(fields) == 3 else "0",
        donors=fields[2] if len(fields) == 3 else "",
        expert=expert,
        devices=devices,
    )


def make_request(
    *, compute: str, virtual_gb: float | str, donors: str, expert: str = "", devices: Collection[str] | None = None
) -> Request:
    """Check what the widgets of a node say; `donors` are separated by commas.

    Raises:
        AllocationError: naming the input that is wrong.
    """
    compute = _device(compute, "the compute device", devices)
    names = tuple(_device(name.strip(), "a donor", devices) for name in donors.split(",") if name.strip())
    _check_names(names, donors)
    number = _number(str(virtual_gb).strip(), f"virtual_vram_gb is {virtual_gb!r}; write gigabytes, as 4 or 0.5")
    if number > 0 and not names and not expert.strip():
        raise AllocationError(f"virtual_vram_gb is {virtual_gb}, but no donor_device takes it; name one, as cpu")
    return Request(compute, number, names, parse(expert, devices) if expert.strip() else None)


def decimal(number: Fraction) -> str:
    """A number with finitely many decimals, with all of them."""
    digits = 0
    while (number * 10**digits).denominator != 1:
        digits += 1
    text = f"{int(number * 10**digits):0{digits + 1}d}"
    return f"{text[:-digits]}.{text[-digits:]}" if digits else text


def _entry(part: str, text: str, devices: Collection[str] | None) -> tuple[str, Amount]:
    if not part:
        raise AllocationError(f"{text!r} has nothing between two semicolons; {_EXAMPLES}")
    fields = [field.strip() for field in part.split(",")]
    if len(fields) != 2:
        raise AllocationError(f"{part!r} is no device,amount; {_EXAMPLES}")
    return _device(fields[0], part, devices), _amount(fields[1], part)


def _device(name: str, where: str, devices: Collection[str] | None) -> str:
    name = name.lower()
    if not _DEVICE.fullmatch(name):
        raise AllocationError(f"{where}: {name!r} is no device name; write one as cpu, cuda:0 or mps")
    if devices is not None and name not in devices:
        raise AllocationError(f"{where}: there is no device {name!r} here; there are {', '.join(devices)}")
    return name


def _amount(written: str, part: str) -> Amount:
    lower = written.lower()
    if lower == "*":
        return Amount(Fraction(0), "*")
    if "*" in lower:
        raise AllocationError(f"{part!r} has a number beside *, which takes what is left; write one of both")
    match = _AMOUNT.fullmatch(lower)
    if match is None:
        raise AllocationError(f"{part!r}: {written!r} is no amount; write 4gb, 512mb, 25%, 0.5 or *")
    unit = match[2] or ""
    if unit not in ("", "%") and unit not in _UNITS:
        raise AllocationError(f"{part!r}: {unit!r} is no unit; the units are %, b, kb, mb and gb")
    return Amount(_number(match[1], f"{part!r}: {written!r} is no amount"), unit)


def _number(text: str, problem: str) -> Fraction:
    if len(text) > _MAX_DIGITS or not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
        raise AllocationError(f"{problem} (a number of at most {_MAX_DIGITS} digits, without sign or exponent)")
    return Fraction(text)


def _grammar(units: Iterable[str]) -> str:
    found = set(units)
    if found <= {"*"}:
        return WILDCARD
    if "%" in found:
        return RATIO
    return BYTES if found & _UNITS.keys() else FRACTION


def _check_names(names: Collection[str], text: str) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise AllocationError(f"{text!r} names {', '.join(twice)} twice; give each device one amount")


def _check_amounts(allocation: Allocation, text: str) -> None:
    amounts = [amount for _, amount in allocation.entries]
    numbers = [amount.number for amount in amounts if amount.unit != "*"]
    units = {amount.unit for amount in amounts} - {"*"}
    if len(amounts) - len(numbers) > 1:
        raise AllocationError(f"{text!r} has * twice; only one device can take what is left")
    if "%" in units and len(units) > 1:
        raise AllocationError(f"{text!r} mixes % with other units; use one kind for all devices")
    if allocation.grammar == BYTES and any(amount.unit == "" and amount.number % 1 for amount in amounts):
        raise AllocationError(f"{text!r} mixes shares of a device with sizes; use one kind for all devices")
    if numbers and sum(numbers) == 0 and allocation.rest is None:
        raise AllocationError(f"{text!r} gives no device anything; give one an amount, or *")
    if allocation.grammar == RATIO and allocation.rest is not None and sum(numbers) > 100:
        raise AllocationError(f"{text!r} gives {decimal(sum(numbers, Fraction(0)))}% away and leaves nothing for *")
    if allocation.grammar == FRACTION and max(numbers) > 1:
        raise AllocationError(f"{text!r}: shares of a device are from 0 to 1; for sizes write a unit, as 4gb")
