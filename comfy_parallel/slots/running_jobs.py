"""What runs, as the host's queue shows it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from typing import Any

from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.slot import current_slot


class RunningJobs(MutableMapping[int, Any]):
    """What runs, as the host's queue shows it: by number. Inside a slot only what that slot runs, as on a server
    with one worker; a job that is set there is taken by that slot."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def _shown(self) -> dict[int, Any]:
        slot = current_slot()
        if slot is None:
            return self._dispatcher.running
        return self._dispatcher.running_of(self._dispatcher.desks[slot.index])

    def __getitem__(self, item_id: int) -> Any:
        with self._dispatcher.mutex:
            return self._shown()[item_id]

    def __setitem__(self, item_id: int, item: Any) -> None:
        slot = current_slot()
        with self._dispatcher.mutex:
            if slot is None:
                self._dispatcher.running[item_id] = item
            else:
                self._dispatcher.take(self._dispatcher.desks[slot.index], item_id, item)

    def __delitem__(self, item_id: int) -> None:
        with self._dispatcher.mutex:
            del self._dispatcher.running[item_id]

    def __iter__(self) -> Iterator[int]:
        with self._dispatcher.mutex:
            return iter(list(self._shown()))

    def __len__(self) -> int:
        with self._dispatcher.mutex:
            return len(self._shown())

    def values(self) -> ValuesView[Any]:
        """As they are now: the jobs go on while somebody reads."""
        with self._dispatcher.mutex:
            return dict(self._shown()).values()

    def items(self) -> ItemsView[int, Any]:
        """As `values`."""
        with self._dispatcher.mutex:
            return dict(self._shown()).items()
