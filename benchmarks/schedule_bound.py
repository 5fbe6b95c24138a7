"""How soon any schedule at all could have run a trace: what the simulation of the scheduler compares with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """A job: when it came, how many seconds it runs on a slot of slowness 1, and which models it needs."""

    came: float
    seconds: float
    models: Hashable


def lower_bound(jobs: Iterable[Work], slownesses: Sequence[float], load_s: float) -> float:
    """Seconds from 0 that no schedule ends before, even one that knows all jobs beforehand.

    A slot runs one job at a time, for `seconds` times its slowness, and has nothing loaded at first. Before a job whose
    models are not those of the slot's last one it loads them for `load_s`; it cannot begin that before the job came.
    `power` is what all slots do together in a second, `fast` and `slow` the least and the greatest slowness.

    Let a schedule end at T. Then each of these holds:

    1. One job. On its slot something was loaded first, not before the first job of all came. So
       T >= max(came, first came + load_s) + seconds * fast.
    2. Late work. What came at t or later is done after t, so T >= t + (its work) / power; for every t.
    3. Loads. A slot that runs jobs of model k has loaded it, so it has done at most (T - load_s) / fast of k's work
       w(k). Hence at least n(k, T) = ceil(w(k) * fast / (T - load_s)) slots have loaded k. In the time of
       a load its slot would have done at least load_s / slow. So
       T * power >= sum of w(k) + sum of n(k, T) * load_s / slow.

    The right side of 3 falls as T grows and the left side rises, so the least T that fulfils it is found by halving.
    The bound is the largest of all. It leaves out that jobs cannot be cut, so it may lie below the best schedule.
    """
    jobs = sorted(jobs)
    if not jobs:
        return 0.0
    power, fast, slow = sum(1 / one for one in slownesses), min(slownesses), max(slownesses)
    work: dict[Hashable, float] = defaultdict(float)
    bound, later, first = 0.0, 0.0, jobs[0].came
    for job in reversed(jobs):
        later += job.seconds
        work[job.models] += job.seconds
        bound = max(bound, max(job.came, first + load_s) + job.seconds * fast, job.came + later / power)
    return max(bound, _with_loads(work.values(), power, fast, load_s, load_s / slow))


def _with_loads(work: Iterable[float], power: float, fast: float, load_s: float, load: float) -> float:
    """The least T of the third bound."""
    amounts = [one * fast for one in work]
    total = sum(amounts) / fast

    def is_too_short(end: float) -> bool:
        loads = sum(math.ceil(one / (end - load_s) - 1e-9) for one in amounts)
        return end * power < total + loads * load

    low = max(load_s, total / power)
    high = low + load_s + (total + len(amounts) * load) / power + max(amounts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_short(middle) else (low, middle)
    return low
