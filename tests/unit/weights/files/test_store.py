"""The store: one file, one copy of its bytes, and one conversion for all slots; and what goes when memory is short."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.weights.files.formats import read_entries
from comfy_parallel.weights.files.mapping import MappedFile
from comfy_parallel.weights.files.regions import ALIGNMENT, SharedMemory, is_shared, origin_of
from comfy_parallel.weights.files.store import Store, WeightFile
from comfy_parallel.weights.spans import Span
from tests.unit.weights.samples import GIB, bits, collect, is_mapped, numbers, read, run_python, write

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20


@pytest.fixture(params=["map", "copy"])
def store(request: pytest.FixtureRequest) -> Store:
    return Store(request.param, GIB)


@pytest.fixture
def copies() -> Store:
    """It has room for two of the files that `mebibyte` writes, and a bit."""
    return Store("copy", 2 * MIB + MIB // 2)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", a=numbers(50, 30), b=numbers(7, start=9))


def mebibyte(folder: Path, name: str) -> str:
    return write(folder / f"{name}.safetensors", a=torch.full((MIB // 4,), float(ord(name))))


def share(store: Store, tensor: Any, dtype: Any = None, slot_index: int = 0, *, must_align: bool = False) -> Any:
    return store.shared(tensor, dtype or tensor.dtype, slot_index, must_align=must_align)


def held(store: Store, path: str, slot_index: int = 0) -> Any:
    """A shared tensor of a file that has but one."""
    return share(store, read(store, path)["a"], slot_index=slot_index)


def content_of(store: Store, file: WeightFile) -> Any:
    with file.lock:
        return store.content(file)


def known(store: Store) -> list[str]:
    collect()
    return [Path(file.path).stem for file in store.files()]


def appends(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The types that tensors are converted to from now on."""
    made = []
    append = SharedMemory.append

    def counted(self: SharedMemory, source: Any, dtype: Any) -> Span:
        made.append(dtype)
        return append(self, source, dtype)

    monkeypatch.setattr(SharedMemory, "append", counted)
    return made


# One file, one copy.


def test_one_path_is_one_file(store: Store, path: str) -> None:
    file = store.find(path)
    assert store.find(path) is file
    assert content_of(store, file) is content_of(store, file)
    assert store.files() == [file]


def test_other_names_of_a_file_are_the_same_file(store: Store, path: str, tmp_path: Path) -> None:
    os.link(path, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(path)
    first = held(store, path, 0)
    for name in ("hard", "soft"):
        assert held(store, str(tmp_path / f"{name}.safetensors"), 1).data_ptr() == first.data_ptr()
    assert len(store.files()) == 1


def test_two_files_are_two(store: Store, tmp_path: Path) -> None:
    first, second = (store.find(mebibyte(tmp_path, name)) for name in "ab")
    assert first is not second
    assert store.files() == [first, second]


def test_a_path_without_a_file_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        store.find(str(tmp_path / "none.safetensors"))
    assert store.files() == []


@pytest.mark.parametrize(("mode", "kind"), [("map", MappedFile), ("copy", SharedMemory)])
def test_the_mode_says_whether_a_file_is_mapped_or_copied(path: str, mode: str, kind: type) -> None:
    store = Store(mode, GIB)
    region = content_of(store, store.find(path))
    assert type(region) is kind
    assert bits(region.tensor(Span.contiguous(0, torch.uint8, (region.size,)))) == Path(path).read_bytes()


def test_slots_that_load_at_once_get_one_copy(store: Store, path: str) -> None:
    barrier = threading.Barrier(4)

    def load(slot_index: int) -> Any:
        barrier.wait()
        return held(store, path, slot_index)

    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(load, range(4)))
    assert len({tensor.data_ptr() for tensor in tensors}) == 1
    assert store.find(path).slots == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"other bytes"])
def test_a_file_that_changes_while_it_is_loaded_is_an_error_that_names_it(
    store: Store, path: str, content: bytes
) -> None:
    file = store.find(path)
    Path(path).write_bytes(content + b"\0")
    with pytest.raises(OSError, match=f"{path} was overwritten while it was loaded"):
        content_of(store, file)
    assert file.content is None


def test_a_file_that_vanishes_while_it_is_loaded_is_an_error_that_names_it(store: Store, path: str) -> None:
    file = store.find(path)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        content_of(store, file)


# Sharing.


def test_a_tensor_of_no_file_is_not_shared(store: Store) -> None:
    assert share(store, numbers(3)) is None


