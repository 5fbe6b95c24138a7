"""Every setting that we know of is put back after a job, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[3]
CHANGES = {
    "the working directory": "os.chdir('/')",
    "environment variable CPT_LEFT": "os.environ['CPT_LEFT'] = 'secret-1'",
    "environment variable PATH": "del os.environ['PATH']",
    "the umask": "os.umask(0o077)",
    "the recursion limit": "sys.setrecursionlimit(1234)",
    "the switch interval": "sys.setswitchinterval(0.5)",
    "sys.path": "sys.path.clear()",
    "sys.stdout": "sys.stdout = io.StringIO()",
    "sys.excepthook": "sys.excepthook = print",
    "threading.excepthook": "threading.excepthook = print",
    "the warning filters": "warnings.simplefilter('error')",
    "the sockets' default time-out": "socket.setdefaulttimeout(1.0)",
    "logging.disable": "logging.disable(logging.CRITICAL)",
    "level of logger root": "logging.getLogger().setLevel(5)",
    "the root logger's handlers": "logging.getLogger().addHandler(logging.NullHandler())",
    "garbage collection": "gc.disable()",
    "signal handler of SIGUSR1": "signal.signal(signal.SIGUSR1, print)",
    "random.random": "random.random = lambda: 0.5",
    "torch's default dtype": "torch.set_default_dtype(torch.float64)",
    "torch's deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "torch's anomaly detection": "torch.autograd.set_detect_anomaly(True)",
    "torch's float32 matmul precision": "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.benchmark": "torch.backends.cudnn.benchmark = True",
    "torch.backends.cudnn.deterministic": "torch.backends.cudnn.deterministic = True",
    "torch's flash attention": "torch.backends.cuda.enable_flash_sdp(False)",
    "torch's global_forward_hooks": "torch.nn.modules.module.register_module_forward_hook(print)",
    "torch's grad mode": "torch.set_grad_enabled(False)",
    "torch's default device": "torch.set_default_device('meta')",
    "torch's number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch's autocast on cpu": "torch.set_autocast_enabled('cpu', True)",
    "numpy's handling of floating-point errors": "numpy.seterr(all='raise')",
}
SCRIPT = """
import gc, io, logging, os, random, signal, socket, sys, threading, warnings
import numpy, torch
from comfy_parallel.isolation.process_state import job_watch
from comfy_parallel.slots.slot import Slot, Run, entered
told = []
class Told(logging.Handler):
    def emit(self, record): told.append(record.getMessage())
logging.getLogger("comfy_parallel").addHandler(Told())
watch = job_watch(lambda function, *arguments: function(*arguments))
slot, out = Slot(0, "cpu"), sys.stdout
slot.run = Run("a-job")
with entered(slot):
    for name, change in CHANGES.items():
        watch.begin()
        exec(change)
        watch.end()
        ok = any(f"job a-job left {name} at" in line for line in told)
        told.clear()
        watch.begin(); watch.end()
        print(name, "|", "told" if ok else "NOT TOLD", "|", "put back" if not told else told, file=out)
        told.clear()
print("secret-1" in str(told), file=out)
"""


@pytest.fixture(scope="module")
def report() -> dict[str, tuple[str, str]]:
    script = SCRIPT.replace("CHANGES.items()", f"{CHANGES!r}.items()")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_DIR, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[:-1]]
    return {row[0]: (row[1], row[2]) for row in rows}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_put_back_and_told(report: dict[str, tuple[str, str]], name: str) -> None:
    assert report[name] == ("told", "put back")
