"""Memory that tensors of several slots lie in: what they alias, what remembers it, and what gives it back."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.weights.files import regions
from comfy_parallel.weights.files.regions import ALIGNMENT, SharedMemory, is_shared, is_unwritten, origin_of, span_of
from comfy_parallel.weights.spans import Span
from tests.unit.weights.samples import bits, collect, is_mapped, numbers, run_python

pytestmark = pytest.mark.timeout(120)

PAGE = mmap.PAGESIZE
FLOATS_PER_PAGE = PAGE // 4


def memory_of(tensor: Any) -> tuple[SharedMemory, Span]:
    region = SharedMemory(max(1, tensor.nbytes), None)
    return region, region.append(tensor, tensor.dtype)


def shared(tensor: Any, slot_index: int | None = None) -> Any:
    region, span = memory_of(tensor)
    return region.tensor(span, slot_index)


def private(tensor: Any) -> Any:
    region, span = memory_of(tensor)
    return region.private_tensor(region.private_view(), span)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[1:3],
    "columns": lambda t: t[:, 2:5],
    "every second": lambda t: t[::2, 1::2],
    "a row": lambda t: t[2],
    "a column": lambda t: t[:, 3],
    "one column of two dimensions": lambda t: t[:, :1],
    "one of every second row": lambda t: t[::2][:1],
    "a number": lambda t: t[1, 1],
    "the last number": lambda t: t[-1, -1],
    "nothing": lambda t: t[:0],
    "no columns": lambda t: t[:, 3:3],
    "expanded": lambda t: t[:, :1].expand(-1, 4),
    "flat": lambda t: t.reshape(-1),
    "other shape": lambda t: t.view(3, 8),
    "with a dimension of one": lambda t: t.unsqueeze(1),
    "as integers": lambda t: t.view(torch.int32),
    "as bytes": lambda t: t[1:].view(torch.uint8),
}


# Pieces of memory.


@pytest.mark.parametrize("name", [name for name in VIEWS if name not in ("nothing", "no columns")])
def test_contiguous_means_what_it_means_to_torch(name: str) -> None:
    view = VIEWS[name](numbers(4, 6))
    assert Span(0, view.dtype, tuple(view.shape), tuple(view.stride())).is_contiguous is view.is_contiguous()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (4, 3, 2, 1)])
def test_a_contiguous_piece_has_the_strides_that_torch_gives(shape: tuple[int, ...]) -> None:
    span = Span.contiguous(0, torch.float32, shape)
    assert span.stride == torch.empty(shape).stride()
    assert span.is_contiguous


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_found_again_where_it_lies(name: str) -> None:
    whole = shared(numbers(4, 6))
    view = VIEWS[name](whole)
    origin = origin_of(view)
    assert origin is origin_of(whole) is not None
    again = origin.region.tensor(span_of(view, origin))
    assert again.data_ptr() == view.data_ptr()
    assert (again.shape, again.dtype) == (view.shape, view.dtype)
    assert bits(again) == bits(VIEWS[name](numbers(4, 6)))


def test_a_tensor_may_begin_at_any_byte() -> None:
    content = torch.arange(64, dtype=torch.uint8)
    region, _ = memory_of(content)
    tensor = region.tensor(Span.contiguous(3, torch.float32, (2, 2)))
    assert bits(tensor) == bytes(range(3, 19))
    assert bits(tensor * 1) == bytes(range(3, 19))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_a_tensor_may_be_empty(shape: tuple[int, ...]) -> None:
    tensor = shared(torch.empty(shape))
    assert tensor.shape == shape
    assert is_shared(tensor)
    assert is_unwritten(private(torch.empty(shape)))


def test_a_tensor_may_be_one_number() -> None:
    tensor = shared(torch.tensor(2.5, dtype=torch.bfloat16))
    assert (tensor.shape, tensor.item(), tensor.dtype) == ((), 2.5, torch.bfloat16)


# The memory that conversions go to.


def test_pieces_are_appended_aligned_and_converted() -> None:
    region = SharedMemory(1 << 20, None)
    sources = [numbers(3), numbers(5, 2).t(), torch.tensor(1.5), torch.empty(0), numbers(3000), numbers(7)]
    spans = [region.append(source, torch.float16) for source in sources]
    assert all(span.offset % ALIGNMENT == 0 for span in spans)
    for source, span in zip(sources, spans, strict=True):
        tensor = region.tensor(span)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert bits(tensor) == bits(source.to(torch.float16))
    assert region.used == spans[-1].offset + 14


def test_there_is_room_up_to_the_last_byte() -> None:
    region = SharedMemory(256, None)
    region.append(numbers(1), torch.float32)
    assert region.has_room(192)
    assert not region.has_room(193)
    region.append(numbers(48), torch.float32)
    assert region.used == 256
    assert not region.has_room(1)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    content = os.urandom(3 * PAGE + 17)
    (tmp_path / "a").write_bytes(content)
    region = SharedMemory(len(content), None)
    with (tmp_path / "a").open("rb") as file:
        region.read_file(file.fileno())
    assert bits(region.tensor(Span.contiguous(0, torch.uint8, (len(content),)))) == content
    assert region.used == len(content)


def test_a_file_that_is_cut_off_meanwhile_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with (tmp_path / "a").open("rb") as file, pytest.raises(OSError, match="at byte 5 of 9"):
        SharedMemory(9, None).read_file(file.fileno())


def test_pages_that_are_released_come_back_with_their_numbers() -> None:
    tensor = shared(numbers(8 * FLOATS_PER_PAGE))
    origin = origin_of(tensor)
    assert origin is not None
    before = bits(tensor)
    origin.region.release_pages(span_of(tensor[5:], origin))
    assert bits(tensor) == before


# Where tensors come from.

KEEPING: dict[str, Callable[[Any], Any]] = {
    **VIEWS,
    "detached": lambda t: t.detach(),
    "data": lambda t: t.data,
    "a parameter": lambda t: torch.nn.Parameter(t),
    "a parameter's data": lambda t: torch.nn.Parameter(t).data,
    "the same type": lambda t: t.to(torch.float32),
    "permuted": lambda t: t.permute(1, 0),
}


@pytest.mark.parametrize("name", KEEPING)
def test_views_remember_where_they_come_from(name: str) -> None:
    whole = shared(numbers(4, 6), 3)
    origin = origin_of(whole)
    view = KEEPING[name](whole)
    del whole
    collect()
    assert origin is not None
    assert origin_of(view) is origin
    assert is_shared(view)
    assert [user.slot_index for user in origin.region.users] == [3]


def test_a_parameter_whose_data_is_set_remembers_it() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    parameter.data = shared(numbers(4, 6))
    collect()
    assert is_shared(parameter)
    assert is_shared(parameter.data)


@pytest.mark.parametrize("copied", [torch.clone, torch.Tensor.double, copy.deepcopy, lambda t: t + 0, lambda t: t[[0]]])
def test_copies_come_from_nowhere(copied: Callable[[Any], Any]) -> None:
    assert origin_of(copied(shared(numbers(4, 6)))) is None


def test_only_what_must_not_be_written_counts_as_shared() -> None:
    assert is_shared(shared(numbers(3)))
    assert not is_shared(private(numbers(3)))
    assert not is_shared(numbers(3))
    assert not is_shared(torch.empty(3, device="meta"))


def test_the_last_tensor_takes_the_memory_along() -> None:
    tensor = shared(numbers(6 * FLOATS_PER_PAGE))
    origin = origin_of(tensor)
    assert origin is not None
    region = weakref.ref(origin.region)
    stat = os.fstat(origin.region.fd)
    fd = origin.region.fd
    view = tensor[3:]
    del tensor, origin
    collect()
    assert is_mapped(stat)
    del view
    collect()
    assert region() is None
    assert not is_mapped(stat)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# Writing.


def test_a_write_to_a_shared_tensor_ends_the_process() -> None:
    result = run_python(
        "import torch\n"
        "from comfy_parallel.weights.files.regions import SharedMemory\n"
        "memory = SharedMemory(4096, None)\n"
        "tensor = memory.tensor(memory.append(torch.ones(4), torch.float32))\n"
        "print(tensor.sum().item(), flush=True)\n"
        "tensor.add_(1)\n"
        "print('written')\n"
    )
    assert (result.returncode, result.stdout) == (-signal.SIGSEGV, "4.0\n")


def test_a_write_to_a_private_tensor_is_its_owners_own() -> None:
    region, span = memory_of(numbers(3 * FLOATS_PER_PAGE))
    first, second = (region.private_tensor(region.private_view(), span) for _ in range(2))
    before = bits(second)
    first.fill_(9)
    assert first.eq(9).all()
    assert bits(second) == bits(region.tensor(span)) == before


def test_a_write_is_noticed_on_its_page_and_nowhere_else() -> None:
    tensor = private(numbers(8 * FLOATS_PER_PAGE))
    assert tensor.data_ptr() % PAGE == 0
    pages = tensor.split(FLOATS_PER_PAGE)
    tensor.sum()
    assert is_unwritten(tensor)
    pages[3][5] = 1
    assert [is_unwritten(page) for page in pages] == [True] * 3 + [False] + [True] * 4
    assert not is_unwritten(tensor)
    assert not is_unwritten(pages[3][100:200])
    assert not is_unwritten(tensor[2 * FLOATS_PER_PAGE + 5 : 3 * FLOATS_PER_PAGE + 1])
    assert is_unwritten(tensor[2 * FLOATS_PER_PAGE + 5 : 3 * FLOATS_PER_PAGE])


def test_a_write_of_the_same_number_is_noticed() -> None:
    tensor = private(torch.zeros(10))
    tensor.zero_()
    assert not is_unwritten(tensor)


def test_a_write_between_the_rows_of_a_slice_is_noticed_on_a_shared_page() -> None:
    tensor = private(numbers(8, FLOATS_PER_PAGE))
    tensor[3] = 0
    assert is_unwritten(tensor[:3].t())
    assert not is_unwritten(tensor[2:5:2])


def test_pages_that_nobody_touched_are_unwritten() -> None:
    assert is_unwritten(private(numbers(8 * FLOATS_PER_PAGE)))


PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((0, 0), True),
        ((PRESENT | OF_FILE, PRESENT | OF_FILE), True),
        ((PRESENT | OF_FILE, 0), True),
        ((PRESENT | OF_FILE, PRESENT), False),
        ((SWAPPED, 0), False),
        ((0, SWAPPED | 5), False),
        ((SWAPPED | OF_FILE, 0), True),
    ],
)
def test_what_the_kernels_page_table_says_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: tuple[int, ...], expected: bool
) -> None:
    tensor = private(numbers(2 * FLOATS_PER_PAGE))
    with (tmp_path / "pagemap").open("wb") as file:
        file.seek(tensor.data_ptr() // PAGE * 8)
        file.write(struct.pack("<2Q", *entries))
    monkeypatch.setattr(regions, "_PAGEMAP", str(tmp_path / "pagemap"))
    assert is_unwritten(tensor) is expected


@pytest.mark.parametrize("content", [None, b""])
def test_without_a_page_table_nothing_counts_as_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    tensor = private(numbers(4))
    if content is not None:
        (tmp_path / "pagemap").write_bytes(content)
    monkeypatch.setattr(regions, "_PAGEMAP", str(tmp_path / "pagemap"))
    assert not is_unwritten(tensor)
