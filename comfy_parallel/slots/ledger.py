"""What the dispatcher tells the journal of each job, and which jobs there are, by id and by `Idempotency-Key`.

Whoever calls something here holds the dispatcher's mutex, unless said otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from comfy_parallel.core.scope import current_scope
from comfy_parallel.errors import KeyReused
from comfy_parallel.slots.items import SENSITIVE, QueueItem, is_item

if TYPE_CHECKING:  # It is given one, and imports none.
    from comfy_parallel.journal.journal import Journal

TRAITS = ("place", "peer", "party")  # of a QueueItem, which the host's item does not tell


class Repeated(NamedTuple):
    """The job that a request has brought again."""

    prompt_id: str
    number: float
    gpu_id: int | None


class Ledger:
    """Without a journal it only knows which jobs there are; `problem` says why there is none where one was wanted."""

    def __init__(self) -> None:
        self.arrivals = itertools.count()  # the numbers of the jobs to come
        self.journal: Journal | None = None
        self.most_attempts = 2  # how often a job may begin before it ends as an error
        self._problem: str | None = None
        self._counter: Callable[[], int] = lambda: 0
        self._live: dict[str, QueueItem] = {}  # by prompt_id the newest job that waits or runs
        self._running: dict[int, QueueItem] = {}  # by the number under which it runs
        self._blamed: set[int] = set()  # numbers of runs that count although the server is stopped in order
        self._handed_back: set[int] = set()  # taken by a node pack that did not run them
        self._ended: dict[str, str | None] = {}  # prompt_ids in the history, each with the key that its client sent
        self._ids: dict[str, tuple[str, str]] = {}  # by key: the prompt_id, and the digest of the request

    def open(self, journal: Journal, next_arrival: int, counter: Callable[[], int]) -> None:
        """Write to this journal from now on, where the next job has this number; the host gives it `counter()`."""
        self.journal, self._counter = journal, counter
        self.arrivals = itertools.count(next_arrival)

    def stay_off(self, problem: str) -> None:
        """Have it known why jobs are kept in memory only."""
        self._problem = problem

    @property
    def problem(self) -> str | None:
        """Why jobs are not kept in the file now; None when they are, or when nobody wants that. Needs no mutex."""
        return self._problem if self.journal is None else self.journal.problem

    @property
    def keeps(self) -> bool:
        """Whether a restart would find all jobs again. Needs no mutex."""
        return self.journal is not None and self.journal.problem is None

    def flush(self) -> None:
        """Put what was told so far where a kill of the process leaves it. Call it without the mutex."""
        if self.journal is not None:
            self.journal.flush()

    async def kept(self) -> None:
        """As `flush`, on the event loop."""
        if self.journal is not None:
            await self.journal.kept()

    async def tried(self) -> None:
        """Wait, a second at most, until `problem` tells of all that was told so far. Needs no mutex."""
        if self.journal is not None:
            await self.journal.tried()

    def close(self) -> None:
        """The server ends in order: what runs is not to blame, and its run does not count. Needs no mutex."""
        journal, self.journal = self.journal, None
        if journal is not None:
            for item_id, job in list(self._running.items()):
                if item_id not in self._blamed:
                    journal.start(job.arrival, job.attempts - 1)
            journal.close()

    def blame(self, item_ids: Iterable[int]) -> None:
        """One of these runs may be why the server is going to end: they count."""
        self._blamed.update(item_ids)

    # Which jobs there are.

    def repeated(self, item: Any, history: dict[str, Any]) -> Repeated | None:
        """The job that this request brings again, by the same key, or by the same id and workflow.

        Raises:
            KeyReused: when its key has come with another request.
        """
        scope = current_scope()
        if not scope.is_submission:
            return None
        key = scope.request_key
        if key is not None and key.name in self._ids:
            prompt_id, digest = self._ids[key.name]
            if digest != key.digest:
                raise KeyReused(key.name)
            return self._as_repeated(prompt_id, history)
        found = self._item_of(item[1], history) if is_item(item) and isinstance(item[1], str) else None
        is_same = found is not None and _is_same_workflow(found[2], item[2])
        return self._as_repeated(item[1], history) if is_same else None

    def _item_of(self, prompt_id: str, history: dict[str, Any]) -> Any:
        live = self._live.get(prompt_id)
        return live if live is not None else history.get(prompt_id, {}).get("prompt")

    def _as_repeated(self, prompt_id: str, history: dict[str, Any]) -> Repeated | None:
        item = self._item_of(prompt_id, history)
        if item is None:
            return None
        return Repeated(prompt_id, item[0], item[3].get("gpu_id") if isinstance(item[3], dict) else None)

    # What happens to them.

    def accept(self, item: QueueItem) -> None:
        """A job waits from now on."""
        if item.share is not None:
            return  # The job that it is a share of comes back as a whole.
        if not is_item(item) or not isinstance(item[1], str) or not isinstance(item[3], dict):
            return  # A node pack queues what it likes.
        scope, before = current_scope(), self._live.get(item[1])
        if before is not None and before.arrival in self._handed_back:
            self.remove([before])
        self._live[item[1]] = item
        if scope.request_key is not None:
            item.request_key = scope.request_key.text
            self._know_key(item.request_key, item[1])
        if scope.is_kept:
            self._write(item, soon=not scope.is_submission)

    def change(self, item: QueueItem) -> None:
        """A job that waits was changed."""
        if item.is_kept:
            self._write(item, soon=True)

    def _write(self, item: QueueItem, *, soon: bool) -> None:
        if self.journal is not None:
            item.is_kept = self.journal.accept(
                item.arrival,
                item,
                target=item.target,
                secrets=_secrets(item),
                request_key=item.request_key,
                traits={name: getattr(item, name) for name in TRAITS},
                counter=self._counter(),
                soon=soon,
            )

    def restore(self, item: QueueItem) -> None:
        """A job of the journal waits again."""
        item.is_kept = True
        self._live[item[1]] = item
        self._know_key(item.request_key, item[1])

    def restore_ended(self, prompt_id: str, request_key: str | None) -> None:
        """A job of the journal is in the history again."""
        self._ended[prompt_id] = request_key
        self._know_key(request_key, prompt_id)

    def start(self, item_id: int, item: Any) -> None:
        """A slot has taken the job, and runs it under this number."""
        job = self._job_of(item)
        if job is None or job.share is not None:
            return
        self._handed_back.discard(job.arrival)
        self._running[item_id] = job
        job.attempts += 1
        if self.journal is not None and job.is_kept:
            self.journal.start(job.arrival, job.attempts)

    def hand_back(self, item_id: int, *, has_run: bool = False) -> None:
        """The slot's worker goes without this job, which has not run, or has not ended because its process did."""
        job = self._running.pop(item_id, None)
        if job is None:
            return
        if self._live.get(job[1]) is not job:  # A node pack has queued it again meanwhile.
            self.remove([job])
            return
        job.attempts -= not has_run
        self._handed_back.add(job.arrival)
        if self.journal is not None and job.is_kept:
            self.journal.start(job.arrival, job.attempts)

    def remove(self, items: Iterable[Any]) -> None:
        """These jobs wait no more, and did not run."""
        gone = [item for item in items if type(item) is QueueItem and item.arrival >= 0]
        for item in gone:
            self._forget_live(item)
        if self.journal is not None and (kept := [item.arrival for item in gone if item.is_kept]):
            self.journal.remove(kept)

    def replace(self, before: list[Any], after: list[Any]) -> None:
        """Those of the second list wait instead of the first; a node pack may have made new items for the same jobs."""
        here = {id(item) for item in after} | {item[1] for item in after if is_item(item)}
        self.remove([item for item in before if id(item) not in here and not (is_item(item) and item[1] in here)])

    def end(self, item_id: int, prompt_id: Any, entry: dict[str, Any], history: dict[str, Any]) -> None:
        """The job that ran under this number has ended, with this entry in the history."""
        job = self._running.pop(item_id, None) or self._live.get(prompt_id)
        if job is not None:
            self.settle(job, entry)
        self.match(history, soon=False)

    def settle(self, job: QueueItem, entry: dict[str, Any]) -> None:
        """The job has ended with this entry, which gains the number of its attempts when there were several."""
        request_key = job.request_key
        self._forget_live(job)
        if not entry:  # A node pack wants it out of the history.
            if self.journal is not None and job.is_kept:
                self.journal.remove([job.arrival])
            return
        if job.attempts > 1:
            entry["attempts"] = job.attempts
        is_first = job[1] not in self._ended
        self.restore_ended(job[1], request_key)
        if self.journal is not None and job.is_kept:
            self.journal.end(job.arrival, job[1], entry, is_first=is_first)

    def match(self, history: dict[str, Any], *, soon: bool = True) -> None:
        """Forget what the history has forgotten: it is bounded, and can be cleared. `soon`: no `flush` follows."""
        if len(self._ended) <= len(history):
            return
        oldest = next(iter(self._ended))
        is_oldest = oldest not in history and len(self._ended) == len(history) + 1
        gone = [oldest] if is_oldest else [prompt_id for prompt_id in self._ended if prompt_id not in history]
        for prompt_id in gone:
            self._forget_key(self._ended.pop(prompt_id))
        if self.journal is not None:
            if self._ended:
                self.journal.forget(gone, soon=soon)
            else:
                self.journal.forget_all()

    def _job_of(self, item: Any) -> QueueItem | None:
        """The job that is meant: a node pack may have made a new item of it."""
        if type(item) is QueueItem and item.arrival >= 0:
            return item
        return self._live.get(item[1]) if is_item(item) and isinstance(item[1], str) else None

    def _forget_live(self, job: QueueItem) -> None:
        self._handed_back.discard(job.arrival)
        if (live := self._live.get(job[1])) is not None and live.arrival == job.arrival:
            del self._live[job[1]]
            self._forget_key(job.request_key)

    def _know_key(self, request_key: str | None, prompt_id: str) -> None:
        if request_key is not None:
            digest, _, name = request_key.partition(" ")
            self._ids[name] = prompt_id, digest

    def _forget_key(self, request_key: str | None) -> None:
        if request_key is not None:
            self._ids.pop(request_key.partition(" ")[2], None)


def _is_same_workflow(one: Any, other: Any) -> bool:
    """Whether two workflows are the same, but for what the host notes in the one that it runs (`is_changed`)."""
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return bool(one == other)
    return all(_as_sent(node) == _as_sent(other[name]) for name, node in one.items())


def _as_sent(node: Any) -> Any:
    return {name: value for name, value in node.items() if name != "is_changed"} if isinstance(node, dict) else node


def _secrets(item: QueueItem) -> Iterable[str]:
    return item[SENSITIVE] if len(item) > SENSITIVE and isinstance(item[SENSITIVE], dict) else ()
