"""Random numbers per slot: two jobs at once draw exactly what each would draw alone.

Covers torch's default generators, numpy's legacy global state and Python's `random`. A CUDA device has a default
generator of its own in torch already: a slot that has a device for itself draws from it there, and from a generator of
its own everywhere else. A fresh `torch.Generator` seeded with s draws the same numbers as the default one seeded so.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from comfy_parallel.slots.slot import SlotLocal, current_slot, is_shared

_TORCH_DEFAULT_SEED = 67280421310721  # c10::detail::default_rng_seed_val

_python_random: SlotLocal[random.Random] = SlotLocal(random.Random)
_generators: SlotLocal[dict[str, Any]] = SlotLocal(dict)


def slot_generator(device: Any) -> Any:
    """The calling slot's own generator for a torch device; None where torch's default one is to be used."""
    slot = current_slot()
    if slot is None or device.type == "meta":
        return None
    device = _with_index(device)
    name = str(device)
    if name == slot.device and name != "cpu" and not is_shared(slot):
        return None
    generators = _generators.get()
    if name not in generators:
        generators[name] = _new_generator(device, slot.index)
    return generators[name]


def _new_generator(device: Any, slot_index: int) -> Any:
    import torch

    return torch.Generator(device=device).manual_seed(_TORCH_DEFAULT_SEED + slot_index)


def _with_index(device: Any) -> Any:
    """`cuda` means the current one of several devices; of others there is one, whatever its number."""
    import torch

    if device.type not in ("cuda", "xpu"):
        return torch.device(device.type)
    if device.index is None:
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device


def _slot_device() -> Any:
    import torch

    slot = current_slot()
    return torch.device("cpu" if slot is None else slot.device)


# torch: factories, in-place methods, and the functions on the default generator.


def factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.randn` and its like, which make a tensor on `device`."""
    import torch
    import torch.utils._device as device_contexts

    # `with torch.device(…)` knows the factories by identity; it must list them before they are replaced.
    getattr(device_contexts, "_device_constructors", list)()

    def device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("out") is not None:
            return kwargs["out"].device
        return _chosen(kwargs, torch.get_default_device())

    return _drawing(original, device)


def from_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap functions and methods that draw on the device of the tensors they are given."""
    import torch

    def device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return tensors[0].device if tensors else _chosen(kwargs, torch.get_default_device())

    return _drawing(original, device)


def _chosen(kwargs: dict[str, Any], default: Any) -> Any:
    import torch

    device = kwargs.get("device")
    return default if device is None else torch.device(device)


def _drawing(original: Callable[..., Any], device_of: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def draw(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None and current_slot() is not None:
            generator = slot_generator(device_of(args, kwargs))
            if generator is not None:
                kwargs["generator"] = generator
        return original(*args, **kwargs)

    return draw


def like(fill: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap `torch.randn_like` and its like: an empty tensor filled in place, as torch itself does it.

    `fill(tensor, *args)` fills in place and draws from the slot. (`*_like` take no generator before torch 2.13.)
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @functools.wraps(original)
        def draw(input: Any, *args: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
            device = _chosen(kwargs, input.device)
            if kwargs.get("generator") is not None or slot_generator(device) is None:
                return original(input, *args, requires_grad=requires_grad, **kwargs)
            kwargs.pop("generator", None)
            bounds = [kwargs.pop(name) for name in ("low", "high") if name in kwargs]
            result = fill(torch.empty_like(input, **kwargs), *args, *bounds)
            return result.requires_grad_() if requires_grad else result

        return draw

    return wrap


class DefaultGenerator:
    """Stands for torch's default CPU generator: in a slot, the slot's own."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        import torch

        generator = slot_generator(torch.device("cpu"))
        return getattr(self._original if generator is None else generator, name)


class DefaultGenerators(tuple[Any, ...]):
    """Stands for torch's default generators of all devices of a kind: in a slot, those that the slot draws from."""

    kind: str

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        return self._of(range(len(self))[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._of, range(len(self)))

    def _of(self, index: int) -> Any:
        import torch

        generator = slot_generator(torch.device(self.kind, index))
        return tuple.__getitem__(self, index) if generator is None else generator


def default_generators(kind: str) -> property:
    """For `torch.cuda.default_generators` and its like, which torch fills in when it first uses the devices.

    All of torch's functions on these generators go by that name: seeding, reading and setting their states.
    """

    def get(module: ModuleType) -> Any:
        originals = vars(module)["default_generators"]
        if current_slot() is None:
            return originals
        generators = DefaultGenerators(originals)
        generators.kind = kind
        return generators

    def set(module: ModuleType, value: Any) -> None:
        vars(module)["default_generators"] = value

    return property(get, set)


def fork_own_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.random.fork_rng`: in a slot, save and restore the slot's own device only."""

    @functools.wraps(original)
    def fork_rng(devices: Any = None, *args: Any, **kwargs: Any) -> Any:
        if devices is None and current_slot() is not None:
            device = _slot_device()
            devices = [] if device.type == "cpu" else [device.index]
        return original(devices, *args, **kwargs)

    return fork_rng


# Python's `random` and numpy's legacy functions: methods of one hidden instance, exported by name.


def python_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Replacements for every function of `random` that is a method of its hidden instance."""
    hidden = vars(module)["_inst"]
    return {
        name: _slot_method(value, _python_random, value.__name__)
        for name, value in vars(module).items()
        if getattr(value, "__self__", None) is hidden and not name.startswith("_")
    }


def numpy_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Replacements for every legacy function of `numpy.random`."""
    hidden = module.mtrand._rand
    state = SlotLocal(module.RandomState)
    plain = {"seed": "seed", "ranf": "random_sample", "sample": "random_sample"}
    methods = {
        name: value.__name__ for name, value in vars(module).items() if getattr(value, "__self__", None) is hidden
    }
    return {name: _slot_method(vars(module)[name], state, method) for name, method in (methods | plain).items()}


def _slot_method(original: Callable[..., Any], state: SlotLocal[Any], method: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if current_slot() is None:
            return original(*args, **kwargs)
        return getattr(state.get(), method)(*args, **kwargs)

    return call
