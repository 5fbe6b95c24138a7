"""The host's queue items: what they hold, their order, and how a failed one is told."""

from __future__ import annotations

import copy
import json
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from comfy_parallel.config import CLIENT_ORDERS, MOST_PRIORITY
from comfy_parallel.core.ability import WEIGHT_FILE
from comfy_parallel.core.job_kind import kind_of
from comfy_parallel.core.scope import body_target
from comfy_parallel.core.shares import Share
from comfy_parallel.errors import BadRequest
from comfy_parallel.slots.slot import slots

_encode = json.JSONEncoder(check_circular=False).encode  # Items come from JSON; the check takes a quarter of the time.
SENSITIVE = 5  # index, in a host item, of the keys that must not reach the history


_NO_TURNS: frozenset[str] = frozenset()
_runs_alone: Callable[[Any], bool] | None = None
_turns_of: Callable[[Any], frozenset[str]] | None = None


def who_takes_turns(says: Callable[[Any], frozenset[str]] | None) -> None:
    """Have `says(workflow)` tell of each job what no other job that runs may need as well; None: nothing."""
    global _turns_of
    _turns_of = says


def when_to_run_alone(says: Callable[[Any], bool] | None) -> None:
    """Have `says(workflow)` tell of each job whether it must be the only one that runs; None: of none."""
    global _runs_alone
    _runs_alone = says


def runs_alone(workflow: Any) -> bool:
    """Whether a job with these nodes must be the only one that runs."""
    return _runs_alone is not None and _runs_alone(workflow)


def turns_of(workflow: Any) -> frozenset[str]:
    """What a job with these nodes needs for itself."""
    return _NO_TURNS if _turns_of is None else _turns_of(workflow)


_judge: Callable[[Any], Mapping[int, str]] | None = None
_judgement = 0  # Those of before were made by what is not true any more.
_NOWHERE: Mapping[int, str] = {}


def when_to_bar(judge: Callable[[Any], Mapping[int, str]] | None) -> None:
    """Have `judge(item)` say of each job which slots cannot run it, by their numbers, and why; None: all can."""
    global _judge
    _judge = judge
    judge_again()


def judge_again() -> None:
    """Other slots than before may be able to run jobs that wait."""
    global _judgement
    _judgement += 1


class QueueItem(tuple[Any, ...]):
    """A host queue item that knows when it came and where it may run.

    Order: the priority, the higher first; then its place, which is the host's number unless shares are fair; then
    arrival. `peer` and `party` are as in a `Run`.
    """

    arrival: int = -1
    target: int | None = None
    queued_at: float = 0.0
    priority: int = 0
    place: float | None = None  # in the queue, if it is not the host's number
    most_at_once: int | None = None  # of its client's jobs
    passed: int = 0  # how many jobs have overtaken it
    peer: str | None = None
    party: Any = None
    share: Share | None = None  # It is no job of a client's, but a share of one.
    attempts: int = 0  # how often it has begun to run
    request_key: str | None = None  # as `core.scope.RequestKey.text`
    is_kept: bool = False  # It is in the journal.
    kind: str | None = None  # of the slots that suit it
    is_bound_to_kind: bool = False  # It runs on no others, and beside other jobs.
    losses: int = 0  # how often a process ended while it ran this job
    not_on: frozenset[int] = frozenset()  # the slots that are not to take this share

    @property
    def prompt_id(self) -> Any:
        return self[1]

    @property
    def client_id(self) -> Any:
        return client_of(self)

    @property
    def is_alone(self) -> bool:
        """Whether it must be the only job that runs; asked once."""
        if self.is_bound_to_kind:
            return False
        known: bool | None = self.__dict__.get("_is_alone")
        if known is None:
            if _runs_alone is None:
                return False
            known = self.__dict__["_is_alone"] = runs_alone(self[2])
        return known

    @property
    def turns(self) -> frozenset[str]:
        """What no other job that runs may need as well; asked once."""
        if _turns_of is None:
            return _NO_TURNS
        known: frozenset[str] | None = self.__dict__.get("_turns")
        if known is None:
            known = self.__dict__["_turns"] = turns_of(self[2])
        return known

    def must_run_alone(self) -> None:
        """Have it be the only job that runs, whatever its workflow says."""
        self.is_bound_to_kind = False
        self.__dict__["_is_alone"] = True

    @property
    def barred(self) -> Mapping[int, str]:
        """The numbers of the slots that cannot run it, and why; looked up when that may have changed."""
        if _judge is None:
            return _NOWHERE
        known: tuple[int, Mapping[int, str]] | None = self.__dict__.get("_barred")
        if known is None or known[0] != _judgement:
            known = self.__dict__["_barred"] = _judgement, _judge(self)
        return known[1]

    @property
    def json(self) -> str:
        """The item as `GET /queue` shows it, encoded once: an item does not change while it waits."""
        text: str | None = self.__dict__.get("_json")
        if text is None:
            text = self.__dict__["_json"] = _encode(self[:SENSITIVE])
        return text

    def forget_json(self) -> None:
        """It was changed, so `json` is to be made anew."""
        self.__dict__.pop("_json", None)

    def deep_copy(self) -> QueueItem:
        """As `copy.deepcopy`, which is slow for what is no plain tuple."""
        try:
            copied = QueueItem(copied_json(tuple(self)))
        except RecursionError:  # A node's own item may refer to itself.
            copied = QueueItem(copy.deepcopy(tuple(self)))
        copied.__dict__.update(self.__dict__)
        copied.__dict__.pop("_json", None)
        return copied

    @property
    def models(self) -> frozenset[str]:
        """The names of the weight files that it reads, as its nodes name them; looked up once."""
        known: frozenset[str] | None = self.__dict__.get("_models")
        if known is None:
            known = self.__dict__["_models"] = model_names(self[2])
        return known

    @property
    def workload(self) -> Hashable:
        """Jobs of one take about as long on one slot; looked up once."""
        known: Hashable = self.__dict__.get("_workload")
        if known is None:
            known = self.__dict__["_workload"] = kind_of(self[2], self.models)
        return known

    @property
    def standing(self) -> tuple[int, bool]:
        """Jobs are overtaken only by jobs of the same one: its priority, and whether it was sent to the front."""
        return self.priority, self[0] < 0

    @property
    def order(self) -> tuple[Any, ...]:
        return -self.priority, self[0] if self.place is None else self.place, self.arrival

    def __lt__(self, other: Any) -> bool:
        return bool(self.order < order_of(other))

    def __gt__(self, other: Any) -> bool:
        return bool(self.order > order_of(other))


