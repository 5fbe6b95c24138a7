"""Which kind of slot suits a job, where slots in threads and in processes serve one queue. Pure: no lock, no clock."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from comfy_parallel.config import PROCESS, THREAD

FAST_STEP_S = 0.1  # An eager step that takes less is mostly Python's calls, which slots in threads make in turns.
_MOST_KNOWN = 1000  # workflows


class Steps(NamedTuple):
    """How the steps of one run on a slot in a thread went, and how long the run took."""

    eager: int
    replayed: int
    ran_s: float

    @property
    def is_bound_by_python(self) -> bool:
        """Whether most steps ran eagerly, and fast."""
        return self.eager > self.replayed and self.ran_s / (self.eager + self.replayed) < FAST_STEP_S


class Choice(NamedTuple):
    """The kind of slot that suits a job, whether it runs on no other, and why: `unsafe`, `eager` or `usual`."""

    kind: str
    is_bound: bool
    why: str


UNSAFE = Choice(PROCESS, True, "unsafe")
EAGER = Choice(PROCESS, False, "eager")
USUAL = Choice(THREAD, False, "usual")


class Kinds:
    """Chooses kinds by what is known of a job's nodes, and by how the last run of the same workflow went.

    A workflow is known by the classes of its nodes: numbers and texts change from job to job.
    """

    def __init__(self) -> None:
        self.chosen: Counter[str] = Counter()  # jobs, by why
        self._bound_by_python: OrderedDict[Hashable, bool] = OrderedDict()

    def choose(self, workflow: Hashable, *, is_unsafe: bool) -> Choice:
        """The kind for a job; `is_unsafe`: in a process that others share it would have to run alone."""
        choice = UNSAFE if is_unsafe else EAGER if self._bound_by_python.get(workflow) else USUAL
        self.chosen[choice.why] += 1
        return choice

    def note(self, workflow: Hashable, steps: Steps) -> None:
        """A job of this workflow has run on a slot in a thread. Runs without steps say nothing."""
        if steps.eager + steps.replayed == 0:
            return
        self._bound_by_python[workflow] = steps.is_bound_by_python
        self._bound_by_python.move_to_end(workflow)
        if len(self._bound_by_python) > _MOST_KNOWN:
            self._bound_by_python.popitem(last=False)

    @property
    def eager_workflows(self) -> int:
        """How many workflows go to processes because their steps ran eagerly, and fast."""
        return sum(self._bound_by_python.values())
