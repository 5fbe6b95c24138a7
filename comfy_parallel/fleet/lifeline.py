"""The pipe by which a supervised process learns that its supervisor is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import MutableMapping

LIFELINE = "COMFY_PARALLEL_LIFELINE"


def hold(env: MutableMapping[str, str]) -> bool:
    """End this process and its group when the supervisor ends; whether this process is supervised.

    The variable is taken out of `env`: what this process starts itself does not have the pipe.
    """
    fd = env.pop(LIFELINE, None)
    if fd is None:
        return False
    os.set_inheritable(int(fd), False)
    threading.Thread(target=_watch, args=(int(fd),), daemon=True, name="comfy_parallel-lifeline").start()
    return True


def _watch(fd: int) -> None:
    while os.read(fd, 1):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
