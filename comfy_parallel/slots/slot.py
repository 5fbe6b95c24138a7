"""A slot: a device, its queue and its worker, and everything one running job must not share with another."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from comfy_parallel.core.histogram import Histogram
from comfy_parallel.core.series import Series
from comfy_parallel.core.shares import Share
from comfy_parallel.core.states import SlotEvent, SlotState, next_state
from comfy_parallel.slots.sight import Sight

logger = logging.getLogger(__name__)

T = TypeVar("T")


_NOBODY = object()
RECENT = 30  # ended jobs that a slot remembers


@dataclass(slots=True, eq=False)
class Run:
    """One execution of one job on a slot; it carries the interrupt flag, so a flag cannot outlive its job.

    `peer`: who sent it, as `Scope.peer`; `party`: who it counts for among those who share fairly. `at_end` is done when
    the job is in the history.
    """

    prompt_id: str
    client_id: Any = None
    peer: str | None = None
    share: Share | None = None
    interrupted: bool = False
    started: bool = False
    is_alone: bool = False
    turns: frozenset[str] = frozenset()  # what no other job that runs may need as well
    is_resting: bool = False  # between two of its nodes, until it is the only one that runs
    party: Any = None
    at_end: list[Callable[[], object]] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    alive_at: float = field(default_factory=time.monotonic)  # its last sign of life
    has_to_load: bool = False  # Its slot used other models last.
    stalls: int = 0  # how often it has been silent for too long
    stalled: BaseException | None = None  # how it is to end because of that
    trouble: str | None = None  # what is known of why it is silent
    waited_s: float = 0.0
    sight: Sight = field(default_factory=Sight)


@dataclass(slots=True, frozen=True)
class Ended:
    """A job that has ended on a slot; `ended_at` is of the monotonic clock."""

    prompt_id: str
    outcome: str
    waited_s: float
    ran_s: float
    ended_at: float


@dataclass(slots=True)
class SlotStats:
    """Counters since start; seconds are sums."""

    succeeded: int = 0
    failed: int = 0
    interrupted: int = 0
    out_of_memory: int = 0
    memory_retries: int = 0  # jobs that ran once more after they had run out of memory
    worker_restarts: int = 0
    suspensions: int = 0  # times the slot was suspended because it failed jobs in a row
    shares: int = 0  # of other slots' jobs; all the rest counts jobs only
    share_seconds: float = 0.0
    waits: Histogram = field(default_factory=Histogram)
    runs: Histogram = field(default_factory=Histogram)
    series: Series = field(default_factory=Series)
    last: deque[Ended] = field(default_factory=lambda: deque(maxlen=RECENT))
    latest: Ended | None = None  # a job or a share

    @property
    def busy_seconds(self) -> float:
        """With jobs and with shares."""
        return self.runs.sum_s + self.share_seconds

    @property
    def wait_seconds(self) -> float:
        return self.waits.sum_s


class Process(Protocol):
    """Another process, here or on another machine, which runs a slot's jobs in the place of the slot's thread.

    `kind`: `process` or `remote`; `address`: of one on another machine.
    """

    @property
    def kind(self) -> str: ...

    @property
    def address(self) -> str | None: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def state(self) -> str: ...

    @property
    def restarts(self) -> int: ...

    @property
    def last_end(self) -> str | None: ...

    @property
    def report(self) -> dict[str, Any]: ...

    def await_ready(self) -> None:
        """Return once it can be given a job."""

    def kill(self, reason: str) -> None:
        """End it; what it runs is lost."""

    def set_flags(self, flags: dict[str, Any]) -> None:
        """Have it carry out `POST /free`."""

    def execute(self, executor: Any, prompt: Any, prompt_id: Any, extra_data: Any, outputs: Any) -> None:
        """Run a job there for the host's executor here."""


