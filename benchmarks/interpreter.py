"""How long a server holds Python's interpreter lock, which all slots of a process share, as py-spy sees it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

RATE = 250  # samples per second


def is_available() -> bool:
    return shutil.which("py-spy") is not None


def held_share(pid: int, seconds: int) -> float | None:
    """The share of the next `seconds` in which a thread of a process holds the interpreter; None if it cannot be told.

    Raises:
        OSError: py-spy is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stacks"
        what = ["record", "--gil", "--rate", str(RATE), "--duration", str(seconds), "--format", "raw"]
        subprocess.run(["py-spy", *what, "--output", str(path), "--pid", str(pid)], capture_output=True, check=False)
        if not path.exists():
            return None
        samples = sum(int(line.rpartition(" ")[2]) for line in path.read_text().splitlines())
    return samples / (RATE * seconds)
