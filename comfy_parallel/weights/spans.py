"""Tensors in mapped memory."""

from __future__ import annotations

import functools
import mmap
import warnings
from math import prod
from typing import Any, NamedTuple


class Span(NamedTuple):
    """A strided piece of a region: `offset` in bytes from its start."""

    offset: int
    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def contiguous(cls, offset: int, dtype: Any, shape: tuple[int, ...]) -> Span:
        return cls(offset, dtype, shape, tuple(prod(shape[index + 1 :]) for index in range(len(shape))))

    @classmethod
    def of(cls, tensor: Any, offset: int) -> Span:
        """What a tensor would take up that begins there."""
        return cls(offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """In bytes, from the first to the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return int((last + 1) * self.dtype.itemsize)


def tensor_in(memory: mmap.mmap, span: Span) -> Any:
    """A tensor of a mapping's memory; the mapping lives as long as the tensor."""
    import torch

    if not prod(span.shape):
        return torch.empty(span.shape, dtype=span.dtype)
    flat = _tensor_of_bytes(memory, span.offset, span.extent)
    return flat.view(span.dtype).as_strided(span.shape, span.stride)


def address_of(memory: mmap.mmap) -> int:
    """Of a mapping's first byte."""
    return int(_tensor_of_bytes(memory, 0, 1).data_ptr())


def _tensor_of_bytes(memory: mmap.mmap, offset: int, size: int) -> Any:
    import torch

    _accept_read_only_buffers()
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)


@functools.cache
def _accept_read_only_buffers() -> None:
    """torch warns of them, once; read-only is what we want."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
