"""What a recorded forward relies on in its model: where its weights lie, and how its modules are set up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import repeat
from operator import getitem, is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

from comfy_parallel.graphs.code import is_known, module_of
from comfy_parallel.graphs.refusal import UncapturableNow
from comfy_parallel.graphs.residency import NOTES, Pages, is_paged

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CHANGING = NOTES | {"_parameters", "_buffers", "current_patcher"}  # those two are looked at by themselves


class ModelState:
    """A model as it is now, after it has been used.

    Args:
        device: where its weights must be, or be copied for each use (`residency`); buffers that are never read may be
            elsewhere.

    Raises:
        UncapturableNow: when a part of it is elsewhere, or is changed while it is used.
    """

    def __init__(self, model: Any, device: Any) -> None:
        import torch

        modules = list(model.modules())
        self._stores = [store for module in modules for store in (module._parameters, module._buffers) if store]
        paged = [module for module in modules if is_paged(module, device)]
        entries = _entries_apart_from(self._stores, paged)
        placed = [store[name] for store, name in entries if store[name] is not None]
        if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in self._all_tensors()):
            raise UncapturableNow("weights of a special type")
        if any(type(tensor) is torch.nn.Parameter and tensor.device != device for tensor in placed):
            raise UncapturableNow("weights that are not on the GPU")
        for module in modules:
            _check_plain(module)
        self._pages = Pages(paged)
        self._places = _Places(self._stores, entries, torch.Tensor.data_ptr)
        self.setup = ModelSetup(modules, self._stores)

    def tensors(self) -> list[Any]:
        """The weights and buffers that a forward may read. Not kept: a replaced one is to go."""
        return [*self._places.tensors(), *self._pages.tensors()]

    def has_same_weights(self) -> bool:
        """Whether every weight still lies where it lay. Values may change in place: a replay reads them anew."""
        return self._places.are_unchanged()

    def has_same_structure(self) -> bool:
        """Whether the modules are the same objects, set up in the same way. Slower than the above."""
        return self.setup.is_unchanged() and self._pages.are_filled_as_before()

    def hold(self) -> bool:
        """See that the weights stay where they are until `release`; False if they are no longer there."""
        return self._pages.hold()

    def release(self) -> None:
        """After `hold`."""
        self._pages.release()

    def recording(self) -> AbstractContextManager[None]:
        """In the body, the weights stay where they are, and a forward can be recorded."""
        return self._pages.recording()

    def _all_tensors(self) -> list[Any]:
        return [tensor for store in self._stores for tensor in store.values() if tensor is not None]


class ModelSetup:
    """How a model's modules are set up, wherever its weights lie: what decides, with its arguments and the code, what
    its forward does in Python."""

    def __init__(self, modules: list[Any], stores: list[dict[str, Any]]) -> None:
        self._stores = stores
        self._layouts = self._read_layouts()
        self._devices = self._read_devices()
        self._parts = [_Setup(module) for module in modules]
        self._parts += [_Setup(value) for module in modules for value in _settings_of(module)]

    def is_unchanged(self) -> bool:
        return all(part.is_unchanged() for part in self._parts) and self._read_layouts() == self._layouts

    def is_on_the_same_devices(self) -> bool:
        return self._read_devices() == self._devices

    def _read_layouts(self) -> list[Any]:
        return [(name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in self._items()]

    def _read_devices(self) -> list[Any]:
        return [tensor.device for _, tensor in self._items()]

    def _items(self) -> list[tuple[str, Any]]:
        return [item for store in self._stores for item in store.items() if item[1] is not None]


def _entries_apart_from(stores: list[dict[str, Any]], paged: list[Any]) -> list[tuple[dict[str, Any], str]]:
    """What lies at an address of its own."""
    in_pages = {(id(module._parameters), name) for module in paged for name in ("weight", "bias")}
    return [(store, name) for store in stores for name in store if (id(store), name) not in in_pages]


class _Places:
    """Where the tensors of a model lie, by their names. Read in every step: no loop of it runs in Python."""

    __slots__ = ("_address_of", "_addresses", "_set", "_sizes", "_stores", "_unset")

    def __init__(
        self,
        stores: list[dict[str, Any]],
        entries: list[tuple[dict[str, Any], str]],
        address_of: Callable[[Any], int],
    ) -> None:
        self._stores = stores
        self._address_of = address_of
        self._set = _columns([(store, name) for store, name in entries if store[name] is not None])
        self._unset = _columns([(store, name) for store, name in entries if store[name] is None])
        self._sizes = list(map(len, stores))
        self._addresses = self._read()

    def are_unchanged(self) -> bool:
        try:
            return (
                self._read() == self._addresses
                and list(map(len, self._stores)) == self._sizes
                and all(map(is_, map(getitem, *self._unset), repeat(None)))
            )
        except (KeyError, TypeError, RuntimeError):  # a name is gone; or what it stands for has no address
            return False

    def tensors(self) -> list[Any]:
        return list(map(getitem, *self._set))

    def _read(self) -> list[int]:
        return list(map(self._address_of, map(getitem, *self._set)))


def _columns(entries: list[tuple[dict[str, Any], str]]) -> tuple[list[dict[str, Any]], list[str]]:
    return [store for store, _ in entries], [name for _, name in entries]


class _Setup:
    """An object's class and attributes: the same objects, and where these are lists or the like, with the same content.

    A module's children are among its attributes, so modules that are unchanged are still the whole model.
    """

    __slots__ = ("_class", "_num_names", "_owner", "_read", "_stores", "_values")

    def __init__(self, owner: Any) -> None:
        attributes = vars(owner)
        names = [name for name in attributes if name not in _CHANGING]
        self._class = type(owner)
        self._owner = weakref.ref(owner)
        self._num_names = len(names)
        self._stores = _stores_of(attributes)
        self._read: Any = itemgetter(*names, names[0]) if names else lambda _: ()  # twice: it returns a tuple
        self._values = tuple(map(_copied, self._read(attributes)))

    def is_unchanged(self) -> bool:
        owner = self._owner()
        attributes = owner.__dict__ if owner is not None else {}
        num_names = len(attributes) - len(_CHANGING.intersection(attributes))
        if type(owner) is not self._class or num_names != self._num_names or _stores_of(attributes) != self._stores:
            return False
        try:
            return bool(self._read(attributes) == self._values)
        except Exception:  # noqa: BLE001 - one is gone; or two that cannot be compared, such as arrays
            return False


def _stores_of(attributes: dict[str, Any]) -> tuple[int, ...]:
    """Which ones a module has, and their sizes. Those with anything in them are kept, so no later one has their id."""
    parameters, buffers = attributes.get("_parameters", ()), attributes.get("_buffers", ())
    return id(parameters), len(parameters), id(buffers), len(buffers)


def _settings_of(module: Any) -> Iterator[Any]:
    """The objects that hold a module's settings, such as sizes."""
    for name, value in vars(module).items():
        if name not in _CHANGING and type(value).__module__.startswith("comfy.") and hasattr(value, "__dict__"):
            yield value


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else value


def _check_plain(module: Any) -> None:
    attributes = vars(module)
    if any(attributes.get(name) for name in _HOOKS):
        raise UncapturableNow("a model with hooks")
    if attributes.get("weight_function") or attributes.get("bias_function"):
        raise UncapturableNow("weights that are patched while they are used")
    for value in attributes.values():
        if isinstance(value, FunctionType | MethodType) and not is_known(module_of(value)):
            raise UncapturableNow("a model whose modules a node has changed")
