"""The packs that our nodes are known from: beside one of them ours stay out, and that is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

_told: set[Path] = set()


def installed(
    name: str,
    pack_folders: Iterable[Path],
    file: str,
    *,
    instead_of: str,
    is_it: Callable[[Path], bool] = lambda folder: True,
) -> bool:
    """Whether the pack called `name`, known by a file of its folder, is installed. Folders are named at will.

    Args:
        instead_of: which of our nodes stay out, for the log.
        is_it: looks closer at a folder that has the file.
    """
    for folder in pack_folders:
        for path in sorted(folder.glob(f"*/{file}")):
            if not path.parent.name.endswith(".disabled") and is_it(path.parent):
                _tell_once(name, path.parent, instead_of)
                return True
    return False


def _tell_once(name: str, folder: Path, instead_of: str) -> None:
    if folder not in _told:
        _told.add(folder)
        logger.info("comfy_parallel: its %s stay out, because %s is installed (%s)", instead_of, name, folder)
