"""Let the functions of a module that is loaded already ask for the calling slot's values of some of its names.

Each function keeps its identity and gets code compiled from the same source with these names read through the module's
accessor: whoever holds the function runs it. Code that runs on the stack at that moment goes on as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from comfy_parallel.isolation.packs.rewrite import SET, Plan, rewrite
from comfy_parallel.isolation.packs.sources import parsed
from comfy_parallel.patching.namespaces import Overlay
from comfy_parallel.slots import own_names
from comfy_parallel.slots.own_names import ACCESSOR, Namespace

logger = logging.getLogger(__name__)

Place = tuple[str, int]


class Unredirectable(Exception):
    """A module's functions cannot be made to ask for a slot's values; the text says why."""


def redirect(namespace: Namespace, name: str, plan: Plan) -> None:
    """Let the module's functions ask for `name` as well as for the names that the plan has already.

    Raises:
        Unredirectable: there is no source, or it is not what the module was made from.
    """
    module = namespace.owner
    users = [function for function in functions_of(module) if _reads(function, name)]
    new = replace(plan, names=plan.names | {name})
    if users:
        codes = _codes(module, new)
        pairs = [(function, codes.get(_place(function.__code__))) for function in users]
        for function, code in pairs:
            if code is None or code.co_freevars != function.__code__.co_freevars:
                raise Unredirectable(f"{module.__name__}: {function.__qualname__} was not made from its file")
        vars(module)[ACCESSOR] = namespace.accessor
        vars(module)[SET] = set_and_return
        for function, code in pairs:
            assert code is not None
            own_names.note_code(code, function.__code__)
            function.__code__ = code
    plan.names.add(name)


def set_and_return(owner: Any, name: str, value: Any) -> Any:
    """What `(name := value)` does."""
    setattr(owner, name, value)
    return value


def functions_of(module: ModuleType) -> list[FunctionType]:
    """All functions written in a module that its names, its classes and what wraps them lead to."""
    return list(_functions(list(vars(module).values()), vars(module), set()))


def _functions(waiting: list[Any], namespace: dict[str, Any], seen: set[int]) -> Iterator[FunctionType]:
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if _namespace(value) is namespace:
                yield value
            waiting.extend(_around(value))
        elif isinstance(value, type) and value.__module__ == namespace.get("__name__"):
            waiting.extend(vars(value).values())
        elif isinstance(value, staticmethod | classmethod):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting.extend((value.fget, value.fset, value.fdel))
        elif type(value) in (dict, list, tuple, set):
            waiting.extend(_functions_in(value))
        else:
            waiting.append(getattr(value, "__wrapped__", None) if hasattr(type(value), "__wrapped__") else None)


def _functions_in(container: Any) -> list[Any]:
    values = container.values() if type(container) is dict else container
    return [value for value in list(values) if isinstance(value, FunctionType | staticmethod | classmethod)]


def _around(function: FunctionType) -> Iterator[Any]:
    yield getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if isinstance(content, FunctionType | staticmethod | classmethod):
            yield content


def _namespace(function: FunctionType) -> dict[str, Any]:
    found = function.__globals__
    return found.below if isinstance(found, Overlay) else found


def _codes(module: ModuleType, plan: Plan) -> dict[Place, CodeType]:
    """The functions' new code by their places in the file, where the file's own code is what the module has."""
    origin = getattr(module, "__file__", None)
    tree = parsed(Path(origin)) if origin and origin.endswith(".py") else None
    if tree is None or origin is None:
        raise Unredirectable(f"{module.__name__} has no source")
    rewrite(tree, plan)
    code = compile(tree, origin, "exec", dont_inherit=True)
    return {_place(found): found for found in _inner_codes(code)}


def _inner_codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner_codes(constant)


def _place(code: CodeType) -> Place:
    return getattr(code, "co_qualname", code.co_name), code.co_firstlineno


def _reads(function: FunctionType, name: str) -> bool:
    """Whether a function reads the name from its module, rather than from values that we have put over it."""
    found = function.__globals__
    return name in _all_names(function.__code__) and not (isinstance(found, Overlay) and dict.__contains__(found, name))


def _all_names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_all_names(inner) for inner in _inner_codes(code)))
