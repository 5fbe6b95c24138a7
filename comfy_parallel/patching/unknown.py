"""Look for unknown globals of the host while it starts, in a process of its own: all files are read and parsed.

What was found is kept beside Python's own compiled files until a source changes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.kept import keep, state_of
from comfy_parallel.patching.scan import is_scanned
from comfy_parallel.patching.sources import Checkout

_ROOT = Path(__file__).resolve().parents[2]
_LOOK = """
import json, os, sys
getattr(os, "nice", id)(int(sys.argv[3]))
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from comfy_parallel.patching.scan import unknown_globals
from comfy_parallel.patching.sources import Checkout
print(json.dumps(unknown_globals(Checkout(Path(sys.argv[2])))))
"""
_LIMIT_S = 600.0


class Search:
    """A search that runs beside the host's own start; in the background unless somebody waits for it."""

    def __init__(self, host_dir: Path, *, is_awaited: bool = False) -> None:
        self._kept = _Kept(host_dir)
        self._known = self._kept.read()
        self._process: subprocess.Popen[str] | None = None
        if self._known is None:
            self._start(host_dir, is_awaited)

    def _start(self, host_dir: Path, is_awaited: bool) -> None:
        command = [sys.executable, "-c", _LOOK, str(_ROOT), str(host_dir), "0" if is_awaited else "10"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except (OSError, TypeError, ValueError) as error:  # A Python in another program may not know where it lies.
            self._error: Exception = error

    def found(self) -> list[str]:
        """Wait for the result: one sentence per unknown global.

        Raises:
            HostMismatch: when the search could not be made, with the reason.
        """
        if self._known is not None:
            return self._known
        if self._process is None:
            raise HostMismatch(f"unknown globals of the host were not looked for: {self._error}")
        try:
            output, errors = self._process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            self.stop()
            raise HostMismatch(f"unknown globals of the host were not found within {_LIMIT_S:.0f} s") from error
        if self._process.returncode != 0:
            raise HostMismatch(f"unknown globals of the host were not looked for: {errors.strip()[-500:]}")
        self._known = [describe(*row) for row in json.loads(output)]
        self._kept.write(self._known)
        return self._known

    def stop(self) -> None:
        """End a search whose result nobody needs any more."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def describe(path: str, name: str, line: int) -> str:
    """What an unknown global means, in one sentence."""
    return f"unknown global {name} ({path}:{line}): the host changes it at run time; slots may race on it"


class _Kept:
    """The sentences of an earlier search of the same sources."""

    def __init__(self, host_dir: Path) -> None:
        own = Path(__file__).parent
        name = hashlib.sha256(str(host_dir).encode()).hexdigest()[:16]
        self._place = own / "__pycache__" / f"unknown-globals-{name}.json"
        scanned = (host_dir / path for path in Checkout(host_dir).python_files() if is_scanned(path))
        self._key = state_of([*scanned, *own.glob("*.py")])

    def read(self) -> list[str] | None:
        try:
            kept = json.loads(self._place.read_text(encoding="utf-8"))
            return list(kept["found"]) if kept["key"] == self._key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, found: list[str]) -> None:
        keep(self._place, json.dumps({"key": self._key, "found": found}).encode())
