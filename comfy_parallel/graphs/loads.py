"""What a host with dynamic VRAM does at the start of every run of a sampler, encoder or decoder: it loads the model.

Its load goes through all modules in Python, although most often all is set already, and puts the small weights at other
addresses each time. Here they stay where they were first, and a load that would set what is set is left out: then only
the small weights get the numbers again that they had after the last load, in case somebody wrote to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from operator import getitem, is_
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

MOST_SETS = 4  # of small weights per model and slot
_ALIGNMENT = 512  # bytes; torch's own, by which kernels are chosen
_KINDS = ("_parameters", "_buffers", "_modules")
_SETTINGS = (
    *("comfy_cast_weights", "seed_key", "_pin_state", "pin_failed", "_v", "weight_function", "bias_function"),
    *("weight_lowvram_function", "bias_lowvram_function", "weight_comfy_model_dtype", "bias_comfy_model_dtype"),
)
# All names in the code of the loads that we know. One that uses another may do more than we know of.
_NAMES = """
    CallbacksMP DEBUG HostBuffer INFO LowVramPatch ON_LOAD QuantizedTensor TensorGeometry __class__ __name__
    _last_prepare_log_key _load_list _model_dtype _pin_state _v _v_block _v_signature _vbar_get alloc append apply_hooks
    backup backup_buffers bool calculate_shape collections comfy comfy_aimdo comfy_cast_weights
    current_weight_patches_uuid delattr device dtype dynamic_pins element_size enumerate extend forced_hooks
    get_all_callbacks get_key_weight getattr hasattr host_buffer info isinstance key_param_name_to_key len list
    load_device log logging lora max memory_management model model_loaded_weight_memory model_management model_size
    model_vbar modules move_weight_functions named_buffers namedtuple numel patch_weight_to_device patches patches_uuid
    pin_failed pinned_hostbuf_size pop prioritize resolve_attr restore_loaded_backups seed_key set_attr_buffer
    set_attr_param setattr shape sort to tqdm tuple unpatch_hooks use_ejected utils values vbar_unpin vram_aligned_size
    weight weight_wrapper_patches
"""
_KNOWN_NAMES = frozenset(_NAMES.split())


def is_known(load: Callable[..., Any]) -> bool:
    """Whether we know all that this load does."""
    return _KNOWN_NAMES.issuperset(_names_in(load.__code__))


def starts_anew(load: Callable[..., Any]) -> bool:
    """Whether this load gives the small weights the numbers of the model's file each time."""
    return "restore_loaded_backups" in _names_in(load.__code__)


class Loads:
    """The last load of each model.

    Args:
        patcher_class: the host's class, whose load we know; what others load is not left out.
        on_load: the host's name for callbacks that a load calls.
        renews: whether the host's load gives the small weights their numbers again.
    """

    def __init__(self, patcher_class: type, on_load: str, renews: bool) -> None:
        self._patcher_class = patcher_class
        self._renews = renews
        self._on_load = on_load
        self._small: WeakKeyDictionary[Any, list[_SmallWeights]] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[Any, _Load] = WeakKeyDictionary()

    def repeat(self, patcher: Any, device: Any) -> bool:
        """Load a model by doing nothing but what the last load did besides setting things; False if it takes more."""
        model = patcher.model
        last = self._last.get(model)
        if last is None or not self._is_plain(patcher, device) or not last.is_still_so(patcher):
            return False
        if self._renews:
            last.small.renew()
        patcher._vbar_get().prioritize()
        pins = getattr(model, "dynamic_pins", {}).get(device)
        if pins is not None:
            pins["failed"], pins["active"] = False, True
        patcher.apply_hooks(patcher.forced_hooks, force_apply=True)
        return True

    def note(self, patcher: Any, device: Any) -> None:
        """After a load: put the small weights where they were, and remember what is set."""
        model = patcher.model
        entries = list(_copied_by_load(patcher, device))
        owners, tensors = [owner for owner, _ in entries], [tensor for _, tensor in entries]
        known = self._small.setdefault(model, [])
        small = next((small for small in known if small.fit(owners, tensors)), None)
        if small is None:
            small = _SmallWeights(owners, tensors, device)
            known[:] = [small, *known[: MOST_SETS - 1]]
        small.take(tensors)
        if self._is_plain(patcher, device):
            self._last[model] = _Load(patcher, small)
        else:
            self._last.pop(model, None)

    def forget(self, model: Any) -> None:
        """The model is unloaded."""
        self._last.pop(model, None)
        self._small.pop(model, None)

    def _is_plain(self, patcher: Any, device: Any) -> bool:
        """Whether there is nothing about this load that we do not look at."""
        kind = type(patcher)
        if getattr(kind, "host_class", kind) is not self._patcher_class:
            return False
        host: Any = patcher
        changes = (host.weight_wrapper_patches, host.injections, host.forced_hooks, host.current_hooks)
        return (
            not any(changes)
            and not host.is_injected
            and device == host.load_device
            and not host.get_all_callbacks(self._on_load)
        )


