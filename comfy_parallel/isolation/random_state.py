"""Random numbers per slot: two jobs at once draw exactly what each would draw alone.

Covers torch's global CPU generator, numpy's legacy global state and Python's `random`. A CUDA device has
a generator of its own in torch already; only slots that share a device get one each. A fresh
`torch.Generator` seeded with s draws the same numbers as the default generator seeded with s.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot, slots

_TORCH_DEFAULT_SEED = 67280421310721  # c10::detail::default_rng_seed_val

_python_random: SlotLocal[random.Random] = SlotLocal(random.Random)
_generators: SlotLocal[dict[str, Any]] = SlotLocal(dict)


def slot_generator(device: Any) -> Any:
    """The calling slot's own generator for a torch device; None where torch's default one is to be used."""
    slot = current_slot()
    if slot is None or device.type == "meta":
        return None
    if device.type != "cpu" and not _is_shared(slot):
        return None
    key = str(device)
    generators = _generators.get()
    if key not in generators:
        generators[key] = _new_generator(device, slot.index)
    return generators[key]


def _new_generator(device: Any, slot_index: int) -> Any:
    import torch

    return torch.Generator(device=device).manual_seed(_TORCH_DEFAULT_SEED + slot_index)


def _is_shared(slot: Slot) -> bool:
    return sum(other.device == slot.device for other in slots()) > 1


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
        chosen = kwargs.get("device")
        return torch.get_default_device() if chosen is None else torch.device(chosen)

    return _drawing(original, device)


def from_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap functions and methods that draw on the device of the tensors they are given."""
    import torch

    def device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())

    return _drawing(original, device)


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
            device = torch.device(kwargs.get("device") or input.device)
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


def seed_own_device(original: Callable[[int], None]) -> Callable[[int], None]:
    """Wrap `torch.cuda.manual_seed_all`: in a slot, seed the slot's own device only."""
    import torch

    @functools.wraps(original)
    def manual_seed_all(seed: int) -> None:
        slot = current_slot()
        if slot is None:
            return original(seed)
        generator = slot_generator(_slot_device()) if _slot_device().type != "cpu" else None
        if generator is not None:
            generator.manual_seed(int(seed))
        elif _slot_device().type != "cpu":
            torch.get_device_module(_slot_device()).manual_seed(seed)
        return None

    return manual_seed_all


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
