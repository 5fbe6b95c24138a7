"""After a restart: what the journal tells waits again, is in the history again, or has ended as an error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from comfy_parallel.slots.askers import note_peer
from comfy_parallel.slots.ended_unrun import end_as_error
from comfy_parallel.slots.items import QueueItem
from comfy_parallel.slots.ledger import TRAITS

if TYPE_CHECKING:  # It is given what was kept, and reads none.
    from comfy_parallel.journal.journal import EndedJob, Kept, KeptJob

logger = logging.getLogger(__name__)

Lacks = Callable[[Any, Iterable[str]], list[str]]


class LostJob(RuntimeError):
    """A job of before the restart that is not run again; the text says why."""


class Recovery:
    """Puts back what was kept.

    Args:
        most_attempts: how often a job may begin to run before it ends as an error.
        lacks: of these secrets, which are not on disk, those that the nodes of a workflow ask for.
    """

    def __init__(self, front: Any, most_attempts: int, lacks: Lacks) -> None:
        self._front, self._dispatcher = front, front._dispatcher
        self._most_attempts, self._lacks = most_attempts, lacks
        self._has_secrets = front.has_secrets

    def restore(self, kept: Kept) -> None:
        """Put everything back; call it before a slot's worker runs."""
        with self._front.mutex:
            for ended in kept.ended:
                self._restore_ended(ended)
            waiting, ran = [], 0
            for job in kept.waiting:
                item = self._item(job)
                reason = self._why_not(job)
                if reason is not None:
                    self._end(item, reason)
                    continue
                waiting.append(item)
                ran += item.attempts > 0
            if ran > 1:
                _run_alone([item for item in waiting if item.attempts])
            self._dispatcher.restore(waiting)
            self._front.server.queue_updated()
        self._front.ledger.flush()
        if kept.waiting or kept.ended:
            logger.info(
                "comfy_parallel: %d jobs wait again, %d of which had begun to run; %d are in the history again",
                len(waiting),
                ran,
                len(kept.ended),
            )

    def _restore_ended(self, ended: EndedJob) -> None:
        prompt_id, extra_data = ended.item[1], ended.item[3]
        extra_data["gpu_id"] = ended.entry.get("gpu_id")
        self._front.history[prompt_id] = {"prompt": tuple(ended.item), **ended.entry}
        self._front.ledger.restore_ended(prompt_id, ended.request_key)

    def _item(self, job: KeptJob) -> QueueItem:
        item = QueueItem((*job.item, *([{}] if self._has_secrets else [])))
        item.arrival, item.attempts, item.request_key = job.job, job.attempts, job.request_key
        item.queued_at = time.monotonic()
        item.__dict__.update({name: job.traits[name] for name in TRAITS if name in job.traits})
        if item.peer is not None:
            note_peer(item.peer)
        item.target = job.target
        if job.target is not None and job.target >= len(self._front.slot_queues):
            text = "comfy_parallel: job %s was bound to slot %d, which is not there any more; any slot may run it"
            logger.warning(text, item[1], job.target)
            item.target = None
        item[3]["gpu_id"] = item.target
        self._front.ledger.restore(item)
        return item

    def _why_not(self, job: KeptJob) -> str | None:
        if job.attempts >= self._most_attempts:
            return (
                f"The server ended {job.attempts} times while it ran this job, so it is not run again"
                f" (COMFY_PARALLEL_ATTEMPTS={self._most_attempts}); if the job is not to blame, send it once more"
            )
        if lacking := self._lacks(job.item[2], job.secrets):
            return (
                f"The server was restarted while this job waited or ran, and it needs {', '.join(lacking)}, which is"
                " never kept on disk; send the job again"
            )
        return None

    def _end(self, item: QueueItem, reason: str) -> None:
        end_as_error(self._front, item, reason, LostJob)


def _run_alone(items: list[QueueItem]) -> None:
    """One of these may have ended the server: run each by itself, so that none of the others can end with it."""
    for item in items:
        item.must_run_alone()
    logger.warning(
        "comfy_parallel: %d jobs ran when the server ended, and one may be to blame: they run again one at a time",
        len(items),
    )