def test_slots_share_a_tensor_that_is_as_in_the_file(store: Store, path: str) -> None:
    first, second = (share(store, read(store, path)["a"], slot_index=index) for index in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert is_shared(first)
    assert bits(first) == bits(numbers(50, 30))
    assert store.find(path).converted_bytes == 0


def test_a_tensor_that_was_written_is_not_shared(store: Store, path: str) -> None:
    views = read(store, path)
    views["a"][3, 3] = -1
    assert share(store, views["a"]) is None
    assert share(store, views["a"], torch.float16) is None


def test_a_tensor_with_a_written_neighbour_is_shared_when_it_has_the_files_numbers(store: Store, path: str) -> None:
    views = read(store, path)
    views["a"][0, 0] = -1
    assert bits(share(store, views["b"])) == bits(numbers(7, start=9))
    assert bits(share(store, views["a"][1:])) == bits(numbers(50, 30)[1:])


def test_what_is_shared_already_is_shared_again(store: Store, path: str) -> None:
    first = held(store, path)
    assert share(store, first, slot_index=1).data_ptr() == first.data_ptr()
    half = share(store, first, torch.float16)
    assert share(store, half, slot_index=1).data_ptr() == half.data_ptr()
    assert bits(share(store, half, torch.float32)) == bits(numbers(50, 30).half().float())


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_conversion_is_made_once(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    made = appends(monkeypatch)
    tensors = [share(store, read(store, path)["a"], dtype, slot_index) for slot_index in range(3)]
    assert made == [dtype]
    assert len({tensor.data_ptr() for tensor in tensors}) == 1
    assert bits(tensors[0]) == bits(numbers(50, 30).to(dtype))
    assert store.find(path).slots == [0, 1, 2]


def test_slots_that_ask_at_once_get_one_conversion(store: Store, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = appends(monkeypatch)
    views = read(store, path)
    barrier = threading.Barrier(4)

    def convert(slot_index: int) -> Any:
        barrier.wait()
        return [share(store, views[name], torch.float16, slot_index) for name in ("a", "b")]

    with ThreadPoolExecutor(4) as pool:
        pairs = list(pool.map(convert, range(4)))
    assert made == [torch.float16] * 2
    assert len({(a.data_ptr(), b.data_ptr()) for a, b in pairs}) == 1
    assert bits(pairs[0][0]) == bits(numbers(50, 30).half())


@pytest.mark.parametrize(
    "take", [lambda t: t.t(), lambda t: t[:, 3:9], lambda t: t[::7], lambda t: t[:, :1].expand(-1, 4)]
)
def test_what_is_not_contiguous_is_made_so_once(store: Store, path: str, take: Any) -> None:
    first, second = (share(store, take(read(store, path)["a"]), slot_index=index) for index in range(2))
    assert first.is_contiguous()
    assert first.data_ptr() == second.data_ptr()
    assert bits(first) == bits(take(numbers(50, 30)))


def test_a_piece_of_a_tensor_is_shared_in_place(store: Store, path: str) -> None:
    whole = held(store, path)
    piece = share(store, read(store, path)["a"][10:20])
    assert piece.data_ptr() == whole[10:].data_ptr()
    assert bits(piece) == bits(numbers(50, 30)[10:20])


@pytest.mark.parametrize("must_align", [True, False])
def test_what_the_cpu_computes_with_is_aligned(store: Store, path: str, must_align: bool) -> None:
    view = read(store, path)["a"]
    odd = view.reshape(-1)[1:]
    first, second = (share(store, odd, slot_index=index, must_align=must_align) for index in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert (first.data_ptr() % ALIGNMENT == 0) is must_align
    assert bits(first) == bits(numbers(50, 30).reshape(-1)[1:])


def test_numbers_between_two_addresses_of_their_type_are_copied(store: Store, tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    data = bits(numbers(3))
    (tmp_path / "a.sft").write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = store.find(str(tmp_path / "a.sft"))
    region = content_of(store, file)
    entry = read_entries(region.fd)["a"]
    assert entry.start % 4
    view = region.private_tensor(region.private_view(), Span.contiguous(entry.start, torch.float32, entry.shape))
    tensor = share(store, view)
    assert tensor.data_ptr() % 4 == 0
    assert bits(tensor) == data


def test_an_empty_tensor_is_shared_like_any_other(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "e.safetensors", a=torch.empty(0, 3), b=numbers(4))
    assert share(store, read(store, path)["a"]).shape == (0, 3)
    assert share(store, read(store, path)["a"], torch.float16).shape == (0, 3)


# What is told of a file.


def test_a_file_that_was_only_found_costs_nothing(store: Store, path: str) -> None:
    file = store.find(path)
    assert (file.mapped_bytes, file.copied_bytes, file.converted_bytes, file.slots) == (0, 0, 0, [])
    assert not file.is_used
    assert store.used_bytes == 0


def test_a_file_says_what_it_costs_and_who_uses_it(store: Store, path: str) -> None:
    size = Path(path).stat().st_size
    views = read(store, path)
    file = store.find(path)
    is_mapped = store.mode == "map"
    assert (file.mapped_bytes, file.copied_bytes) == ((size, 0) if is_mapped else (0, size))
    assert file.is_used
    assert file.slots == []
    tensors = [share(store, views["a"], slot_index=2), share(store, views["a"], torch.float16, 1)]
    assert file.slots == [1, 2]
    assert file.converted_bytes == 3000
    assert store.used_bytes == file.copied_bytes + 3000
    del tensors, views
    collect()
    assert file.slots == []
    assert not file.is_used


# What goes.


def test_the_least_recently_used_goes_first(copies: Store, tmp_path: Path) -> None:
    paths = {name: mebibyte(tmp_path, name) for name in "abc"}
    for name in "abac":
        read(copies, paths[name])
        collect()
    assert copies.used_bytes > copies.budget_bytes
    copies.keep_to_budget()
    assert known(copies) == ["a", "c"]
    assert MIB < copies.used_bytes <= copies.budget_bytes


def test_what_is_used_stays_whatever_the_budget_says(copies: Store, tmp_path: Path) -> None:
    paths = [mebibyte(tmp_path, name) for name in "abcd"]
    tensors = {name: held(copies, path) for name, path in zip("abcd", paths, strict=True)}
    copies.keep_to_budget()
    assert known(copies) == list("abcd")
    del tensors["b"]
    collect()
    copies.keep_to_budget()
    assert known(copies) == list("acd")
    assert [tensor[0].item() for tensor in tensors.values()] == [97, 99, 100]


def test_within_the_budget_nothing_goes(copies: Store, tmp_path: Path) -> None:
    for name in "ab":
        read(copies, mebibyte(tmp_path, name))
        collect()
    copies.keep_to_budget()
    assert known(copies) == ["a", "b"]


def test_a_load_makes_room_itself(copies: Store, tmp_path: Path) -> None:
    for name in "abcd":
        read(copies, mebibyte(tmp_path, name))
        collect()
    assert known(copies) == ["b", "c", "d"]


def test_conversions_count_and_go_with_their_last_user(tmp_path: Path) -> None:
    store = Store("map", MIB)
    path = mebibyte(tmp_path, "a")
    view = read(store, path)["a"]
    single, double = share(store, view), share(store, view, torch.float64)
    region = origin_of(double)
    assert region is not None
    stat = os.fstat(region.region.fd)
    assert store.used_bytes == 2 * MIB
    store.keep_to_budget()
    assert store.used_bytes == 2 * MIB
    assert is_mapped(stat)
    del double, region
    collect()
    store.keep_to_budget()
    collect()
    assert store.used_bytes == 0
    assert not is_mapped(stat)
    assert single[0].item() == 97
    assert share(store, view, torch.float64)[0].item() == 97


def test_a_mapping_goes_when_nobody_uses_it(tmp_path: Path) -> None:
    store = Store("map", GIB)
    kept, left = mebibyte(tmp_path, "a"), mebibyte(tmp_path, "b")
    tensor = held(store, kept)
    read(store, left)
    collect()
    store.keep_to_budget()
    assert known(store) == ["a"]
    assert left not in Path("/proc/self/maps").read_text()
    assert kept in Path("/proc/self/maps").read_text()
    assert tensor[0].item() == 97


def test_all_that_nobody_uses_can_be_given_back(store: Store, tmp_path: Path) -> None:
    paths = [mebibyte(tmp_path, name) for name in "abc"]
    tensor = held(store, paths[1])
    for path in (paths[0], paths[2]):
        share(store, read(store, path)["a"], torch.float16)
    collect()
    store.drop_unused()
    assert known(store) == ["b"]
    assert tensor[0].item() == 98
    del tensor
    collect()
    store.drop_unused()
    assert known(store) == []
    assert store.used_bytes == 0


def test_a_file_that_is_being_loaded_stays(store: Store, path: str) -> None:
    file = store.find(path)
    with file.lock:
        store.drop_unused()
        assert store.files() == [file]
    store.drop_unused()
    assert store.files() == []


def test_what_was_dropped_is_loaded_again(store: Store, path: str) -> None:
    read(store, path)
    collect()
    store.drop_unused()
    assert bits(held(store, path)) == bits(numbers(50, 30))


def test_files_are_shared_where_no_memory_may_be_locked(tmp_path: Path) -> None:
    """As in a container without RLIMIT_MEMLOCK. The CUDA driver locks by itself what is registered with it."""
    result = run_python(
        "import ctypes, os, resource\n"
        "import torch\n"
        "from comfy_parallel.weights.files.store import Store\n"
        "from tests.unit.weights.samples import model_of, numbers, read\n"
        "libc = ctypes.CDLL(None)\n"
        "header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, capabilities) == 0\n"
        "capabilities[0] &= ~(1 << 14)\n"  # CAP_IPC_LOCK: root may lock memory whatever the limit says
        "assert libc.capset(header, capabilities) == 0\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "page = torch.zeros(4096)\n"
        "print(libc.mlock(ctypes.c_void_p(page.data_ptr()), ctypes.c_size_t(page.nbytes)))\n"
        f"store, path = Store('map', 1 << 30), {write(tmp_path / 'a.safetensors', a=numbers(9, 9))!r}\n"
        "models = [model_of(store, read(store, path), slot) for slot in (0, 1)]\n"
        "print([torch.equal(model.pa, numbers(9, 9)) for model in models], store.find(path).slots)\n"
        "print(store.find(path).mapped_bytes == os.path.getsize(path))\n"
    )
    assert (result.returncode, result.stdout) == (0, "-1\n[True, True] [0, 1]\nTrue\n"), result.stderr
