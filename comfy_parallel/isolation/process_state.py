"""The settings of Python and torch that a job can leave changed, and how each is read and put back."""

from __future__ import annotations

import builtins
import decimal
import functools
import gc
import locale
import logging
import multiprocessing
import operator
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from comfy_parallel.isolation.directories import directory_settings, threads_can_have_directories, unshare_directory
from comfy_parallel.isolation.glance import Glance, Setting, environment
from comfy_parallel.isolation.leftovers import (
    ABSENT,
    ENVIRONMENT,
    UNREADABLE,
    JobWatch,
    OwnSettings,
    SharedSettings,
)
from comfy_parallel.isolation.packs import streams
from comfy_parallel.slots.slot import Slot

logger = logging.getLogger(__name__)

_SIGNAL = "signal handler of "
_LOGGER = "level of logger "
_NOT_HANDLED = (signal.SIGKILL, signal.SIGSTOP)
_HANDLERS, _FILTERS, _FACTORY = "the root logger's handlers", "the warning filters", "logging's record factory"
_GROWS_BY_IMPORTS = (_HANDLERS, _FILTERS)


class SharedState:
    """All settings of the process, by name.

    `on_main_thread(function, *arguments)` has it called there: only there Python sets signal handlers.
    `has_directories`: threads have working directories and umasks of their own, see `ThreadState`.
    """

    def __init__(self, on_main_thread: Callable[..., object], *, has_directories: bool = False) -> None:
        self._on_main_thread = on_main_thread
        own = {} if has_directories else directory_settings()
        self._settings = {**own, **_of_python(), **_of_torch()}
        names = {f"{_SIGNAL}{one.name}": int(one) for one in signal.Signals}
        self._signals = {name: number for name, number in names.items() if number not in _NOT_HANDLED}
        self._glance = Glance(self._settings.values(), tuple(self._signals.values()))
        self._filters = warnings.filters
        self._modules: set[str] = set()
        self._has_imported = False

    def read(self) -> dict[str, Any]:
        """Each setting's value now; lists as tuples, variables of the environment as bytes."""
        now = self._glance.look(self._read)
        self._note_imports()
        return now

    def _read(self) -> dict[str, Any]:
        now = {name: _value(setting) for name, setting in self._settings.items()}
        now |= {ENVIRONMENT + os.fsdecode(name): value for name, value in dict(environment()).items()}
        now |= {name: signal.getsignal(number) for name, number in self._signals.items()}
        return now

    def stays(self, name: str, before: Any, value: Any) -> bool:
        """Whether a module added this when it was imported for the first time, during a job: it does so only once."""
        if not self._has_imported:
            return False
        if name.startswith(ENVIRONMENT):
            return before is ABSENT
        if name == _FACTORY:
            return True
        return name in _GROWS_BY_IMPORTS and set(before) <= set(value)

    def by_chance(self, name: str, was_sure: bool) -> bool:
        """Whether `catch_warnings` in several jobs at once may have left this: each puts back the list that it found,
        and not in the order of their start."""
        return name == _FILTERS and (not was_sure or warnings.filters is not self._filters)

    def write(self, name: str, value: Any) -> Any:
        """Set one of them; returns what it is then, or will be soon."""
        if name.startswith(ENVIRONMENT):
            _set_variable(name.removeprefix(ENVIRONMENT), value)
        elif name in self._signals:
            if value is not None:  # None: what was not set by Python cannot be by it.
                self._on_main_thread(signal.signal, self._signals[name], value)
        else:
            if name == _FILTERS:
                warnings.filters = self._filters
            self._settings[name].write(value)
            return self._settings[name].read()
        return value

    def _note_imports(self) -> None:
        self._has_imported = False
        if len(sys.modules) != len(self._modules):
            now = set(sys.modules)
            new = {name.partition(".")[0] for name in now - self._modules}
            self._modules, self._has_imported = now, bool(new - sys.stdlib_module_names)


def job_watch(on_main_thread: Callable[..., object]) -> JobWatch:
    """What is to be told when jobs begin and end, over all settings that we know."""
    has_directories = threads_can_have_directories()
    if not has_directories:
        logger.info(
            "comfy_parallel: the working directory and umask are shared by all slots, as this system gives threads none"
            " of their own (unshare); what a job leaves there is put back at its end"
        )
    state = SharedState(on_main_thread, has_directories=has_directories)

    def own_of(slot: Slot) -> OwnSettings:
        own = ThreadState(slot.device, has_directory=has_directories)
        return OwnSettings(own.read, own.write)

    return JobWatch(SharedSettings(state.read, state.write, state.stays, state.by_chance), own_of)


