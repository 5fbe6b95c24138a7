"""Answers what a job on another ComfyUI asks of the server that sent it there."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from comfy_parallel.errors import RemoteError
from comfy_parallel.fleet import questions
from comfy_parallel.fleet.plain_values import NotPlain, decoded, encoded

if TYPE_CHECKING:
    from comfy_parallel.fleet.remote.host import RemoteHost

logger = logging.getLogger(__name__)

QUESTION = "shares, plainly"


def role() -> Any:
    """Which participant the running job is, and the plans of the job that is shared out; None when none is."""
    return questions.answer(QUESTION, "role") if questions.is_known(QUESTION) else None


async def answer_all(host: RemoteHost, job_id: str) -> None:
    """Answer what waits. Called in the job's slot.

    Raises:
        RemoteError: when the other side cannot be reached.
    """
    while asked := await host.fetch(f"/parallel/questions/{job_id}"):
        number, answer = await asyncio.to_thread(_answer, asked)
        await host.bring(f"/parallel/questions/{job_id}?number={number}", answer)


def _answer(asked: bytes) -> tuple[int, bytes]:
    try:
        number, what, args = decoded(asked)
    except ValueError as error:
        raise RemoteError(f"its question is not understood: {error}") from error
    try:
        return int(number), encoded((True, questions.answer(QUESTION, str(what), *args)))
    except NotPlain as error:
        return int(number), encoded((False, str(error)))
    except Exception as error:  # It is the other side's to say, which fails its job.
        logger.exception("comfy_parallel: a question of a job on another machine (%s) could not be answered", what)
        return int(number), encoded((False, f"{type(error).__name__}: {error}"))
