"""What a load of a whole model copies, found once and kept for the next time.

Going through a thousand modules and weights in Python holds up the other slots. To see that nothing has changed since
takes a fraction of that, for no loop of it runs in Python.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import blocks, homes, leaves, transfers
from comfy_parallel.weights.gpu.homes import Home
from comfy_parallel.weights.gpu.parts import Part, apart, in_block
from comfy_parallel.weights.gpu.turns import turn

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.files.store import Store

_plans: WeakKeyDictionary[Any, Plan] = WeakKeyDictionary()


def load_ahead(store: Store, model: Any, device: Any, patched: Collection[str]) -> tuple[Plan, list[Any]]:
    """Copy the weights of a model that is about to be loaded whole, all but those that are patched on the way.

    Args:
        patched: names of parameters.

    Returns the plan, the same one as the last time while the model is built in the same way; and the model's modules.
    """
    with turn():
        plan = _plans.get(model)
        found = plan.found(patched) if plan is not None else None
        if plan is None or found is None:
            done: dict[str, int] = {}
            named = loading.named_modules_of(model)
            parts = _parts(_homes_in(named, patched, done))
            plan = _plans[model] = Plan(named, done, patched, parts)
            found = [module for _, module in named], parts
    modules, parts = found
    transfers.move(parts, device, store.may_pin)
    return plan, modules


class Plan:
    """Of a model whose weights are at home. It keeps none of them alive.

    Attributes:
        names: of the modules.
        done: the bytes of the modules, by name, whose tensors are all copied and which hold no others.
    """

    def __init__(
        self, named: Sequence[tuple[str, Any]], done: dict[str, int], patched: Collection[str], parts: Sequence[Part]
    ) -> None:
        modules = [module for _, module in named]
        parameters = [parameter for part in parts for parameter in part.parameters]
        self.names = [name for name, _ in named]
        self.done = done
        self._patched = frozenset(patched)
        self._modules = list(map(ref, modules))
        self._build = _build(modules)
        self._parameters = list(map(ref, parameters))
        self._dtypes = list(map(_dtype, parameters))
        self._homes = [ref(home) for part in parts for home in part.homes]
        self._parts = [part._replace(parameters=(), homes=()) for part in parts]
        self._lengths = [len(part.homes) for part in parts]

    def found(self, patched: Collection[str]) -> tuple[list[Any], list[Part]] | None:
        """The modules, and the parts to copy; None where the model has changed."""
        import torch

        is_set_to: Any = torch.Tensor.is_set_to
        modules = [one() for one in self._modules]
        parameters = [one() for one in self._parameters]
        sources = [one() for one in self._homes]
        try:
            is_current = (
                self._patched == frozenset(patched)
                and _build(modules) == self._build
                and all(map(is_, map(_home, parameters), sources))
                and all(map(is_set_to, parameters, map(_tensor, sources)))
                and list(map(_dtype, parameters)) == self._dtypes
                and all(map(is_, map(_grad, parameters), repeat(None)))
            )
        except (AttributeError, TypeError, RuntimeError):  # one is gone, or is another kind of thing
            return None
        return (modules, list(self._filled(parameters, sources))) if is_current else None

    def _filled(self, parameters: list[Any], sources: list[Any]) -> Iterator[Part]:
        start = 0
        for part, length in zip(self._parts, self._lengths, strict=True):
            stop = start + length
            yield part._replace(parameters=parameters[start:stop], homes=sources[start:stop])
            start = stop


def _parts(pairs: Iterable[tuple[Any, Home]]) -> list[Part]:
    """In blocks, but for those without bytes."""
    found = list(pairs)
    in_blocks = blocks.blocks(pair for pair in found if pair[1].size)
    return [*apart(pair for pair in found if not pair[1].size), *(in_block(*one) for one in in_blocks)]


_home = attrgetter(homes.HOME)
_grad = attrgetter("grad")
_dtype = attrgetter("dtype")
_tensor = attrgetter("tensor")
_attributes = attrgetter("__dict__")
_values = methodcaller("values")
_tables = itemgetter("_modules", "_parameters", "_state_dict_hooks", "_state_dict_pre_hooks", "_buffers")
_lasting = itemgetter(slice(4))  # Buffers may be other tensors every time.


def _build(modules: Sequence[Any]) -> list[Any]:
    """What the modules are made of: the identities of all that they hold. One that is gone has left its place, so none
    there has its identity."""
    tables = list(map(_tables, map(_attributes, modules)))
    flat = list(chain.from_iterable(tables))
    found: list[Any] = list(map(type, modules))
    found += map(len, flat)
    found += chain.from_iterable(filter(None, flat))
    lasting = chain.from_iterable(map(_lasting, tables))
    found += map(id, chain.from_iterable(map(_values, filter(None, lasting))))
    return found


def _homes_in(
    modules: Sequence[tuple[str, Any]], patched: Collection[str], done: dict[str, int]
) -> Iterator[tuple[Any, Home]]:
    """The parameters with a home, each once. Notes in `done` the bytes of the modules that have no other tensors."""
    told: set[int] = set()
    for name, module in modules:
        size = 0
        is_done = leaves.is_plain(module) and not module._buffers
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            is_patched = (f"{name}.{own}" if name else own) in patched
            home = None if is_patched or parameter.grad is not None else loading.home_at(parameter)
            if home is None:
                is_done = False
            else:
                size += home.size
                if id(parameter) not in told:
                    told.add(id(parameter))
                    yield parameter, home
        if is_done:
            done[name] = size
