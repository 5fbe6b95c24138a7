"""The host's list of loaded models, partitioned per slot: no slot sees, unloads or renumbers another's models."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, MutableSequence
from typing import Any, overload

from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot, slots

_partition: SlotLocal[list[Any]] = SlotLocal(list)
_mutex = threading.RLock()  # for moments: no slot loads or unloads under it


class LoadedModels(MutableSequence[Any]):
    """Stands for `comfy.model_management.current_loaded_models`.

    Inside a slot it is the slot's own list. Outside it reads as all slots' lists one after another, and
    what is removed is removed from the list that holds it.
    """

    def __init__(self, initial: Iterable[Any] = ()) -> None:
        _partition.get().extend(initial)

    def _seen(self) -> list[Any]:
        if current_slot() is not None:
            return _partition.get()
        return [model for owner in (*slots(), None) for model in list(_partition.of(owner))]

    def _owner(self, index: Any) -> tuple[list[Any], Any]:
        if current_slot() is not None:
            return _partition.get(), index
        position = range(len(self._seen()))[index]
        for owner in (*slots(), None):
            models = _partition.of(owner)
            if position < len(models):
                return models, position
            position -= len(models)
        raise IndexError(index)

    def __len__(self) -> int:
        return len(self._seen())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._seen())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._seen()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice) and current_slot() is None:
            raise TypeError("outside of a slot, a range of loaded models has no one list to be assigned to")
        with _mutex:
            models, position = self._owner(index)
            models[position] = value

    def __delitem__(self, index: Any) -> None:
        if isinstance(index, slice) and current_slot() is None:
            for one in sorted(range(len(self))[index], reverse=True):
                del self[one]
            return
        with _mutex:
            models, position = self._owner(index)
            del models[position]

    def insert(self, index: int, value: Any) -> None:
        with _mutex:
            _partition.get().insert(index, value)

    def copy(self) -> list[Any]:
        return list(self._seen())

    def __eq__(self, other: object) -> bool:
        return list(self._seen()) == list(other) if isinstance(other, Iterable) else NotImplemented

    def __repr__(self) -> str:
        return repr(self._seen())


def models_of(slot: Slot) -> list[dict[str, Any]]:
    """Name and bytes on the device of each model a slot holds."""
    patchers = [getattr(loaded, "model", None) for loaded in list(_partition.of(slot))]
    return [
        {"name": type(patcher.model).__name__, "loaded_bytes": patcher.loaded_size()}
        for patcher in patchers
        if patcher is not None and patcher.model is not None
    ]


def hand_over(model: Any, slot: Slot) -> None:
    """Let `slot` have what other slots have loaded of a model.

    In their lists something stands in for it until they clean up: they may be walking them.
    """
    with _mutex:
        for owner in (*slots(), None):
            models = _partition.of(owner) if owner is not slot else []
            for position, loaded in enumerate(models):
                if getattr(getattr(loaded, "model", None), "model", None) is model:
                    models[position] = _HandedOver(loaded.device)
                    _partition.of(slot).append(loaded)


class _NoPatcher:
    """What stands for the patcher of a model that is not there."""

    model = parent = None

    def is_dynamic(self) -> bool:
        return False

    def loaded_size(self) -> int:
        return 0


class _HandedOver:
    """An entry of a slot's list whose model another slot has by now: nothing of it is loaded, it takes no memory."""

    currently_used = False

    def __init__(self, device: Any) -> None:
        self.device = device
        self.model = _NoPatcher()

    def real_model(self) -> None:
        """The model is gone, so the entry goes when its list is cleaned."""

    def is_dead(self) -> bool:
        return False

    def model_unload(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    def model_memory(self) -> int:
        return 0

    model_loaded_memory = model_offloaded_memory = model_memory


def drop_dead() -> None:
    """Take the models that no longer exist out of the calling slot's list.

    Their finalizers run on whichever thread collects them; each slot cleans its own list, so that no
    other thread shortens a list while it is being walked.
    """
    with _mutex:
        models = _partition.get()
        models[:] = [loaded for loaded in models if loaded.real_model is None or loaded.real_model() is not None]