def _of_python() -> dict[str, Setting]:
    root = logging.getLogger()
    return {
        "the locale": Setting(
            lambda: locale.setlocale(locale.LC_ALL), lambda was: locale.setlocale(locale.LC_ALL, was)
        ),
        "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "the switch interval": Setting(sys.getswitchinterval, sys.setswitchinterval),
        "sys.path": Setting(lambda: tuple(sys.path), _set_path),
        "sys.excepthook": _attribute(sys, "excepthook"),
        "sys.unraisablehook": _attribute(sys, "unraisablehook"),
        "sys.stdout": _stream("stdout"),
        "sys.stderr": _stream("stderr"),
        "sys.stdin": _attribute(sys, "stdin"),
        "threading.excepthook": _attribute(threading, "excepthook"),
        _FILTERS: Setting(lambda: tuple(warnings.filters), _set_warnings),
        "warnings.showwarning": _attribute(warnings, "showwarning"),
        "the sockets' default time-out": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
        "logging.disable": Setting(lambda: root.manager.disable, logging.disable),
        f"{_LOGGER}root": Setting(lambda: root.level, root.setLevel),
        _HANDLERS: Setting(lambda: tuple(root.handlers), lambda was: _set_list(root.handlers, was)),
        "garbage collection": Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "the thresholds of garbage collection": Setting(gc.get_threshold, lambda was: gc.set_threshold(*was)),
        _FACTORY: Setting(logging.getLogRecordFactory, logging.setLogRecordFactory),
        "random.random": _attribute(random, "random"),
        "builtins.print": _attribute(builtins, "print"),
        "the folder of temporary files": Setting(tempfile.gettempdir, lambda was: setattr(tempfile, "tempdir", was)),
        "the way to start processes": Setting(_start_method, _set_start_method),
        "decimal's context of new threads": Setting(
            lambda: _numbers(decimal.DefaultContext), lambda was: _set_numbers(decimal.DefaultContext, was)
        ),
        **({"the longest number in text": _longest_number()} if hasattr(sys, "get_int_max_str_digits") else {}),
    }


def _start_method() -> str:
    """The default, too, until somebody has chosen one: to ask for that the plain way would be to choose it."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _set_start_method(was: str) -> None:
    default = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(None if was == default else was, force=True)


def _longest_number() -> Setting:
    return Setting(sys.get_int_max_str_digits, sys.set_int_max_str_digits)


_CONTEXT = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _numbers(context: decimal.Context) -> tuple[Any, ...]:
    return tuple(getattr(context, name) for name in _CONTEXT)


def _set_numbers(context: decimal.Context, was: tuple[Any, ...]) -> None:
    for name, value in zip(_CONTEXT, was, strict=True):
        setattr(context, name, value)


def _of_torch() -> dict[str, Setting]:
    import torch

    module = torch.nn.modules.module
    hooks = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    settings = {
        "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
        "torch's deterministic algorithms": Setting(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1]),
        ),
        "torch's anomaly detection": Setting(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda was: torch.autograd.set_detect_anomaly(*was),
        ),
        "torch's float32 matmul precision": Setting(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        ),
        "torch.backends.mkldnn.enabled": _attribute(torch.backends.mkldnn, "enabled"),
        "torch's deterministic fill": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
        **{f"torch.backends.cudnn.{name}": _attribute(torch.backends.cudnn, name) for name in _CUDNN},
        **{f"torch.backends.cuda.matmul.{name}": _attribute(torch.backends.cuda.matmul, name) for name in _MATMUL},
        **{
            f"torch's {kind} attention": Setting(
                getattr(torch.backends.cuda, f"{kind}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{kind}_sdp")
            )
            for kind in ("flash", "mem_efficient", "math")
        },
        # Behind the older settings, which are views of these that change them in part.
        **{f"torch.{path}.fp32_precision": _precision(path) for path in _PRECISIONS},
    }
    for name in hooks:
        kept = getattr(module, name, None)
        if kept is not None:
            settings[f"torch's {name[1:]}"] = _hooks(kept)
    return _readable(settings)


_PRECISIONS = (
    "backends",
    "backends.cuda.matmul",
    *(f"backends.cudnn{kind}" for kind in ("", ".conv", ".rnn")),
    *(f"backends.mkldnn{kind}" for kind in ("", ".matmul", ".conv", ".rnn")),
)
_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_MATMUL = (
    "allow_tf32",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class ThreadState:
    """The settings of the calling thread, by name. `device`: the slot's. `has_directory`: it gets its own."""

    def __init__(self, device: str, *, has_directory: bool = False) -> None:
        own = directory_settings() if has_directory and unshare_directory() else {}
        self._settings = {**own, **_readable(_of_thread(device))}
        self._glance = Glance(self._settings.values())

    def read(self) -> Mapping[str, Any]:
        """Each setting's value now."""
        return self._glance.look(lambda: {name: _value(setting) for name, setting in self._settings.items()})

    def write(self, name: str, value: Any) -> None:
        """Set one of them."""
        self._settings[name].write(value)


