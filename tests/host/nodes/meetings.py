"""Jobs that wait for each other: in the memory of one process, or in files where slots run in several."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = "COMFYUI_TEST_MEETINGS"  # The variable that names the folder of the files; no name that configures us.
_LOOK_S = 0.002


@dataclass(eq=False)
class Meeting:
    """Jobs waiting for each other under one key."""

    present: int = 0
    is_complete: bool = False


_changed = threading.Condition()
_meetings: dict[str, Meeting] = {}


def meet(key: str, parties: int, timeout_s: float) -> None:
    """Return once `parties` jobs are in here at the same time; who comes later with this key starts a new meeting.

    Raises:
        TimeoutError: when they are not.
    """
    folder = os.environ.get(FOLDER)
    present = _meet_here(key, parties, timeout_s) if folder is None else _meet_in(folder, key, parties, timeout_s)
    if present is not None:
        raise TimeoutError(f"rendezvous {key!r}: {present} of {parties} jobs after {timeout_s} s")


def _meet_here(key: str, parties: int, timeout_s: float) -> int | None:
    """None, or how many there were when it was over."""
    with _changed:
        meeting = _meetings.setdefault(key, Meeting())
        meeting.present += 1
        if meeting.present == parties:
            _meetings.pop(key).is_complete = True
            _changed.notify_all()
        if _changed.wait_for(lambda: meeting.is_complete, timeout_s):
            return None
        meeting.present -= 1
        return meeting.present + 1


def _meet_in(folder: str, key: str, parties: int, timeout_s: float) -> int | None:
    path = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    with _locked(path) as state:
        number = state["number"]
        state["present"] += 1
        if state["present"] == parties:
            state.update(number=number + 1, present=0)
    deadline = time.monotonic() + timeout_s
    while True:
        with _locked(path) as state:
            if state["number"] != number:
                return None
            if time.monotonic() > deadline:
                state["present"] -= 1
                return state["present"] + 1
        time.sleep(_LOOK_S)


@contextmanager
def _locked(path: Path) -> Iterator[dict[str, int]]:
    """What the file says, to be changed by nobody else meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        state = json.loads(text) if text else {"number": 0, "present": 0}
        yield state
        if (changed := json.dumps(state)) != text:
            file.seek(0)
            file.truncate()
            file.write(changed)
