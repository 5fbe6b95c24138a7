"""Warms a slot's device at start: what CUDA and its libraries set up on first use is set up before the first job."""

from __future__ import annotations

import logging
import time

from comfy_parallel.slots.slot import Slot

logger = logging.getLogger(__name__)

_SIZE = 64

_is_on = False


def use(is_on: bool) -> None:
    """Have slots warmed up when their workers start."""
    global _is_on
    _is_on = is_on


def warm(slot: Slot) -> None:
    """On the slot's thread: its device's context and allocator, and the handles of cuBLAS and cuDNN.

    They belong to the thread, too. What cannot be warmed is said, and met again by the first job that needs it.
    """
    if not _is_on or ":" not in slot.device:
        return
    began = time.monotonic()
    try:
        _use_libraries(slot.device)
    except Exception as error:  # noqa: BLE001 - drivers and libraries raise what they like
        logger.warning("%s: it could not be warmed up: %s: %s", slot.name, type(error).__name__, error)
        return
    logger.info("%s: warmed up in %.2f s", slot.name, time.monotonic() - began)


def _use_libraries(device: str) -> None:
    import torch

    with torch.inference_mode():
        for dtype in (torch.float16, torch.float32):
            matrix = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
            (matrix @ matrix).sum()
            image = torch.ones(1, 4, _SIZE, _SIZE, device=device, dtype=dtype)
            kernel = torch.ones(4, 4, 3, 3, device=device, dtype=dtype)
            torch.nn.functional.conv2d(image, kernel, padding=1).sum().item()
