"""Jobs of slots that hold weights whose bytes are lost: they fail, rather than compute with others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy_parallel.errors import WeightsLost
from comfy_parallel.slots import garbage
from comfy_parallel.slots.slot import current_slot

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.files.mapping import MappedFile

logger = logging.getLogger(__name__)

_lost: dict[int, str] = {}  # what to tell, by the slot's index


def note(region: MappedFile, error: OSError, free: Callable[[int], None]) -> None:
    """The bytes of a file could not be kept: no job of a slot that uses them ends well before the slot has let go.

    Args:
        free: has a slot, by its index, let go of all that it keeps.
    """
    path = getattr(region.file, "path", "a weight file")
    message = (
        f"{path} was overwritten while its models were in use, and there was no memory to keep its old bytes ({error})."
        " Submit the job again: it reads the file anew. To replace a model that is in use, write the new file beside it"
        " and rename it, which needs no memory."
    )
    logger.critical("comfy_parallel: %s", message)
    indices = {user.slot_index for user in region.users if user.slot_index is not None}
    _lost.update(dict.fromkeys(indices, message))
    for index in indices:
        free(index)


def raise_if_any() -> None:
    """Raise in a job of a slot that still holds such weights. Called in every layer, so cheap where nothing is lost.

    Raises:
        WeightsLost: with the file, and what to do.
    """
    if not _lost:
        return
    slot = current_slot()
    if slot is not None and not slot.is_recording and slot.index in _lost:
        raise WeightsLost(_lost[slot.index])


def let_go(index: int | None, files: list[Any]) -> None:
    """A slot has let go of what it kept: its jobs may run again, if it holds nothing that is lost."""
    if index not in _lost:
        return
    garbage.collect()
    regions = [region for file in files for region in file.regions() if region.is_lost]
    if not any(user.slot_index == index for region in regions for user in region.users):
        del _lost[index]
