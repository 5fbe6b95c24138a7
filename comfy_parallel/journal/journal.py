"""What happened to each job, written down as it happens, and read back after a restart."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_parallel.errors import JournalError
from comfy_parallel.journal.file import JournalFile
from comfy_parallel.journal.log import Statement

logger = logging.getLogger(__name__)

_encode = json.JSONEncoder(check_circular=False).encode
_WITHOUT_JOB = "DELETE FROM jobs WHERE job = ?"
_WITHOUT_RUN = "DELETE FROM runs WHERE job = ?"
_WITHOUT_END = "DELETE FROM ends WHERE prompt_id = ?"
_EVERY_JOB_OF_END = "DELETE FROM jobs WHERE job IN (SELECT job FROM ends)"
_JOB_OF_END = "DELETE FROM jobs WHERE job IN (SELECT job FROM ends WHERE prompt_id = ?)"


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A job that had not ended. `item` is the host's, without what must not be on disk: `secrets` names that.

    `attempts` counts the runs that have begun.
    """

    job: int
    item: list[Any]
    target: int | None
    secrets: tuple[str, ...]
    request_key: str | None
    traits: dict[str, Any]
    attempts: int


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that had ended, with its entry of the history, in which `prompt` is missing."""

    job: int
    item: list[Any]
    request_key: str | None
    entry: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file tells: jobs in the order in which they were accepted, ends as they came.

    `counter` is the number that the host would have given to the next job; `next_job` is ours.
    """

    waiting: list[KeptJob]
    ended: list[EndedJob]
    counter: int
    next_job: int


