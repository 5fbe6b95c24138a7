"""Every setting that we know of is put back after a job, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[3]
CHANGES = {
    "the working directory": "os.chdir('/')",
    "environment variable CPT_LEFT": "os.environ['CPT_LEFT'] = 'secret-1'",
    "environment variable PATH": "del os.environ['PATH']",
    "environment variable TZ": "os.environ['TZ'] = 'Asia/Tokyo'",
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
    "torch.backends.cuda.matmul.fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
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
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_DIR, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[:-1]]
    return {row[0]: (row[1], row[2]) for row in rows}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_put_back_and_told(report: dict[str, tuple[str, str]], name: str) -> None:
    assert report[name] == ("told", "put back")


IMPORTS = """
import logging, os, sys, warnings
from comfy_parallel.isolation.process_state import job_watch
from comfy_parallel.slots.slot import Slot, Run, entered
sys.path.insert(0, FOLDER)
watch = job_watch(lambda function, *arguments: function(*arguments))
slot = Slot(0, "cpu")
slot.run = Run("a-job")
with entered(slot):
    watch.begin()
    import made_by_hand
    os.chdir("/")
    watch.end()
print(os.environ.get("CPT_BY_IMPORT"), os.environ["CPT_THERE"], len(warnings.filters) > made_by_hand.before)
"""


def test_what_a_module_adds_when_it_is_imported_stays(tmp_path: Path) -> None:
    """It does so once, whichever job is the first to need it; what is changed is put back all the same."""
    text = (
        "import os, warnings; before = len(warnings.filters); warnings.simplefilter('ignore', BytesWarning);"
        "os.environ['CPT_BY_IMPORT'] = 'here'; os.environ['CPT_THERE'] = 'changed'"
    )
    (tmp_path / "made_by_hand.py").write_text(text)
    script = IMPORTS.replace("FOLDER", repr(str(tmp_path)))
    env = {**os.environ, "CPT_THERE": "before"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO_DIR, capture_output=True, text=True, timeout=300, env=env
    )
    assert done.stdout == "here before True\n", done.stderr
    assert "left environment variable CPT_THERE at a value; put back to a value" in done.stderr


WARNINGS = """
import logging, warnings
from comfy_parallel.isolation.process_state import job_watch
from comfy_parallel.slots.slot import Slot, Run, entered
logging.basicConfig(level=logging.INFO)
watch, slots = job_watch(lambda function, *arguments: function(*arguments)), [Slot(0, "cpu"), Slot(1, "cpu")]
before, filters = warnings.filters, tuple(warnings.filters)
def tell(method, index):
    slots[index].run = Run(f"job-{index}")
    with entered(slots[index]):
        getattr(watch, method)()
for _ in range(2):
    tell("begin", 0); tell("begin", 1)
    one, other = warnings.catch_warnings(), warnings.catch_warnings()
    one.__enter__(); warnings.simplefilter("error"); other.__enter__()
    one.__exit__(); other.__exit__()
    assert tuple(warnings.filters) != filters
    tell("end", 0); tell("end", 1)
    print(tuple(warnings.filters) == filters, warnings.filters is before)
"""


def test_warning_filters_that_jobs_leave_by_chance_are_put_back_and_told_once() -> None:
    done = subprocess.run([sys.executable, "-c", WARNINGS], cwd=REPO_DIR, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True True\n" * 2, done.stderr
    assert (done.stderr.count("said once"), done.stderr.count("; put back to ")) == (1, 0)


DIRECTORIES = """
import os, threading
from comfy_parallel.isolation.process_state import ThreadState, threads_can_have_directories
can = threads_can_have_directories()
home, there = os.getcwd(), []
def work():
    ThreadState("cpu", has_directory=can)
    os.chdir("/")
    child = threading.Thread(target=lambda: there.append(os.getcwd()))
    child.start(); child.join()
    there.append(os.getcwd())
thread = threading.Thread(target=work)
thread.start(); thread.join()
print(can, there, os.getcwd() == home)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads share it")
def test_a_slots_threads_have_a_working_directory_of_their_own() -> None:
    """Containers may forbid it; the log then says what jobs leave, as of other settings."""
    done = subprocess.run(
        [sys.executable, "-c", DIRECTORIES], cwd=REPO_DIR, capture_output=True, text=True, timeout=300
    )
    can = done.stdout.startswith("True")
    assert done.stdout == f"{can} ['/', '/'] {can}\n", done.stderr
