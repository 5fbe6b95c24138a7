"""Weights side by side on a device, as they lie in their file: a few copies take a thousand of them there.

To make a tensor and to copy it takes Python, torch and the driver some 20 us, and most of a model's tensors are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from comfy_parallel.weights.gpu.homes import Home
from comfy_parallel.weights.spans import Span

_LARGEST = 256 << 20  # bytes, but for a larger weight
_ALIGNMENT = 256  # bytes, the most by which torch and cuBLAS tell addresses apart when they choose a kernel


class Block:
    """Memory for weights of one dtype and one mode, in one region.

    Attributes:
        stretches: of the region's bytes, that are copied as they are.
        size: in bytes.
        layout: equal for blocks of the same bytes in the same places, if they are of the same region.
    """

    def __init__(self, sources: Sequence[Home]) -> None:
        """Of homes in the order of their addresses."""
        import torch

        tensor = sources[0].tensor
        self._dtype, self._is_inference = tensor.dtype, tensor.is_inference()
        self._shapes: list[Any] = []  # of the weights and of what lies between them
        self._numbers: list[int] = []  # of the weights among these
        self._starts: list[int] = []  # of the stretches in the block's bytes
        self.stretches: list[Span] = []
        self.size = 0
        first = last = 0  # where in the region a stretch begins and ends so far
        for home in sources:
            offset = home.place[1].offset
            follows = bool(self._starts) and 0 <= offset - last < _ALIGNMENT and (offset - first) % _ALIGNMENT == 0
            if not follows:
                self._end_stretch(first, last)
                first = offset
                self._leave_out(-self.size % _ALIGNMENT)
                self._starts.append(self.size)
            else:
                self._leave_out(offset - last)
            self._numbers.append(len(self._shapes))
            self._shapes.append(torch.empty(home.place[1].shape, dtype=self._dtype, device="meta"))
            self.size += home.size
            last = offset + home.size
        self._end_stretch(first, last)
        self.layout = (self.size, tuple(self._starts), tuple(self.stretches))

    def memory(self, device: Any) -> Any:
        import torch

        with torch.inference_mode(self._is_inference):
            return torch.empty(self.size // self._dtype.itemsize, dtype=self._dtype, device=device)

    def weights(self, memory: Any) -> list[Any]:
        """Those that lie in this block's memory, made by one call of torch."""
        import torch

        with torch.inference_mode(self._is_inference):
            parts = torch._C._nn.unflatten_dense_tensors(memory, self._shapes)
        return [parts[number] for number in self._numbers]

    def bytes_of(self, memory: Any) -> list[Any]:
        """Where the stretches go."""
        import torch

        with torch.inference_mode(self._is_inference):
            content = memory.view(torch.uint8)
            sizes = [span.shape[0] for span in self.stretches]
            return [content[start : start + size] for start, size in zip(self._starts, sizes, strict=True)]

    def _end_stretch(self, first: int, last: int) -> None:
        import torch

        if self._starts:
            self.stretches.append(Span.contiguous(first, torch.uint8, (last - first,)))

    def _leave_out(self, size: int) -> None:
        import torch

        if size:
            self._shapes.append(torch.empty(size // self._dtype.itemsize, dtype=self._dtype, device="meta"))
            self.size += size


def blocks(pairs: Iterable[tuple[Any, Home]]) -> Iterator[tuple[Block, Sequence[tuple[Any, Home]]]]:
    """Blocks for these parameters, with those that lie in each.

    Args:
        pairs: `(parameter, home)`, of homes that are not empty.
    """
    alike: dict[Any, list[tuple[Any, Home]]] = {}
    for pair in pairs:
        region, span = pair[1].place
        alike.setdefault((region, span.dtype, pair[1].tensor.is_inference()), []).append(pair)
    for group in alike.values():
        group.sort(key=lambda pair: pair[1].place[1].offset)
        sizes = _sums(pair[1].size for pair in group)
        for _, numbered in groupby(zip(sizes, group, strict=True), lambda entry: entry[0]):
            together = [pair for _, pair in numbered]
            yield Block([home for _, home in together]), together


def _sums(sizes: Iterable[int]) -> Iterator[int]:
    """For each, the number of its block."""
    number = total = 0
    for size in sizes:
        if total and total + size > _LARGEST:
            number, total = number + 1, 0
        total += size
        yield number


def is_in_one(weight: Any) -> bool:
    """Whether a weight on a device shares its memory with others, which tensors of special types never do."""
    import torch

    is_plain = type(weight.data) is torch.Tensor and weight.layout == torch.strided
    return is_plain and bool(weight.untyped_storage().nbytes() != weight.nbytes)
