"""Decides, per slot and per call of a model's forward, whether it runs eagerly, is recorded, or is replayed."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from comfy_parallel.graphs.collection import no_collection
from comfy_parallel.graphs.model_state import ModelSetup, ModelState
from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow, refusal_of, refusals_count
from comfy_parallel.graphs.signature import describe, have_same_bytes, repeatable, substitute
from comfy_parallel.graphs.surroundings import check_mode, surroundings, watch_code_of
from comfy_parallel.graphs.time_steps import looked_up, with_time_steps
from comfy_parallel.graphs.watch import watching

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 8  # per model and slot
MOST_LOSSES = 3  # of one kind's recordings, in one run of a sampler
Forward = Callable[..., Any]


class Replayable(Protocol):
    """What a recorder makes: a recorded function."""

    def replay(self, inputs: list[Any]) -> Any:
        """The recorded function's result for these tensors."""


class RecordsForwards(Protocol):
    """Makes recordings of functions of tensors."""

    @property
    def size_bytes(self) -> int:
        """Device memory that its recordings hold."""

    def record(self, forward: Callable[[list[Any]], Any], buffers: list[Any]) -> Replayable:
        """Raises `Uncapturable`."""

    def wait(self) -> None:
        """Return when no replay runs any more."""


@dataclass(slots=True)
class StepStats:
    """Counters since start; `eager` by reason."""

    captures: int = 0
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Watched:
    """What a forward went by in Python when it was recorded, watched: as long as this is so it does the same again."""

    setup: ModelSetup
    surroundings: Hashable

    def holds(self, surroundings: Hashable) -> bool:
        is_same = surroundings == self.surroundings
        return is_same and self.setup.is_on_the_same_devices() and self.setup.is_unchanged()


@dataclass(slots=True)
class _Known:
    """What is known of one key: that it came once, why it cannot be recorded, or its recording.

    A recording and a refusal hold as long as the model is in `state`; a refusal without one is for the moment.
    """

    is_seen: bool = False
    watched: _Watched | None = None
    refused: str | None = None
    recording: Replayable | None = None
    state: ModelState | None = None
    surroundings: Hashable = None
    epoch: int = 0
    losses: int = 0
    lost_in: tuple[int, int] = (0, 0)

    def note_loss(self, sampling: int, step: int) -> None:
        """A recording was lost, or one could not be made for the moment, or both, in this step of a sampler."""
        if self.lost_in != (sampling, step):
            self.losses = self.losses + 1 if self.lost_in[0] == sampling else 1
            self.lost_in = sampling, step

    def without_recording(self, *, is_seen: bool) -> _Known:
        """What stays known of a kind whose recording is given back; a step that is in the middle of it keeps this."""
        return _Known(is_seen, self.watched, losses=self.losses, lost_in=self.lost_in)


