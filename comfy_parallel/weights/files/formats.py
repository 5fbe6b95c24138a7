"""Weight files: which bytes a path means at the moment, and where in a safetensors file its tensors are."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The bytes of a file at one time: two loads share memory when these are equal."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: str | Path | int) -> Identity:
        """Raises OSError."""
        stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a safetensors file; `start` and `end` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def is_safetensors(path: str) -> bool:
    return path.lower().endswith((".safetensors", ".sft"))


def read_entries(fd: int) -> dict[str, Entry]:
    """Where the tensors are. Format: https://github.com/huggingface/safetensors#format

    Raises:
        ValueError: when the file is no safetensors file, or is cut off.
    """
    size = os.fstat(fd).st_size
    header_size = struct.unpack("<Q", _read(fd, 8, 0))[0]
    if 8 + header_size > size:
        raise ValueError("its header is longer than the file")
    header: dict[str, Any] = json.loads(_read(fd, header_size, 8))
    base = 8 + header_size
    try:
        entries = {name: _entry(info, base) for name, info in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("its header is no table of tensors") from error
    if any(entry.end > size for entry in entries.values()):
        raise ValueError("it ends before its last tensor does")
    return entries


def _entry(info: dict[str, Any], base: int) -> Entry:
    start, end = info["data_offsets"]
    return Entry(_DTYPES.get(info["dtype"], ""), tuple(info["shape"]), base + start, base + end)


def _read(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise ValueError("it ends within its header")
    return data
