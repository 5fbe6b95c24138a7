"""The settings of Python and torch that a job can leave changed, and how each is read and put back."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from comfy_parallel.isolation.leftovers import ABSENT, ENVIRONMENT, JobWatch, OwnSettings, SharedSettings
from comfy_parallel.slots.slot import Slot

_SIGNAL = "signal handler of "
_LOGGER = "level of logger "


class Setting(NamedTuple):
    """How a setting is read and set."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class SharedState:
    """All settings of the process, by name.

    `on_main_thread(function, *arguments)` has it called there: only there Python sets signal handlers.
    """

    def __init__(self, on_main_thread: Callable[..., object]) -> None:
        self._on_main_thread = on_main_thread
        self._settings = {**_of_python(), **_of_torch()}
        self._signals = {
            f"{_SIGNAL}{one.name}": one for one in signal.Signals if one.name not in ("SIGKILL", "SIGSTOP")
        }

    def read(self) -> dict[str, Any]:
        """Each setting's value now; lists as tuples."""
        now = {name: setting.read() for name, setting in self._settings.items()}
        now |= {f"{ENVIRONMENT}{name}": value for name, value in os.environ.copy().items()}
        now |= {name: signal.getsignal(one) for name, one in self._signals.items()}
        return now

    def write(self, name: str, value: Any) -> Any:
        """Set one of them; returns what it is then, or will be soon."""
        if name.startswith(ENVIRONMENT):
            variable = name.removeprefix(ENVIRONMENT)
            if value is ABSENT:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        elif name in self._signals:
            if value is not None:  # None: what was not set by Python cannot be by it.
                self._on_main_thread(signal.signal, self._signals[name], value)
        else:
            self._settings[name].write(value)
            return self._settings[name].read()
        return value


def job_watch(on_main_thread: Callable[..., object]) -> JobWatch:
    """What is to be told when jobs begin and end, over all settings that we know."""
    state = SharedState(on_main_thread)

    def own_of(slot: Slot) -> OwnSettings:
        own = ThreadState(slot.device)
        return OwnSettings(own.read, own.write)

    return JobWatch(SharedSettings(state.read, state.write), own_of)


def _of_python() -> dict[str, Setting]:
    root = logging.getLogger()
    return {
        "the working directory": Setting(_cwd, lambda path: None if path is None else os.chdir(path)),
        "the umask": Setting(_umask, os.umask),
        "the locale": Setting(
            lambda: locale.setlocale(locale.LC_ALL), lambda was: locale.setlocale(locale.LC_ALL, was)
        ),
        "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "the switch interval": Setting(sys.getswitchinterval, sys.setswitchinterval),
        "sys.path": Setting(lambda: tuple(sys.path), _set_path),
        "sys.excepthook": _attribute(sys, "excepthook"),
        "sys.unraisablehook": _attribute(sys, "unraisablehook"),
        "sys.stdout": _attribute(sys, "stdout"),
        "sys.stderr": _attribute(sys, "stderr"),
        "sys.stdin": _attribute(sys, "stdin"),
        "threading.excepthook": _attribute(threading, "excepthook"),
        "the warning filters": Setting(lambda: tuple(warnings.filters), _set_warnings),
        "warnings.showwarning": _attribute(warnings, "showwarning"),
        "the sockets' default time-out": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
        "logging.disable": Setting(lambda: root.manager.disable, logging.disable),
        f"{_LOGGER}root": Setting(lambda: root.level, root.setLevel),
        "the root logger's handlers": Setting(lambda: tuple(root.handlers), lambda was: _set_list(root.handlers, was)),
        "garbage collection": Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "the thresholds of garbage collection": Setting(gc.get_threshold, lambda was: gc.set_threshold(*was)),
        "random.random": _attribute(random, "random"),
    }


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
        "torch's deterministic fill": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
        **{f"torch.backends.cudnn.{name}": _attribute(torch.backends.cudnn, name) for name in _CUDNN},
        **{f"torch.backends.cuda.matmul.{name}": _attribute(torch.backends.cuda.matmul, name) for name in _MATMUL},
        **{
            f"torch's {kind} attention": Setting(
                getattr(torch.backends.cuda, f"{kind}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{kind}_sdp")
            )
            for kind in ("flash", "mem_efficient", "math")
        },
    }
    for name in hooks:
        kept = getattr(module, name, None)
        if kept is not None:
            settings[f"torch's {name[1:]}"] = Setting(
                lambda kept=kept: tuple(kept.items()), lambda was, kept=kept: _set_dict(kept, dict(was))
            )
    return {name: setting for name, setting in settings.items() if _can_be_read(setting)}


_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_MATMUL = (
    "allow_tf32",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class ThreadState:
    """The settings of the calling thread, by name. `device`: the slot's."""

    def __init__(self, device: str) -> None:
        self._settings = {name: setting for name, setting in _of_thread(device).items() if _can_be_read(setting)}

    def read(self) -> Mapping[str, Any]:
        """Each setting's value now."""
        return {name: setting.read() for name, setting in self._settings.items()}

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
        **{
            f"torch's autocast on {one}": Setting(
                lambda one=one: torch.is_autocast_enabled(one), lambda on, one=one: torch.set_autocast_enabled(one, on)
            )
            for one in dict.fromkeys(("cpu", kind))
        },
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
    torch.cuda.set_stream(default if pointer == default.cuda_stream else torch.cuda.ExternalStream(pointer, device))


def _can_be_read(setting: Setting) -> bool:
    """Releases of torch differ in what they have."""
    try:
        setting.read()
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _cwd() -> str | None:
    """None when it has been deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _umask() -> int:
    """Read from the kernel where it tells: Python reads it by setting it, which other threads would notice."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        return -1


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