class Stepper:
    """Steps the models of one slot.

    The first call of a kind runs eagerly. The second runs eagerly and is recorded, watched: if nothing it did could
    make the recording stale, it is replayed, and the replay compared with what the eager call returned. From then on
    it is replayed, as long as every weight still lies where it lay. The model's set-up and the code it runs are
    looked at again after each suspicion. A recording that was lost for its memory or its weights' places only is made
    anew at the next call, and is not watched again. A call that cannot be recorded is tried again once the model has
    changed.

    Args:
        device: the slot's torch device.
    """

    def __init__(self, device: Any, recorder: RecordsForwards) -> None:
        self.stats = StepStats()
        self._device = device
        self._recorder = recorder
        self._known: WeakKeyDictionary[Any, OrderedDict[Hashable, _Known]] = WeakKeyDictionary()
        self._epoch = 0
        self._sampling = self._steps = 0
        self._given_back = 0
        self._lock = threading.Lock()  # A recording has one set of buffers; a node may have threads of its own.

    @property
    def size_bytes(self) -> int:
        """Device memory that recordings hold."""
        return self._recorder.size_bytes

    def step(self, forward: Forward, model: Any, arguments: dict[str, Any]) -> Any:
        """What `forward(model, **arguments)` returns."""
        call = with_time_steps(model, arguments, self._device)
        try:
            key, tensors = describe(call, self._device)
            check_mode()
        except Uncapturable as refusal:
            return self.eager(forward, model, arguments, str(refusal))
        if not self._lock.acquire(blocking=False):
            return self.eager(forward, model, arguments, "two at once")
        try:
            self._steps += 1
            known = self._find(model, key)
            if known.recording is not None and self._is_valid(known) and self._holds(known):
                result = self._replay(known, tensors)
                if result is not None:
                    return result
                known = self._find(model, key)
            reason = self._reason_to_wait(known)
            if reason is None:
                return self._capture(forward, model, arguments, call, tensors, known)
        finally:
            self._lock.release()
        return self.eager(forward, model, arguments, reason)

    def _replay(self, known: _Known, tensors: list[Any]) -> Any:
        """The recording's result; None if there is too little memory for it, and then no recordings any more."""
        import torch

        assert known.recording is not None
        assert known.state is not None
        try:
            result = known.recording.replay(tensors)
        except torch.OutOfMemoryError:
            logger.info("Too little memory on %s to replay a step: graphs are given back", self._device)
            self.forget()
            return None
        finally:
            known.state.release()
        self.stats.replays += 1
        return result

    def eager(self, forward: Forward, model: Any, arguments: dict[str, Any], reason: str) -> Any:
        """The same without a recording; counts the reason."""
        self.stats.eager[reason] += 1
        return self._run(forward, model, arguments)

    def forget(self, model: Any = None) -> None:
        """Give back the recordings of a model, which is unloaded, or of all, for lack of memory."""
        if self.size_bytes:
            self._recorder.wait()
        self._given_back += 1
        for one in [model] if model is not None else list(self._known):
            for key, known in list(self._known.get(one, OrderedDict()).items()):
                self._known[one][key] = known.without_recording(is_seen=known.is_seen and model is not None)

    def suspect(self) -> None:
        """Look at the models' set-up again before the next replay: something may have changed it."""
        self._epoch += 1

    def begin_sampling(self) -> None:
        """A run of a sampler begins. Code of node packs may have run since the last one."""
        self._sampling += 1
        self.suspect()

    def _find(self, model: Any, key: Hashable) -> _Known:
        of_model = self._known.setdefault(model, OrderedDict())
        if key not in of_model:
            of_model[key] = _Known()
            if len(of_model) > MOST_RECORDINGS:
                self._drop(of_model.popitem(last=False)[1])
        of_model.move_to_end(key)
        return of_model[key]

    def _is_valid(self, known: _Known) -> bool:
        if known.state is None:
            return False
        is_valid = known.state.has_same_weights()
        if is_valid and known.epoch != self._epoch:
            is_valid = known.surroundings == surroundings() and known.state.has_same_structure()
            known.epoch = self._epoch
        if not is_valid:
            self._drop(known)
        return is_valid

    def _holds(self, known: _Known) -> bool:
        """See that the weights stay where they were recorded."""
        if known.state is not None and known.state.hold():
            return True
        self._drop(known)
        return False

    def _drop(self, known: _Known) -> None:
        if known.recording is not None:
            self._recorder.wait()
        if known.state is not None:
            known.recording = known.state = known.refused = None
            known.note_loss(self._sampling, self._steps)

    def _reason_to_wait(self, known: _Known) -> str | None:
        """Why not to record this call."""
        if known.refused is not None and (known.epoch == self._epoch or self._is_valid(known)):
            return known.refused
        if known.losses >= MOST_LOSSES and known.lost_in[0] == self._sampling:
            return known.refused or "a model that keeps changing"
        if not known.is_seen:
            known.is_seen = True
            return "first of its kind"
        return None

    def _run(self, forward: Forward, model: Any, arguments: dict[str, Any]) -> Any:
        """Recordings are the first to go when there is too little memory."""
        import torch

        if not self.size_bytes:
            return forward(model, **arguments)
        again = repeatable(arguments)
        try:
            return forward(model, **arguments)
        except torch.OutOfMemoryError:
            logger.info("Too little memory on %s: graphs are given back", self._device)
        self.forget()
        return forward(model, **again)

    def _capture(
        self,
        forward: Forward,
        model: Any,
        arguments: dict[str, Any],
        call: dict[str, Any],
        tensors: list[Any],
        known: _Known,
    ) -> Any:
        """Run eagerly, and try to record that. `call` is what a recording is given."""
        call = repeatable(call)
        given_back = self._given_back
        result = self._run(forward, model, arguments)
        if self._given_back != given_back:
            self.stats.eager["too little memory to record it"] += 1
            return result
        try:
            known.epoch, known.surroundings = self._epoch, surroundings()
            known.state = ModelState(model, self._device)
            known.recording = self._record(forward, model, call, tensors, result, known)
            if surroundings() != known.surroundings:
                raise UncapturableNow("code that was replaced meanwhile")
            known.watched = _Watched(known.state.setup, known.surroundings)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the step ran well eagerly
            self._refuse(known, refusal_of(error), model)
        else:
            known.refused = None
            self.stats.captures += 1
        return result

    def _refuse(self, known: _Known, refusal: Uncapturable, model: Any) -> None:
        known.recording, known.refused = None, str(refusal)
        if isinstance(refusal, UncapturableNow):
            known.state = None
        if known.state is None:
            known.note_loss(self._sampling, self._steps)
        logger.info("%s runs eagerly: %s", type(model).__name__, refusal, exc_info=refusal.__cause__)
        self.stats.eager[str(refusal)] += 1

    def _record(
        self,
        forward: Forward,
        model: Any,
        call: dict[str, Any],
        tensors: list[Any],
        expected: Any,
        known: _Known,
    ) -> Replayable:
        import torch

        assert known.state is not None
        buffers = [tensor.to(self._device, copy=True) for tensor in tensors]
        if [buffer.stride() for buffer in buffers] != [tensor.stride() for tensor in tensors]:
            raise Uncapturable("a tensor whose parts overlap or have gaps")

        def recorded(inputs: list[Any]) -> Any:
            arguments = substitute(call, inputs)
            with looked_up(model, arguments), self._watching(model, known, inputs):
                return forward(model, **arguments)

        with known.state.recording():
            recording = self._recorder.record(recorded, buffers)
            if type(expected) is not torch.Tensor or not have_same_bytes(recording.replay(tensors), expected):
                raise Uncapturable("a replay that differs from the eager step")
        return recording

    @contextmanager
    def _watching(self, model: Any, known: _Known, inputs: list[Any]) -> Iterator[None]:
        """Watch the body, unless it was seen before to do nothing that a recording cannot hold."""
        assert known.state is not None
        if known.watched is not None and known.watched.holds(known.surroundings):
            with no_collection(), refusals_count():
                yield
            return
        with watching(self._device, [*inputs, *known.state.tensors()]) as codes:
            yield
        watch_code_of(model, codes)