def _of_thread(device: str) -> dict[str, Setting]:
    import numpy as np
    import torch

    kind = device.partition(":")[0]
    settings = {
        "torch's grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "torch's default device": Setting(_default_device, _set_default_device),
        "torch's number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
        **{f"torch's autocast on {one}": _autocast(one) for one in dict.fromkeys(("cpu", kind))},
        "numpy's handling of floating-point errors": Setting(
            lambda: tuple(np.geterr().items()), lambda was: np.seterr(**dict(was))
        ),
        "the thread's trace function": Setting(sys.gettrace, sys.settrace),
        "the thread's profile function": Setting(sys.getprofile, sys.setprofile),
    }
    if hasattr(os, "sched_getaffinity"):
        settings["the thread's processors"] = Setting(
            lambda: tuple(sorted(os.sched_getaffinity(0))), lambda was: os.sched_setaffinity(0, was)
        )
    if kind == "cuda":
        settings["the current CUDA device"] = Setting(torch.cuda.current_device, torch.cuda.set_device)
        settings["the current CUDA stream"] = Setting(
            lambda: torch.cuda.current_stream(device).cuda_stream, lambda was: _set_stream(device, was)
        )
    return settings


def _autocast(kind: str) -> Setting:
    import torch

    return Setting(lambda: torch.is_autocast_enabled(kind), lambda on: torch.set_autocast_enabled(kind, on))


def _default_device() -> str | None:
    """As it was set for this thread; None when it was not."""
    import torch

    context = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    return None if context is None else str(context.device)


def _set_default_device(was: str | None) -> None:
    import torch

    torch.set_default_device(was)


def _set_stream(device: str, pointer: int) -> None:
    import torch

    default = torch.cuda.default_stream(device)
    torch.cuda.set_stream(default if pointer == default.cuda_stream else torch.cuda.ExternalStream(pointer, device))  # type: ignore[no-untyped-call]


def _readable(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Releases of torch differ in what they have."""
    return {name: setting for name, setting in settings.items() if _value(setting) is not UNREADABLE}


def _value(setting: Setting) -> Any:
    try:
        return setting.read()
    except Exception:  # noqa: BLE001 - torch refuses to tell some settings after others; the job goes on all the same
        return UNREADABLE


def _precision(path: str) -> Setting:
    """Of products of matrices `ieee` reads as `none`: the older setting leaves that when it is put back."""
    import torch

    try:
        owner = operator.attrgetter(path)(torch)
    except AttributeError:
        return _attribute(None, path)  # Not to be read: this torch has none.
    setting = _attribute(owner, "fp32_precision")
    if not path.endswith("matmul"):
        return setting

    def read() -> Any:
        value = owner.fp32_precision
        return "none" if value == "ieee" else value

    return Setting(read, setting.write)


def _hooks(kept: dict[Any, Any]) -> Setting:
    return Setting(lambda: tuple(kept.items()), lambda was: _set_dict(kept, dict(was)))


def _stream(name: str) -> Setting:
    """Not what a job of a pack has put on it, which is its slot's own."""
    return Setting(lambda: streams.below(name), lambda was: streams.put_below(name, was))


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(functools.partial(getattr, owner, name), functools.partial(setattr, owner, name))


def _set_variable(name: str, value: Any) -> None:
    if value is ABSENT:
        os.environ.pop(name, None)
    else:
        os.environ[name] = os.fsdecode(value)
    if name == "TZ":
        time.tzset()


def _set_path(was: tuple[str, ...]) -> None:
    """What a job added stays, behind the rest: a pack that adds its folder once imports from it later, too."""
    added = [entry for entry in sys.path if entry not in was]
    sys.path[:] = [*was, *added]


def _set_warnings(was: tuple[Any, ...]) -> None:
    _set_list(warnings.filters, was)  # type: ignore[arg-type]
    mutated: Callable[[], None] | None = getattr(warnings, "_filters_mutated", None) or getattr(
        warnings, "_filters_mutated_lock_held", None
    )
    if mutated is not None:
        mutated()


def _set_list(kept: list[Any], was: tuple[Any, ...]) -> None:
    kept[:] = was


def _set_dict(kept: dict[Any, Any], was: dict[Any, Any]) -> None:
    kept.clear()
    kept.update(was)
