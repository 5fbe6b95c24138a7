"""Weight files: which bytes a path means, and where in them the tensors are."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_parallel.weights.files import ram
from comfy_parallel.weights.files.formats import Identity, is_safetensors, read_entries
from tests.unit.weights.samples import bits, numbers, write

pytestmark = pytest.mark.timeout(120)


def entries_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return read_entries(file.fileno())


def bytes_with_header(header: bytes, data: bytes = b"", *, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


# What makes two files the same.


def test_two_looks_at_a_file_see_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    with path.open("rb") as file:
        assert Identity.of(path) == Identity.of(str(path)) == Identity.of(file.fileno())
    assert len({Identity.of(path), Identity.of(path)}) == 1


def test_a_renamed_file_and_a_link_are_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    before = Identity.of(path)
    renamed = path.rename(tmp_path / "b")
    (tmp_path / "soft").symlink_to(renamed)
    os.link(renamed, tmp_path / "hard")
    assert Identity.of(renamed) == Identity.of(tmp_path / "soft") == Identity.of(tmp_path / "hard") == before


def shorten(path: Path) -> None:
    path.write_bytes(b"wei")


def date(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(b"weights")
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize("change", [shorten, date, replace])
def test_other_bytes_are_another_file(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    before = Identity.of(path)
    change(path)
    assert Identity.of(path) != before


def test_a_copy_is_another_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"weights")
    assert Identity.of(tmp_path / "a") != Identity.of(tmp_path / "b")


def test_there_is_no_identity_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Identity.of(tmp_path / "none")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/models/a.safetensors", True),
        ("/models/A.SafeTensors", True),
        ("a.sft", True),
        ("a.ckpt", False),
        ("safetensors", False),
        ("a.safetensors.index.json", False),
    ],
)
def test_safetensors_files_are_known_by_name(path: str, expected: bool) -> None:
    assert is_safetensors(path) is expected


# Where the tensors are.

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_found_where_it_was_written(tmp_path: Path, dtype: Any) -> None:
    tensors = {
        "matrix": numbers(3, 5, dtype=dtype),
        "cube": numbers(2, 3, 4, dtype=dtype, start=7),
        "number": torch.tensor(1).to(dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content, entries = path.read_bytes(), entries_of(path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert f"torch.{entry.dtype}" == str(tensor.dtype)
        assert entry.shape == tuple(tensor.shape)
        assert content[entry.start : entry.end] == bits(tensor)


def test_a_file_may_hold_no_tensor(tmp_path: Path) -> None:
    assert entries_of(Path(write(tmp_path / "a.safetensors"))) == {}


def test_a_type_that_is_not_known_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(bytes_with_header(header, b"ab"))
    assert entries_of(path)["a"].dtype == ""


def test_the_place_of_reading_is_left_alone(tmp_path: Path) -> None:
    with open(write(tmp_path / "a.safetensors", a=numbers(4)), "rb", buffering=0) as file:
        file.seek(5)
        read_entries(file.fileno())
        assert file.tell() == 5


GOOD = bytes_with_header(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcd")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "ends within its header"),
        (GOOD[:7], "ends within its header"),
        (GOOD[:8], "header is longer than the file"),
        (GOOD[:20], "header is longer than the file"),
        (GOOD[:-1], "ends before its last tensor"),
        (GOOD[:-4], "ends before its last tensor"),
        (bytes_with_header(b"{}", size=3), "header is longer than the file"),
        (bytes_with_header(b"{}", size=(1 << 64) - 1), "header is longer than the file"),
        (b"\xff" * 100, "header is longer than the file"),
        (bytes_with_header(b"no JSON at all"), None),
        (bytes_with_header(b"\xff\xfe\xfd\x80"), None),
        (b"\0" * 100, None),
        (bytes_with_header(b'{"a":'), None),
    ],
)
def test_what_is_no_whole_file_is_refused(tmp_path: Path, content: bytes, complaint: str | None) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    assert entries_of(path)["a"].shape == (4,)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        entries_of(path)


# The budget.


def test_the_budget_is_what_was_asked_for() -> None:
    assert ram.budget_bytes(1) == 1 << 30
    assert ram.budget_bytes(0.5) == 1 << 29


RAM = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, RAM // 2), ("max\n", RAM // 2), ("1048576\n", 1 << 19), (f"{RAM * 4}\n", RAM // 2)],
)
def test_by_default_it_is_half_of_what_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, expected: int
) -> None:
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit)
    monkeypatch.setattr(ram, "_CGROUP_LIMIT", file)
    assert ram.budget_bytes(None) == expected
