"""The working directory and umask: of the process, or of each slot's thread where the system allows that."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable

from comfy_parallel.isolation.glance import Setting

_CLONE_FS = 0x200
_MOST_PATH = 4096  # bytes; a longer one is read in another way


def threads_can_have_directories() -> bool:
    """Whether the system lets a thread have a working directory and a umask of its own; tried on one."""
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(unshare_directory()), name="comfy_parallel-unshare")
    thread.start()
    thread.join()
    return answer == [True]


def unshare_directory() -> bool:
    """Give the calling thread, and the threads that it starts from now on, a working directory and umask of its own."""
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_FS) == 0)
    except (OSError, AttributeError):
        return False


def directory_settings() -> dict[str, Setting]:
    """What the system keeps for the process, or for each thread that has asked for its own."""
    return {
        "the working directory": Setting(_cwd_reader(), lambda path: None if path is None else os.chdir(path)),
        "the umask": Setting(_UmaskReader(), os.umask),
    }


def _cwd_reader() -> Callable[[], str | None]:
    """What returns the working directory; None when it has been deleted.

    `os.getcwd` lets go of the interpreter, which other threads may then have for milliseconds; a call by `PyDLL` does
    not.
    """
    if sys.platform != "linux":
        return _cwd
    buffer, getcwd = ctypes.create_string_buffer(_MOST_PATH), ctypes.PyDLL(None).getcwd
    getcwd.restype, getcwd.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_size_t)
    return lambda: os.fsdecode(buffer.value) if getcwd(buffer, _MOST_PATH) else _cwd()


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


class _UmaskReader:
    """The system tells a umask only to who sets one. So the one that was seen last is set, which changes nothing as
    long as it is the same. Reading it from /proc instead has the kernel list all that it knows of the process."""

    def __init__(self) -> None:
        self._last = _umask_of_proc()

    def __call__(self) -> int:
        now = os.umask(self._last)
        if now != self._last:
            os.umask(now)
            self._last = now
        return now


def _umask_of_proc() -> int:
    """Where the kernel tells; else what most systems begin with, for a first guess."""
    try:
        status = os.open("/proc/thread-self/status", os.O_RDONLY)
    except OSError:
        return 0o022
    try:
        _, found, rest = os.read(status, 256).partition(b"\nUmask:")  # the second line
    finally:
        os.close(status)
    return int(rest.split(None, 1)[0], 8) if found else 0o022
