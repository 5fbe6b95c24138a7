"""Finds out, while a forward is recorded, whether a replay could ever do something else than the forward would."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

from comfy_parallel.graphs.code import is_known
from comfy_parallel.graphs.collection import no_collection
from comfy_parallel.graphs.refusal import refusals_count, refuse


@contextmanager
def watching(device: Any, known: Iterable[Any]) -> Iterator[Collection[CodeType]]:
    """Stops the body before it does what a recording cannot hold.

    What remains: it computes on `device` from the `known` tensors, draws no random numbers, waits for nothing, writes
    only to what it has made itself, and all of its Python is ComfyUI's or a library's.

    Raises:
        Uncapturable: naming what the body was about to do.
    """
    ran: dict[int, CodeType] = {}  # by id: to hash a code takes long
    with no_collection(), refusals_count(), _mode_class()(_Watch(device, known)), _only_known_code(ran):
        yield ran.values()


@contextmanager
def _only_known_code(ran: dict[int, CodeType]) -> Iterator[None]:
    """A node pack's function may keep a state of its own, which a recording would freeze."""
    before = sys.getprofile()

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            name = frame.f_globals.get("__name__") or ""
            if frame.f_code.co_name == "get_free_memory":
                refuse("chooses by how much memory is free")
            if not is_known(name):
                refuse(f"runs code of {_last_part(name)}")
            ran[id(frame.f_code)] = frame.f_code

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _last_part(module: str) -> str:
    """A node pack's modules are named after its directory, and dots in there after what the host writes for them."""
    return module.replace("\\", "/").rpartition("/")[2].partition(".")[0] or "an unnamed module"


@functools.cache
def _mode_class() -> type:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        """Sees every operation below torch's composite ones."""

        def __init__(self, watch: _Watch) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._watch = watch

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # True lets torch import its compiler at the first operation, which takes seconds.

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not isinstance(func, torch._ops.OpOverload):
                refuse(f"{func} is no plain operation")
            self._watch.before(func, args, kwargs or {})
            result = func(*args, **kwargs or {})
            self._watch.after(result)
            return result

    return Mode


class _Watch:
    """What a body reads and makes. A storage is known by a weak reference: it may be freed meanwhile, and no later one
    is mistaken for it."""

    def __init__(self, device: Any, known: Iterable[Any]) -> None:
        import torch

        self._device = device
        self._tensor = torch.Tensor
        self._known = {_storage(tensor) for tensor in known}
        self._made: set[Any] = set()

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        traits = _traits(func)
        target = kwargs.get("device")
        if target is not None and not self._is_own(target):
            refuse(f"{func} computes on another device")
        if traits.waits:
            refuse(f"{func} waits for a result")
        for tensor in self._tensors((*args, *kwargs.values())):
            self._check_read(func, tensor)
        for position, name in traits.written:
            value = args[position] if position < len(args) else kwargs.get(name)
            if not self._made.issuperset(map(_storage, self._tensors((value,)))):
                refuse(f"{func} writes to a tensor from outside")
        if traits.draws and traits.drops(args, kwargs):
            refuse(f"{func} draws random numbers")

    def after(self, result: Any) -> None:
        self._made.update(map(_storage, self._tensors((result,))))

    def _check_read(self, func: Any, tensor: Any) -> None:
        if tensor.device != self._device:
            refuse(f"{func} reads from another device")
        storage = _storage(tensor)
        if storage not in self._made and storage not in self._known:
            refuse(f"{func} reads a tensor from outside")

    def _is_own(self, device: Any) -> bool:
        return bool(device.type == self._device.type and device.index in (None, self._device.index))

    def _tensors(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            if isinstance(value, self._tensor):
                yield value
            elif type(value) in (list, tuple):
                yield from self._tensors(value)


def _storage(tensor: Any) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Traits:
    """What an operation's schema says."""

    waits: bool
    draws: bool
    written: tuple[tuple[int, str], ...]
    names: tuple[str, ...]
    defaults: dict[str, Any]

    def drops(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Dropout that drops nothing draws nothing."""
        values = self.defaults | dict(zip(self.names, args, strict=False)) | kwargs
        for name in ("dropout_p", "p", "dropout"):
            if name in values:
                return values.get("train") is not False and values[name] != 0.0
        return True


@functools.cache
def _traits(func: Any) -> _Traits:
    import torch

    tags, arguments = set(func.tags), func._schema.arguments
    return _Traits(
        waits=bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & tags),
        draws=torch.Tag.nondeterministic_seeded in tags,
        written=tuple(
            (position, argument.name)
            for position, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        names=tuple(argument.name for argument in arguments),
        defaults={argument.name: argument.default_value for argument in arguments},
    )
