"""One weight file's memories that this process takes from others of its group, and gives to them."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from comfy_parallel.weights.files.group import FileState, Found, Group, GroupLost, Link
from comfy_parallel.weights.files.regions import SharedMemory

logger = logging.getLogger(__name__)

Made = tuple[SharedMemory, Any]
Answer = TypeVar("Answer")


class Handed:
    """The memories of one file in one state. Its caller holds the file's lock.

    Without a group, or when its parent is gone, everything is made here.
    """

    def __init__(self, group: Group | None, state: FileState | None, file: Any) -> None:
        self.state = state
        self._group, self._file = group, file
        self._link = None if group is None or state is None else group.link()
        self._taken: dict[int, SharedMemory] = {}

    def made_once(self, key: object, make: Callable[[], Made], may_hand: Callable[[], bool] = lambda: True) -> Made:
        """A memory and what its maker says of it: another process's, else what `make()` makes, for others to take.

        Args:
            key: of what is made of the file; it has to mean the same in each process.
            may_hand: asked afterwards whether others may have it.
        """
        whole_key = repr((self.state, key))  # not pickled: that tells apart what is equal
        found = self._asked(lambda link: link.find(whole_key))
        if found is not None:
            return self._mapped(found), found.told
        try:
            memory, told = make()
            is_good = may_hand()
        except BaseException:
            self._asked(lambda link: link.give_up(whole_key))
            raise
        if is_good:
            self._give(whole_key, memory, told)
        else:
            self._asked(lambda link: link.give_up(whole_key))
        return memory, told

    def release(self, memory: SharedMemory) -> None:
        """Nothing of this process lies in it any more."""
        number = memory.number
        if number is not None:
            self._taken.pop(number, None)
            self._asked(lambda link: link.release(number))

    def close(self) -> None:
        """Release all of them."""
        self._taken.clear()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _give(self, key: str, memory: SharedMemory, told: Any) -> None:
        try:
            pickle.dumps(told)
        except Exception as error:  # noqa: BLE001 - pickle calls the code of whatever was in the file
            logger.info("comfy_parallel: %s is read by each process: it cannot be handed on: %s", self, error)
            self._asked(lambda link: link.give_up(key))
            return
        number = self._asked(lambda link: link.put(key, memory.number, memory.fd, memory.used, told))
        if number is not None:
            memory.number = number

    def _mapped(self, found: Found) -> SharedMemory:
        memory = self._taken.get(found.number)
        if memory is None:
            memory = self._taken[found.number] = SharedMemory(found.size, self._file, made_by_another=found.fd)
            memory.number = found.number
        else:
            os.close(found.fd)
        memory.used = found.used
        return memory

    def _asked(self, question: Callable[[Link], Answer]) -> Answer | None:
        if self._link is None or self._group is None:
            return None
        try:
            return question(self._link)
        except GroupLost as error:
            self._group.lose(error)
            self.close()
            return None

    def __str__(self) -> str:
        return str(getattr(self._file, "path", "a weight file"))