def order_of(item: Any) -> tuple[Any, ...]:
    """What items are compared by; a node pack's own is a plain tuple that begins with a number."""
    return item.order if type(item) is QueueItem else (0, item[0], -1)


def model_names(workflow: Any) -> frozenset[str]:
    """The names of weight files among the inputs of a workflow's nodes."""
    if not isinstance(workflow, dict):
        return frozenset()
    nodes = [node.get("inputs") for node in workflow.values() if isinstance(node, dict)]
    values = [value for inputs in nodes if isinstance(inputs, dict) for value in inputs.values()]
    return frozenset(value for value in values if type(value) is str and value.lower().endswith(WEIGHT_FILE))


class UnknownItem:
    """What a node pack queued in a shape of its own: any slot may take it, and it shows its job when it runs."""

    prompt_id = client_id = target = most_at_once = kind = None
    is_alone = is_bound_to_kind = False
    models = turns = _NO_TURNS
    barred: Mapping[int, str] = _NOWHERE
    standing = peer = party = place = share = None
    passed = 0
    not_on: frozenset[int] = frozenset()


_UNKNOWN = UnknownItem()
_PLAIN = frozenset((str, int, float, bool, type(None)))


def view_of(item: Any) -> Any:
    """What the schedule looks at of something that waits."""
    if type(item) is QueueItem:
        return item
    return as_queued(item) if is_item(item) else _UNKNOWN


def as_queued(item: Any) -> QueueItem:
    """What a node pack queued past `put`, with the slot that it names itself."""
    queued = QueueItem(item)
    try:
        target = named_target(item)
    except BadRequest:
        target = None
    queued.target = target if isinstance(target, int) else None
    queued.priority = priority_of(item)
    return queued


def priority_of(item: Any) -> int:
    """What an item's `extra_data` says, 0 when nothing that can be used."""
    priority = item[3].get("priority") if is_item(item) and isinstance(item[3], dict) else None
    return priority if type(priority) is int and abs(priority) <= MOST_PRIORITY else 0


def client_order_of(item: Any) -> str | None:
    """The order that an item asks for its client's jobs; None for the server's."""
    order = item[3].get("client_order") if is_item(item) and isinstance(item[3], dict) else None
    return order if order in CLIENT_ORDERS else None


def named_target(item: Any) -> int | str | None:
    """The slot that an item names itself.

    Raises:
        BadRequest: when that is not there.
    """
    return body_target(item[3], len(slots())) if is_item(item) and isinstance(item[3], dict) else None


def is_item(value: Any) -> bool:
    """Whether this has a host item's shape; node packs may append to it."""
    return isinstance(value, tuple) and len(value) >= SENSITIVE


def copied_json(value: Any) -> Any:
    """As `copy.deepcopy`, several times as fast for what comes from JSON.

    Raises:
        RecursionError: when it is nested too deeply.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        parts = list(value.items())  # at once: a job may be taken, and so changed, meanwhile
        if all(type(key) in _PLAIN for key, _ in parts):
            return {key: copied_json(part) for key, part in parts}
    if kind is list:
        return [copied_json(part) for part in value]
    if kind is tuple:
        return tuple([copied_json(part) for part in value])
    return copy.deepcopy(value)


class QuickStatus:
    """A job's status whose dict, which the host copies into the history, copies itself quickly."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)

    def _asdict(self) -> dict[str, Any]:
        return _QuickDict(self._status._asdict())


class _QuickDict(dict[str, Any]):
    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        copied: dict[str, Any] = copied_json(dict(self))
        return copied


def client_of(item: Any) -> Any:
    """The client that is told of a job; None for nobody."""
    return item[3].get("client_id") if isinstance(item[3], dict) else None


def _node_of(item: Any, node_id: str | None) -> dict[str, Any]:
    node = item[2].get(node_id) if isinstance(item[2], dict) else None
    return node if isinstance(node, dict) else {}


def error_text(error: BaseException) -> str:
    """What an error says, or its kind when it says nothing or cannot: a node may have made its class."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # noqa: BLE001 - its own code may raise anything, and the job ends all the same
        return f"{type(error).__name__}, which cannot be shown as text"


def error_event(item: Any, error: BaseException, node_id: str | None) -> dict[str, Any]:
    """How a job's failure is told. The host's clients expect strings: no known node is an empty one."""
    node = _node_of(item, node_id)
    return {
        "prompt_id": item[1],
        "node_id": node_id if node else "",
        "node_type": node.get("class_type", ""),
        "executed": [],
        "exception_message": f"The slot's worker ended while it ran this job: {error_text(error)}",
        "exception_type": type(error).__name__,
        "traceback": traceback.format_tb(error.__traceback__),
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": int(time.time() * 1000),
    }
