"""A slot whose jobs run on another ComfyUI, as the front sees it."""

from __future__ import annotations

import concurrent.futures
import logging
from collections import OrderedDict
from typing import Any

from comfy_parallel.core.scope import BODY_FIELD, SETTLED_FIELD
from comfy_parallel.errors import CannotRunThere, JobLost, RemoteError
from comfy_parallel.fleet.remote import answering, asking
from comfy_parallel.fleet.remote.host import READY, RemoteHost
from comfy_parallel.fleet.remote.job import Order, RemoteJob
from comfy_parallel.host import files, secrets
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import Slot

logger = logging.getLogger(__name__)

_LOOK_S = 0.02  # how often a waiting thread looks whether its job is to be interrupted
_READY_S = 0.5
_FORWARDED = "comfy_parallel_forwarded"  # in a job's extra_data: it came from another server, and goes no further
# What the host here has settled; the other one is not to act on it again.
_OURS = frozenset(
    ("client_id", "gpu_id", "create_time", "priority", "client_order", "webhook", BODY_FIELD, SETTLED_FIELD)
)
_MOST_REFUSED = 1000


class RemoteSlot:
    """Gives the slot's jobs to another ComfyUI.

    Args:
        place: which of the slots there, counted from 0.
        requeues: whether a job whose host is lost waits again, once; else it fails.
        sends_keys: whether keys of accounts may be sent there.
    """

    kind = "remote"
    pid: int | None = None

    def __init__(self, slot: Slot, host: RemoteHost, place: int, *, requeues: bool, sends_keys: bool) -> None:
        self.slot, self.host, self._place = slot, host, place
        self._requeues, self._sends_keys = requeues, sends_keys
        self._refused: OrderedDict[Any, str] = OrderedDict()
        self._future: concurrent.futures.Future[bool] | None = None
        self._why_ended = ""

    @property
    def state(self) -> str:
        return self.host.state

    @property
    def restarts(self) -> int:
        return self.host.returns

    @property
    def last_end(self) -> str | None:
        return self.host.problem

    @property
    def address(self) -> str | None:
        return self.host.remote.url or None

    @property
    def report(self) -> dict[str, Any]:
        """What it has said last of its device; empty while it cannot be reached."""
        if self.host.state != READY or self._place >= len(self.host.reports):
            return {}
        return self.host.reports[self._place]

    def await_ready(self) -> None:
        """Wait until it can be reached and runs jobs for this slot."""
        while not self.host.ready.wait(_READY_S):
            pass

    def kill(self, reason: str) -> None:
        """Give up the job that runs there."""
        self._why_ended = reason
        if self._future is not None:
            self._future.cancel()

    def set_flags(self, flags: dict[str, Any]) -> None:
        """Have it carry out `POST /free`."""
        try:
            self.host.run(self.host.wire.post("/free", flags, self._headers)).result()
        except RemoteError as error:
            logger.warning("%s: it could not be told to free its memory: %s", self.slot.name, error)

    @property
    def takes_shares(self) -> bool:
        """Whether it can be asked for what its part of a job gives."""
        return self.host.takes_shares

    # Which jobs.

    def why_not(self, item: Any) -> str | None:
        """Why this slot cannot run a queue item; None when it can, or when that is not known."""
        reason = self._why_not(item)
        if reason is None:
            return None
        self.host.is_lacking = True
        return f"cannot run on {self.slot.place}: {reason}"

    def _why_not(self, item: Any) -> str | None:
        extra_data = item[3] if isinstance(item[3], dict) else {}
        if extra_data.get(_FORWARDED):
            return "it came from another server"
        if (refused := self._refused.get(item[1])) is not None:
            return refused
        if not self._sends_keys:
            given = {*extra_data, *(item[items.SENSITIVE] if len(item) > items.SENSITIVE else ())}
            if needed := secrets.asked_for(item[2], given & set(secrets.names())):
                return f"it needs {', '.join(needed)}, which is not sent there (COMFY_PARALLEL_REMOTE_KEYS)"
        ability = self.host.ability
        return None if ability is None else ability.why_not(item[2], _is_excused)

    # A job, on the slot's thread.

    def execute(self, executor: Any, prompt: Any, prompt_id: Any, extra_data: Any, outputs: Any) -> None:
        """Run a job there; afterwards `executor` has what the host's worker reads of it.

        Raises:
            JobLost: when the other side was lost, or refused the job.
        """
        server = executor.server
        server.client_id = extra_data.get("client_id")
        executor.success, executor.status_messages = False, []
        executor.history_result = {"outputs": {}, "meta": {}}
        role = answering.role()
        ends = {} if role is None or not role[0] else role[1][0].outputs_of(role[0])
        order = Order(
            prompt_id=str(prompt_id),
            prompt={**prompt, **ends},
            extra_data=self._sent(extra_data, is_shared=role is not None),
            outputs=list(ends) or outputs,
            client_id=server.client_id,
            features=self._features(server),
            headers=self._headers,
        )
        job = RemoteJob(self.host, executor, order, may_run_again=self._requeues)
        try:
            has_ended = self._wait(job)
        except CannotRunThere as error:
            self._refuse(prompt_id, error.message)
            raise JobLost(f"{self.slot.place}: {error.message}", has_begun=False, may_run_again=True) from error
        finally:
            server.last_node_id = None
            self._future = None
        if not has_ended:
            told = {"prompt_id": prompt_id, "node_id": "", "node_type": "", "executed": []}
            executor.add_message("execution_interrupted", told, broadcast=True)

    def _wait(self, job: RemoteJob) -> bool:
        run = self.slot.run
        self._future = future = self.host.run(job.run())
        while not concurrent.futures.wait([future], _LOOK_S).done:
            if run is not None and run.interrupted:
                run.interrupted = False
                job.interrupt()
        if future.cancelled():
            raise JobLost(self._why_ended, has_begun=True, may_run_again=self._requeues)
        return future.result()

    def forget_refusals(self) -> None:
        """The other side has got what it lacked, or lost what it had."""
        self._refused.clear()

    def _refuse(self, prompt_id: Any, reason: str) -> None:
        self._refused[prompt_id] = reason
        while len(self._refused) > _MOST_REFUSED:
            self._refused.popitem(last=False)
        items.judge_again()

    def _sent(self, extra_data: dict[str, Any], *, is_shared: bool) -> dict[str, Any]:
        """What of a job's `extra_data` the other side is sent."""
        kept = _OURS if self._sends_keys else _OURS.union(secrets.names())
        told: dict[str, Any] = {name: value for name, value in extra_data.items() if name not in kept}
        if is_shared or isinstance(told.get("participants"), list):  # These are slots of ours.
            told.pop("participants", None)
        return told | {_FORWARDED: True} | ({asking.ASKS: True} if is_shared else {})

    @property
    def _headers(self) -> dict[str, str]:
        numbers = self.host.numbers
        return {"X-TARGET-GPU": str(numbers[self._place])} if self._place < len(numbers) else {}

    @staticmethod
    def _features(server: Any) -> Any:
        metadata = getattr(server, "sockets_metadata", {}).get(server.client_id)
        return metadata.get("feature_flags") if isinstance(metadata, dict) else None


def _is_excused(kind: str, name: str, value: str) -> bool:
    """Whether a value that is not offered may be right: files are sent, and some nodes check for themselves."""
    return files.checks_itself(kind, name) or files.named_file(value) is not None
