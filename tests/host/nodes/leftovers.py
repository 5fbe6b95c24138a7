"""Leaves settings of the whole process, or of its thread, changed; and shows what a job finds them at."""

from __future__ import annotations

import builtins
import decimal
import gc
import io
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from server import PromptServer

from .caching import never_cached

ANY = type("AnyType", (str,), {"__ne__": lambda self, other: False})("*")


class OwnRecord(logging.LogRecord):
    pass


def umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value


def on_main_thread(function: Callable[..., Any], *arguments: Any) -> None:
    """As a node pack does what may be done there only."""
    done = threading.Event()

    def call() -> None:
        function(*arguments)
        done.set()

    PromptServer.instance.loop.call_soon_threadsafe(call)
    assert done.wait(30)


def add_handler() -> None:
    logging.getLogger().addHandler(logging.NullHandler())


def new_precision() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SETTINGS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "cwd": (lambda: os.chdir("/"), os.getcwd),
    "umask": (lambda: os.umask(0o077), umask),
    "variable_new": (lambda: os.environ.__setitem__("CPT_LEFT", "1"), lambda: os.environ.get("CPT_LEFT")),
    "variable_changed": (lambda: os.environ.__setitem__("PATH", "/nowhere"), lambda: os.environ["PATH"]),
    "variable_gone": (lambda: os.environ.pop("OMP_NUM_THREADS"), lambda: os.environ.get("OMP_NUM_THREADS")),
    "recursion_limit": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 77), sys.getrecursionlimit),
    "switch_interval": (lambda: sys.setswitchinterval(0.25), sys.getswitchinterval),
    "path": (lambda: sys.path.insert(0, "/left"), lambda: sys.path[0] == "/left"),
    "stdout": (lambda: setattr(sys, "stdout", io.StringIO()), lambda: isinstance(sys.stdout, io.StringIO)),
    "warnings": (lambda: warnings.simplefilter("error"), lambda: warnings.filters[0][0]),
    "excepthook": (lambda: setattr(threading, "excepthook", print), lambda: threading.excepthook is print),
    "socket_timeout": (lambda: socket.setdefaulttimeout(3.0), socket.getdefaulttimeout),
    "log_level": (lambda: logging.getLogger().setLevel(5), lambda: logging.getLogger().level),
    "log_disabled": (lambda: logging.disable(logging.CRITICAL), lambda: logging.getLogger().manager.disable),
    "log_handlers": (add_handler, lambda: len(logging.getLogger().handlers)),
    "record_factory": (
        lambda: logging.setLogRecordFactory(OwnRecord),
        lambda: logging.getLogRecordFactory() is logging.LogRecord,
    ),
    "print": (lambda: setattr(builtins, "print", repr), lambda: builtins.print is repr),
    "temporary": (lambda: setattr(tempfile, "tempdir", "/nowhere"), lambda: tempfile.tempdir == "/nowhere"),
    "processes": (
        lambda: multiprocessing.set_start_method("spawn", force=True),
        lambda: multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
    ),
    "decimal": (lambda: setattr(decimal.DefaultContext, "prec", 3), lambda: decimal.DefaultContext.prec),
    "digits": (lambda: sys.set_int_max_str_digits(700), sys.get_int_max_str_digits),
    "mkldnn": (lambda: setattr(torch.backends.mkldnn, "enabled", False), lambda: torch.backends.mkldnn.enabled),
    "gc": (gc.disable, gc.isenabled),
    "signal": (
        lambda: on_main_thread(signal.signal, signal.SIGUSR2, signal.SIG_IGN),
        lambda: str(signal.getsignal(signal.SIGUSR2)),
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: str(torch.get_default_dtype())),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "new_precision": (new_precision, lambda: torch.backends.cuda.matmul.fp32_precision),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark),
    "attention": (lambda: torch.backends.cuda.enable_math_sdp(False), torch.backends.cuda.math_sdp_enabled),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "hooks": (
        lambda: torch.nn.modules.module.register_module_forward_hook(print),
        lambda: len(torch.nn.modules.module._global_forward_hooks),
    ),
    "grad": (lambda: torch.set_grad_enabled(not torch.is_grad_enabled()), torch.is_grad_enabled),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 2), torch.get_num_threads),
    "device": (lambda: torch.set_default_device("meta"), lambda: str(torch.empty(0).device)),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "numpy_errors": (lambda: np.seterr(all="raise"), lambda: str(np.geterr())),
}
ENDS = {"return": None, "raise": RuntimeError("as nodes do"), "die": SystemExit("by test")}


class CPTLeave:
    """Changes one setting, then returns, raises or ends its thread."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "leave"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(SETTINGS),), "end": (list(ENDS),)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def leave(self, kind: str, end: str) -> tuple[str]:
        change, read = SETTINGS[kind]
        before = read()
        change()
        if read() == before:
            raise AssertionError(f"{kind} did not change: {before}")
        if (error := ENDS[end]) is not None:
            raise error
        return (kind,)


class CPTSettings:
    """Shows all of them, after what `after` names has come."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "show"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"after": (ANY, {})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def show(self, after: Any = None) -> dict[str, Any]:
        found = {name: read() for name, (_, read) in SETTINGS.items()}
        return {"ui": {"settings": [found]}, "result": ("shown",)}


NODES = {CPTLeave.__name__: CPTLeave, CPTSettings.__name__: CPTSettings}
