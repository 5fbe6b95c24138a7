"""The process that guards leases ends with the one that started it, without a word."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from comfy_parallel.weights.files import lease_guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")


@pytest.mark.parametrize("reads", [True, False], ids=["all was read", "something was not read"])
def test_it_ends_quietly_with_the_process_that_it_guards_for(reads: bool) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        command = [sys.executable, lease_guard.__file__, str(its.fileno()), str(int(signal.SIGUSR1))]
        with subprocess.Popen(command, pass_fds=[its.fileno()], stderr=subprocess.PIPE, text=True) as guard:
            its.close()
            assert ours.recv(1, 0 if reads else socket.MSG_PEEK) == b"r"
            ours.close()
            _, said = guard.communicate(timeout=60)
    assert (guard.returncode, said) == (0, "")
