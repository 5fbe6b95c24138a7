"""Writers in native code, which may hold the interpreter while they open a file that slots have mapped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.unit.weights.samples import PATIENCE_S, numbers, run_python, write

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

COUNT = 5000


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", a=numbers(COUNT), b=numbers(COUNT, start=9))


HELD = """
import ctypes, os, sys, threading, time
import torch
from comfy_parallel.weights.files.store import Store
from tests.unit.weights.samples import GIB, bits, numbers, read

path, how, where = sys.argv[1:]
native = ctypes.PyDLL(None)  # whose functions keep the interpreter
writers = {
    "open": lambda: native.open(path.encode(), os.O_WRONLY | os.O_TRUNC),
    "append": lambda: native.open(path.encode(), os.O_WRONLY | os.O_APPEND),
    "creat": lambda: native.creat(path.encode(), 0o644),
    "truncate": lambda: native.truncate(path.encode(), ctypes.c_long(3)),
    "fopen": lambda: native.fopen(path.encode(), b"wb"),
    "torch": lambda: torch.save({"x": torch.ones(3)}, path),
}
store = Store("map", GIB)
views = read(store, path)
shared = store.shared(views["a"], torch.float32, 0, must_align=False)
before = [bits(tensor) for tensor in (shared, *views.values())]
began = time.monotonic()
if where == "main":
    writers[how]()
else:
    thread = threading.Thread(target=writers[how])
    thread.start()
    thread.join()
seconds = time.monotonic() - began
assert [bits(tensor) for tensor in (shared, *views.values())] == before
assert seconds < 40, seconds  # The kernel lets a writer go on after 45.
print(store.find(path).content)
"""


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("open", "main"),
        ("open", "thread"),
        ("append", "main"),
        ("truncate", "thread"),
        ("fopen", "main"),
        ("torch", "main"),
    ],
)
def test_a_writer_that_holds_the_interpreter_is_not_kept_waiting(path: str, how: str, where: str) -> None:
    done = run_python(HELD, path, how, where)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


def test_several_writers_that_hold_the_interpreter_come_after_each_other(path: str, tmp_path: Path) -> None:
    done = run_python(HELD.replace("writers[how]()", "[writers[how]() for _ in range(3)]"), path, "torch", "main")
    assert (done.returncode, done.stderr) == (0, "")


def test_it_ends_with_this_process(path: str) -> None:
    script = HELD + "from comfy_parallel.weights.files import mapping\nprint(mapping._leases._guard[0].pid)\n"
    done = run_python(script, path, "append", "main")
    pid = int(done.stdout.splitlines()[-1])
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists() and "lease_guard" in Path(f"/proc/{pid}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
