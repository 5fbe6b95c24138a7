"""Look for unknown globals of the host while it starts, in a process of its own: all files are read and parsed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from comfy_parallel.errors import HostMismatch

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
        command = [sys.executable, "-c", _LOOK, str(_ROOT), str(host_dir), "0" if is_awaited else "10"]
        self._error: Exception | None = None
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except (
            OSError,
            TypeError,
            ValueError,
        ) as error:  # A Python inside another program may know no path of its own.
            self._error = error

    def found(self) -> list[str]:
        """Wait for the result: one sentence per unknown global.

        Raises:
            HostMismatch: when the search could not be made, with the reason.
        """
        if self._error is not None:
            raise HostMismatch(f"unknown globals of the host were not looked for: {self._error}")
        try:
            output, errors = self._process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            self.stop()
            raise HostMismatch(f"unknown globals of the host were not found within {_LIMIT_S:.0f} s") from error
        if self._process.returncode != 0:
            raise HostMismatch(f"unknown globals of the host were not looked for: {errors.strip()[-500:]}")
        return [describe(*row) for row in json.loads(output)]

    def stop(self) -> None:
        """End a search whose result nobody needs any more."""
        if self._error is None:
            self._process.kill()
            self._process.communicate()


def describe(path: str, name: str, line: int) -> str:
    """What an unknown global means, in one sentence."""
    return f"unknown global {name} ({path}:{line}): the host changes it at run time; slots may race on it"
