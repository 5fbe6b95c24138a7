"""A slot keeps its event loop from job to job, but not one in which something of a job is left."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from comfy_parallel.slots import loops
from comfy_parallel.slots.slot import Slot, entered

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is not there")
Job = Callable[[], Coroutine[Any, Any, Any]]
left: list[Any] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    left.clear()


def ids_of_loops(*jobs: Job) -> list[int]:
    """The loops in which these jobs run, one after the other, on a slot's thread."""
    found: list[int] = []
    keep: list[Any] = []  # else a new loop could have the place, and so the id, of an old one

    async def noting(job: Job) -> None:
        found.append(id(asyncio.get_running_loop()._selector))  # type: ignore[attr-defined]
        keep.append(asyncio.get_running_loop()._selector)  # type: ignore[attr-defined]
        await job()

    def work() -> None:
        with entered(Slot(0, "cpu")):
            for job in jobs:
                loops.run(noting(job))
                with pytest.raises(RuntimeError):
                    asyncio.get_event_loop()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == len(jobs)
    return found


async def nothing() -> None:
    await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0.001))


async def a_reference() -> None:
    left.append(asyncio.get_running_loop())


async def a_task() -> None:
    left.append(asyncio.create_task(asyncio.sleep(600)))


async def a_timer() -> None:
    asyncio.get_running_loop().call_later(600, print)


async def a_thread() -> None:
    await asyncio.to_thread(sum, ())


async def a_generator() -> None:
    async def endless() -> AsyncIterator[int]:
        while True:
            yield 1

    left.append(endless())
    await anext(left[0])


async def a_setting() -> None:
    asyncio.get_running_loop().set_debug(True)


async def a_handler() -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)


def test_it_is_kept_after_jobs_that_leave_nothing_in_it() -> None:
    assert len(set(ids_of_loops(nothing, nothing, nothing))) == 1


@pytest.mark.parametrize(
    "job", [a_reference, a_task, a_timer, a_thread, a_generator, a_setting, a_handler], ids=lambda job: job.__name__
)
def test_it_is_not_kept_with_what_a_job_leaves(job: Job) -> None:
    before, of_job, after = ids_of_loops(nothing, job, nothing)
    assert before == of_job != after
    if job is a_reference:
        assert left[0].is_closed()
    if job is a_task:
        assert left[0].cancelled()


def test_a_job_that_fails_ends_its_loop_and_the_error_is_the_jobs() -> None:
    async def fail() -> None:
        left.append(asyncio.get_running_loop())
        raise ValueError("of the job")

    with entered(Slot(0, "cpu")), pytest.raises(ValueError, match="of the job"):
        loops.run(fail())
    assert left[0].is_closed()


def test_what_a_node_pack_puts_in_the_place_of_run_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(main: Coroutine[Any, Any, Any]) -> str:
        main.close()
        return "the pack's"

    monkeypatch.setattr(asyncio, "run", run)
    with entered(Slot(0, "cpu")):
        assert loops.run(nothing()) == "the pack's"