class _Load:
    """What a model was like after a load. It must not hold the model: see that nothing here leads to it."""

    def __init__(self, patcher: Any, small: _SmallWeights) -> None:
        model = patcher.model
        self.small = small
        modules = list(model.modules())
        self._stores = [[getattr(module, kind) for module in modules] for kind in _KINDS]
        self._names = [list(chain.from_iterable(stores)) for stores in self._stores]
        self._values = [list(_values_of(stores)) for stores in self._stores]
        cast = [vars(module) for module in modules if "comfy_cast_weights" in vars(module)]
        settings = [(attributes, name) for attributes in cast for name in _SETTINGS if name in attributes]
        self._settings = [attributes for attributes, _ in settings], [name for _, name in settings]
        self._set = [_copied(attributes[name]) for attributes, name in settings]
        self._objects, self._about = list(_objects(patcher)), _about(patcher)

    def is_still_so(self, patcher: Any) -> bool:
        try:
            return (
                _are_same(list(_objects(patcher)), self._objects)
                and _about(patcher) == self._about
                and patcher.model.current_weight_patches_uuid == patcher.patches_uuid
                and all(
                    list(chain.from_iterable(stores)) == names and all(map(is_, _values_of(stores), values))
                    for stores, names, values in zip(self._stores, self._names, self._values, strict=True)
                )
                and list(map(getitem, *self._settings)) == self._set
            )
        except (KeyError, RuntimeError):  # a setting is gone; or one that has no single truth value
            return False


class _SmallWeights:
    """The weights that a load copies to the GPU at once, in one piece of memory, and their numbers after a load.

    Modules that take turns in one place of a model (schedules) have a piece each: the one that is not there keeps its
    numbers.
    """

    def __init__(self, owners: list[Any], tensors: list[Any], device: Any) -> None:
        import torch

        sizes = [-(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._numbers = torch.empty_like(self._memory)
        self._views = [
            piece[: _extent(tensor)].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            for piece, tensor in zip(torch.split(self._memory, sizes), tensors, strict=True)
        ]
        self._owners = list(map(weakref.ref, owners))
        self._layout = _layout(tensors)
        self._taken: list[Any] = []

    def fit(self, owners: list[Any], tensors: list[Any]) -> bool:
        """Whether these tensors, each of its module, have a place here."""
        return _are_same([owner() for owner in self._owners], owners) and _layout(tensors) == self._layout

    def take(self, tensors: list[Any]) -> None:
        """Move these here. One from before that somebody has kept goes on with its own numbers."""
        import torch

        for kept in (taken() for taken in self._taken):
            if kept is not None:
                kept.data = kept.data.clone()
        if tensors:
            torch._foreach_copy_(self._views, tensors)
        self._numbers.copy_(self._memory)
        for tensor, view in zip(tensors, self._views, strict=True):
            tensor.data = view
        self._taken = list(map(weakref.ref, tensors))

    def renew(self) -> None:
        """Give them the numbers that they had when they were taken."""
        self._memory.copy_(self._numbers)


def _copied_by_load(patcher: Any, device: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors on the device that a load has made, each with its module; it keeps what they were made from."""
    import torch

    modules = dict(patcher.model.named_modules())
    sources = [(key, backup.weight) for key, backup in patcher.backup.items()]
    for key, source in chain(sources, patcher.backup_buffers.items()):
        prefix, _, name = key.rpartition(".")
        module = modules.get(prefix)
        tensor: Any = None if module is None else module._parameters.get(name, module._buffers.get(name))
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device != device:
            continue
        if tensor.data_ptr() != source.data_ptr() and _is_dense(tensor):
            yield module, tensor


def _is_dense(tensor: Any) -> bool:
    """Whether its elements fill a piece of memory without gaps or overlaps."""
    return bool(tensor.numel() > 0 and _extent(tensor) == tensor.nbytes)


def _extent(tensor: Any) -> int:
    """Bytes from its first element to the end of its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * int(tensor.element_size())


def _layout(tensors: list[Any]) -> list[Any]:
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def _values_of(stores: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, stores))


def _objects(patcher: Any) -> Iterator[Any]:
    """What else a load reads or sets: objects that have to be the same,"""
    return chain((patcher.backup, patcher.backup_buffers, patcher._vbar_get()), *patcher.patches.values())


def _about(patcher: Any) -> tuple[Any, ...]:
    """and values that have to be equal."""
    model, patches = patcher.model, patcher.patches
    sizes = len(patcher.backup), len(patcher.backup_buffers), list(patches), list(map(len, patches.values()))
    return *sizes, model.model_loaded_weight_memory, model.device


def _are_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _copied(value: Any) -> Any:
    return value.copy() if type(value) is list else value


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
