"""A slot's worker: the host's own `prompt_worker` on a thread bound to the slot, restarted when it dies."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.slots import device, lost_devices, warming
from comfy_parallel.slots.host_worker import RunWorker, calling_worker, replace_worker
from comfy_parallel.slots.items import error_text
from comfy_parallel.slots.slot import Slot, entered, slots
from comfy_parallel.slots.spent_errors import drop_frames

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
_HEALTHY_AFTER_S = 60.0


def take_over(front: Any, is_queue: Callable[[Any], bool]) -> None:
    """Have the host's worker, which the host is about to start with a queue of this kind, run for every slot."""
    replace_worker(lambda run_worker, queue: start_workers(front, run_worker, queue), is_queue)


def start_from_call(front: Any) -> None:
    """Start the workers out of the first `get` of the host's worker, when it was called in another way.

    Raises:
        RuntimeError: when the workers run already, so this is no worker's call.
        HostMismatch: when no worker is among the callers.
    """
    if front.is_started:
        raise RuntimeError("Jobs are taken by slots: use PromptServer.instance.prompt_queues[i].get()")
    start_workers(front, *calling_worker(sys._getframe(1), front.is_behind))


class Worker:
    """Runs the host's worker for one slot, for as long as the process lives."""

    def __init__(self, slot: Slot, queue: Any, run_worker: RunWorker) -> None:
        self.slot, self.queue = slot, queue
        self._run_worker = run_worker
        self._pause_s = _FIRST_PAUSE_S

    def start(self) -> None:
        """Run on a thread of its own."""
        threading.Thread(target=self.run, daemon=True, name=_thread_name(self.slot)).start()

    def run(self) -> None:
        """Run on the calling thread; does not return."""
        threading.current_thread().name = _thread_name(self.slot)
        with entered(self.slot):
            if self.slot.process is None:
                device.bind(self.slot.device, sum(slot.process is None for slot in slots()))
                warming.warm(self.slot)
            logger.info("%s: worker started", self.slot.name)
            while True:
                self._run_once()
                self.slot.stats.worker_restarts += 1

    def _run_once(self) -> None:
        started = time.monotonic()
        try:
            self._run_worker(self.queue)
            error: BaseException = RuntimeError("the host's worker returned")
        except BaseException as raised:  # Whatever a node raises ends this job, never the slot.
            error = raised
        lost_devices.look(self.slot, error)
        failed = self._end_jobs(error)
        drop_frames(error)  # They hold the dead executor, and with it device memory.
        del error
        if time.monotonic() - started > _HEALTHY_AFTER_S or failed:
            self._pause_s = _FIRST_PAUSE_S
        logger.error("%s: worker died; starting it again in %.1f s", self.slot.name, self._pause_s)
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def _end_jobs(self, error: BaseException) -> bool:
        """End the slot's job as an error; whether it had one."""
        try:
            return bool(self.queue.fail_running(error))
        except BaseException as raised:  # So may what nodes have put around the queue's and the server's methods.
            text = f"{type(raised).__name__}: {error_text(raised)}"
            logger.error("%s: %s while a job was ended as an error", self.slot.name, text)
            drop_frames(raised)
            return True


def start_workers(front: Any, run_worker: RunWorker, hosts_queue: Any = None) -> None:
    """Start one worker per slot; the calling thread, the host's own, becomes the first slot's.

    `hosts_queue` is what the host gave its worker, if that is not the front.

    What the imports made stays, so garbage collections need not look at it: the host collects after jobs, on every
    slot, and all slots stand still meanwhile.
    """
    gc.collect()
    gc.freeze()
    front.start(front if hosts_queue is None else hosts_queue)
    workers = [Worker(queue.slot, queue, run_worker) for queue in front.slot_queues]
    for worker in workers[1:]:
        worker.start()
    workers[0].run()


def _thread_name(slot: Slot) -> str:
    return f"slot-{slot.index}-{slot.place}"