class Journal:
    """The journal of one server. Its methods take changes in their order, wait for nothing and never raise; `flush` and
    `kept` wait until the changes are where a kill leaves them.

    Args:
        secret_names: what of a job's `extra_data` must not be on disk.
        is_power_safe: `kept` waits until a power cut leaves them, too.
    """

    def __init__(self, path: Path, secret_names: Iterable[str] = (), *, is_power_safe: bool = False) -> None:
        self._file = JournalFile(path, is_power_safe=is_power_safe)
        self._secret_names = frozenset(secret_names)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def problem(self) -> str | None:
        """Why the file is not up to date; None when it is."""
        return self._file.problem

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def flush(self) -> None:
        """Put what was told so far where a kill of the process leaves it."""
        self._file.flush()

    async def kept(self) -> None:
        """As `flush`, on the event loop."""
        await self._file.kept()

    async def tried(self) -> None:
        """Wait, a second at most, until `problem` tells of all that was told so far."""
        await self._file.tried()

    def accept(
        self,
        job: int,
        item: tuple[Any, ...],
        *,
        target: int | None,
        secrets: Iterable[str] = (),
        request_key: str | None = None,
        traits: dict[str, Any] | None = None,
        counter: int = 0,
        soon: bool = False,
    ) -> bool:
        """A job waits from now on, or was changed; `item` holds the host's first five parts, `traits` what else is to
        be known of it. Whether it is one that can be kept.

        `soon`: nobody is going to wait for it with `flush` or `kept`.
        """
        names = set(secrets)
        extra_data = item[3]
        if isinstance(extra_data, dict) and not self._secret_names.isdisjoint(extra_data):
            names |= self._secret_names.intersection(extra_data)
            extra_data = {name: value for name, value in extra_data.items() if name not in self._secret_names}
        try:
            texts = _encode([*item[:3], extra_data, *item[4:5]]), _encode(traits or {})
        except (TypeError, ValueError, RecursionError) as error:  # A node pack may queue what it likes.
            logger.warning("comfy_parallel: job %s is kept in memory only, because it is no JSON: %s", item[1], error)
            return False
        values = (job, texts[0], target, counter, json.dumps(sorted(names)), request_key, texts[1])
        self._file.write(("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", values), soon=soon)
        return True

    def start(self, job: int, attempts: int) -> None:
        """A run of the job begins, the `attempts`-th; with 0 the job was handed back before it ran."""
        self._file.write(("INSERT OR REPLACE INTO runs VALUES (?, ?)", (job, attempts)))

    def remove(self, jobs: Iterable[int]) -> None:
        """These jobs wait no more, and did not run."""
        self._file.write(*_each((_WITHOUT_JOB, _WITHOUT_RUN), jobs), soon=True)

    def end(self, job: int, prompt_id: str, entry: dict[str, Any], *, is_first: bool = False) -> None:
        """The job has ended, with this entry of the history. `is_first`: there is none of another job with this id."""
        prompt_id = _bindable(prompt_id)
        shown = {name: value for name, value in entry.items() if name != "prompt"}
        before = (f"{_JOB_OF_END} AND job != ?", (prompt_id, job)), (_WITHOUT_END, (prompt_id,))
        self._file.write(
            *(() if is_first else before),
            (_WITHOUT_RUN, (job,)),
            ("INSERT INTO ends (job, prompt_id, entry) VALUES (?, ?, ?)", (job, prompt_id, _text_of(shown))),
        )

    def forget(self, prompt_ids: Iterable[str], *, soon: bool = True) -> None:
        """These jobs are in the history no more. `soon`: as of `accept`."""
        self._file.write(*_each((_JOB_OF_END, _WITHOUT_END), map(_bindable, prompt_ids)), soon=soon)

    def forget_all(self) -> None:
        """The history was cleared."""
        self._file.write((_EVERY_JOB_OF_END, ()), ("DELETE FROM ends", ()), soon=True)

    def recover(self) -> Kept:
        """What the file tells of the time before.

        Raises:
            JournalError: when the file is broken.
        """
        rows = self._file.read(
            "SELECT jobs.job, item, target, secrets, request_key, traits, COALESCE(attempts, 0) FROM jobs"
            " LEFT JOIN runs USING (job) WHERE job NOT IN (SELECT job FROM ends) ORDER BY jobs.job"
        )
        ends = self._file.read("SELECT job, item, request_key, entry FROM ends JOIN jobs USING (job) ORDER BY position")
        [(counter, next_job)] = self._file.read(
            "SELECT COALESCE(MAX(counter), 0), COALESCE(MAX(job), -1) + 1 FROM jobs"
        )
        try:
            waiting = [
                KeptJob(job, json.loads(item), target, tuple(_parsed(secrets)), key, _parsed(traits), attempts)
                for job, item, target, secrets, key, traits, attempts in rows
            ]
            ended = [EndedJob(job, json.loads(item), key, json.loads(entry)) for job, item, key, entry in ends]
        except ValueError as error:
            raise JournalError(f"it holds what is no JSON: {error}", "move the file away and restart") from error
        return Kept(waiting, ended, counter, next_job)


def _each(statements: Iterable[str], values: Iterable[Any]) -> list[Statement]:
    return [(statement, (value,)) for value in values for statement in statements]


def _parsed(text: str) -> Any:
    """What is empty for most jobs, so that thousands of them are read quickly."""
    return [] if text == "[]" else json.loads(text)


def _bindable(text: str) -> str:
    """A text that SQLite takes: clients may send half a surrogate pair in an id."""
    return text if text.isascii() else json.dumps(text)


def _text_of(entry: dict[str, Any]) -> str:
    try:
        return _encode_entry(entry)
    except (ValueError, RecursionError) as error:  # A node's output may hold itself.
        kept = {name: entry.get(name) for name in ("gpu_id", "attempts")}
        logger.warning("comfy_parallel: the outputs of a job are not kept on disk: %s", error)
        return json.dumps({**kept, "outputs": {}, "meta": {}, "status": None}, default=_named)


def _named(value: Any) -> str:
    """What is shown after a restart in the place of something in a history entry that is no JSON."""
    return f"<{type(value).__name__}: not kept on disk, for it is no JSON>"


_encode_entry = json.JSONEncoder(default=_named, skipkeys=True).encode