class Slot:
    """The unit of concurrency. `device` is written as torch writes it: `cuda:1`, `cpu`.

    `place` is what people see in its stead: for a slot on another machine that one's name, and its `device` is what
    the slot's thread here computes on.
    """

    def __init__(self, index: int, device: str, place: str | None = None) -> None:
        self.index = index
        self.device = device
        self.place = place or device
        self.process: Process | None = None
        self.takes_part = True  # in jobs that are shared out and do not say which slots do
        self.run: Run | None = None
        self.state = SlotState.STARTING
        self.is_recording = False
        self.why_suspended: str | None = None
        self.last_client_id: Any = _NOBODY
        self.models: frozenset[str] = frozenset()  # the weight files of the last job that had any
        self.stats = SlotStats()
        self.values: dict[SlotLocal[Any], Any] = {}

    @property
    def kind(self) -> str:
        """`thread`, `process` or `remote`."""
        return "thread" if self.process is None else self.process.kind

    @property
    def name(self) -> str:
        return f"slot {self.index} ({self.place})"

    def change(self, event: SlotEvent) -> None:
        """Go on to the state that follows.

        Raises:
            ValueError: when this cannot happen now.
        """
        self.state = next_state(self.state, event)
        if event is SlotEvent.RESUME:
            self.why_suspended = None

    def begin_run(self, run: Run, waited_s: float) -> None:
        """Note what the slot runs now, and how long that had waited."""
        self.run = run
        run.waited_s = waited_s
        self.last_client_id = run.client_id
        if run.share is None:
            self.stats.waits.add(waited_s)

    def end_run(self, status: dict[str, Any] | None) -> None:
        """Count the running job, which ended with this status in the host's history."""
        messages = dict((status or {}).get("messages") or [])
        error = messages.get("execution_error")
        if "execution_interrupted" in messages:
            outcome = "interrupted"
        elif error is not None or (status or {}).get("status_str") == "error":
            outcome = "failed"
            self.stats.out_of_memory += "OutOfMemory" in str((error or {}).get("exception_type"))
        else:
            outcome = "succeeded"
        if self.run is None or self.run.share is None:
            setattr(self.stats, outcome, getattr(self.stats, outcome) + 1)
        if self.run is not None:
            self._note_end(self.run, outcome)
        ended, self.run = self.run, None
        for act in ended.at_end if ended is not None else ():
            self._do(act)

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:  # What nodes have put around the server's methods may fail; the job has ended all the same.
            logger.exception("%s: a client was not told of a job's end", self.name)

    def _note_end(self, run: Run, outcome: str) -> None:
        now = time.monotonic()
        ran_s = now - run.started_at
        self.stats.latest = ended = Ended(run.prompt_id, outcome, run.waited_s, ran_s, now)
        if run.share is not None:
            self.stats.shares += 1
            self.stats.share_seconds += ran_s
            return
        self.stats.runs.add(ran_s)
        self.stats.series.add(now, run.waited_s, ran_s)
        self.stats.last.append(ended)

    def __repr__(self) -> str:
        return f"<Slot {self.index} {self.place} {self.state.shown}>"


_CURRENT: ContextVar[Slot | None] = ContextVar("comfy_parallel_slot", default=None)
_SLOTS: tuple[Slot, ...] = ()
_TOLD = 0
_OUTSIDE: dict[SlotLocal[Any], Any] = {}

current_slot = _CURRENT.get


def current_index() -> int | None:
    """The calling slot's index; None outside slots."""
    slot = current_slot()
    return None if slot is None else slot.index


def slots() -> tuple[Slot, ...]:
    """All slots; empty until the host has built its queue."""
    return _SLOTS


def participating() -> list[int]:
    """The slots that were chosen for jobs that are shared out and do not say."""
    return [slot.index for slot in _SLOTS if slot.takes_part]


def set_slots(new: tuple[Slot, ...]) -> None:
    """Make `new` the process's slots."""
    global _SLOTS
    _SLOTS = new


def slots_in_all() -> int:
    """How many slots the server has. The process of a single slot has one of its own, and is told of the others."""
    return _TOLD or len(_SLOTS)


def tell_slots_in_all(count: int) -> None:
    """This process is that of one slot among so many."""
    global _TOLD
    _TOLD = count


def is_shared(slot: Slot) -> bool:
    """Whether another slot of this process computes on the same device."""
    return any(other.device == slot.device and other.process is None for other in slots() if other is not slot)


def current_runs() -> list[Run]:
    """What all slots run now."""
    return [run for slot in slots() if (run := slot.run) is not None]


def interrupt_job(prompt_id: str) -> bool:
    """Interrupt the job with this id wherever it runs; False when it runs nowhere."""
    runs = [run for run in current_runs() if run.prompt_id == prompt_id]
    for run in runs:
        run.interrupted = True
    return bool(runs)


class entered:  # noqa: N801 - used like a function
    """Run the body as code of `slot` (or of no slot). A class, because it is on the way of every job."""

    __slots__ = ("_slot", "_token")

    def __init__(self, slot: Slot | None) -> None:
        self._slot = slot

    def __enter__(self) -> None:
        self._token = _CURRENT.set(self._slot)

    def __exit__(self, *_exc_info: object) -> None:
        _CURRENT.reset(self._token)


class SlotLocal(Generic[T]):
    """A variable that every slot has its own of; code outside any slot shares one more."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    def get(self) -> T:
        """The calling slot's value, made on first use."""
        slot = _CURRENT.get()
        return self._of(_OUTSIDE if slot is None else slot.values)

    def set(self, value: T) -> None:
        """Set the calling slot's value."""
        slot = _CURRENT.get()
        (_OUTSIDE if slot is None else slot.values)[self] = value

    def of(self, slot: Slot | None) -> T:
        """The value of `slot`; of the code outside any slot when it is None."""
        return self._of(_OUTSIDE if slot is None else slot.values)

    def _of(self, store: dict[SlotLocal[Any], Any]) -> T:
        if self not in store:
            store.setdefault(self, self._make())
        value: T = store[self]
        return value
