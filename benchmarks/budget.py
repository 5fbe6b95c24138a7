"""A benchmark's run within a budget of time, whose table is printed however it ends."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.host.server import HostServerError

END_S = 15  # what stopping the servers and printing may take


class Deadline:
    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


def run_within(
    options: argparse.Namespace,
    notes: list[str],
    measure: Callable[[argparse.Namespace, Path, ExitStack, Deadline], None],
    report: Callable[[], None],
) -> None:
    """Measure until `options.budget_s` is nearly over, and report what there is by then.

    Args:
        notes: what is said of a run that stopped early is added to them.
        measure: gets an empty folder, and a stack on which it puts what has to be stopped.
    """
    deadline = Deadline(options.budget_s - END_S)
    with ExitStack() as stack:
        work_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            measure(options, work_dir, stack, deadline)
        except (HostServerError, OSError, subprocess.SubprocessError) as error:
            notes.append(f"stopped early: {error}")
        finally:
            report()
