"""Ends in every way in which Python code can."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from .caching import never_cached


class Own(BaseException):
    """No Exception, and none that Python knows."""


def throw(error: BaseException) -> Callable[[], NoReturn]:
    def end() -> NoReturn:
        raise error

    return end


def recurse() -> None:
    recurse()


def killed_from_outside() -> None:
    """Another thread has this one raise, at whatever it does then."""
    me = ctypes.c_ulong(threading.get_ident())
    threading.Timer(0.05, lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(me, ctypes.py_object(Own))).start()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.001)


def endless_cause() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


KINDS: dict[str, Callable[[], object]] = {
    "exit": throw(SystemExit(3)),
    "keyboard": throw(KeyboardInterrupt()),
    "generator": throw(GeneratorExit()),
    "cancelled": throw(asyncio.CancelledError()),
    "own": throw(Own("mine")),
    "stop": throw(StopIteration(1)),
    "stop_async": throw(StopAsyncIteration()),
    "recursion": recurse,
    "cause": endless_cause,
    "outside": killed_from_outside,
}


class CPTRaises:
    """Ends so."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "end"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(KINDS),)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def end(self, kind: str) -> tuple[int]:
        KINDS[kind]()
        return (0,)


KEPT = ValueError("one and the same object each time")


class CPTKeptError:
    """Raises an error that this module keeps, or shows how many frames that one has kept."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "go"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"raises": ("BOOLEAN", {})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def go(self, raises: bool) -> tuple[int]:
        if raises:
            try:
                raise KeyError("handled meanwhile")
            except KeyError:
                raise KEPT  # noqa: B904 - it is to have a context
        errors = (KEPT, KEPT.__context__)
        return (sum(len(list(traceback.walk_tb(one.__traceback__))) for one in errors if one is not None),)


NODES = {node.__name__: node for node in (CPTRaises, CPTKeptError)}
