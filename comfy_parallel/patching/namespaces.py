"""Run a host function with other values for some of its global names, without copying its code."""

from __future__ import annotations

import builtins
import functools
from types import FunctionType
from typing import Any


class Overlay(dict[str, Any]):
    """Values over a namespace, for everything else: CPython asks `__missing__` where globals are a dict subclass."""

    def __init__(self, below: dict[str, Any], values: dict[str, Any]) -> None:
        super().__init__(values)
        self["__builtins__"] = builtins
        self.below = below

    def __missing__(self, name: str) -> Any:
        return self.below[name]


class View:
    """A module or the like as one reader sees it: with other values for some of its names."""

    def __init__(self, below: Any, **values: Any) -> None:
        vars(self).update(values)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


def clone(function: FunctionType, namespace: dict[str, Any]) -> FunctionType:
    """The same function with other globals."""
    made = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def with_globals(function: FunctionType, **values: Any) -> FunctionType:
    """The same function with these values for global names that it reads; it must set none."""
    made = clone(function, Overlay(function.__globals__, values))
    functools.update_wrapper(made, function)
    return made
