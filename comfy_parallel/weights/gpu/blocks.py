"""Weights side by side on a GPU, as they lie in their file, so that a few copies take a thousand of them there.

To make a tensor and to copy it takes Python, torch and the driver some 20 us, and most of a model's tensors are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from comfy_parallel.weights.gpu.homes import Home
from comfy_parallel.weights.spans import Span

_LARGEST = 256 << 20  # bytes, but for a larger weight
_ALIGNMENT = 256  # bytes, the most by which torch and cuBLAS tell addresses apart when they choose a kernel
_COLUMNS = 4096  # of a seal


class Block:
    """A place on a device for weights of one dtype and one mode, of one region.

    Attributes:
        parameters, homes: of the weights, in the order of their addresses in the region.
        region: where they come from.
        stretches: of the region's bytes, that are copied as they are.
        size: in bytes, with what lies between the weights.
        content_size: in bytes, of the weights alone.
        layout: equal for blocks of the same bytes in the same places, if they are of the same region.
    """

    def __init__(self, pairs: Sequence[tuple[Any, Home]]) -> None:
        self.parameters = [parameter for parameter, _ in pairs]
        self.homes = [home for _, home in pairs]
        self.region = self.homes[0].place[0]
        self.size = 0
        self.stretches: list[Span] = []
        self._templates: list[Any] = []  # tensors of the shapes of the weights and of what lies between them
        self._numbers: list[int] = []  # of the weights among these
        self._starts: list[int] = []  # of the stretches in the block's bytes
        first = last = 0  # where in the region a stretch begins and ends so far
        for home in self.homes:
            offset = home.place[1].offset
            gap = offset - last
            if not (self._starts and 0 <= gap < _ALIGNMENT and (offset - first) % _ALIGNMENT == 0):
                self._end_stretch(first, last)
                first, gap = offset, -self.size % _ALIGNMENT
                self._starts.append(self.size + gap)
            self._leave_out(gap)
            self._numbers.append(len(self._templates))
            self._templates.append(home.tensor)
            self.size += home.size
            last = offset + home.size
        self._end_stretch(first, last)
        self.content_size = sum(home.size for home in self.homes)
        self.layout = (self.size, tuple(self._starts), tuple(self.stretches))

    def memory(self, device: Any) -> Any:
        """New memory for the block: a flat tensor of its dtype."""
        import torch

        tensor = self.homes[0].tensor
        with torch.inference_mode(tensor.is_inference()):
            return torch.empty(self.size // tensor.dtype.itemsize, dtype=tensor.dtype, device=device)

    def weights(self, memory: Any) -> list[Any]:
        """The weights in such memory, in order; made by one call of torch."""
        import torch

        with torch.inference_mode(memory.is_inference()):
            parts = torch._C._nn.unflatten_dense_tensors(memory, self._templates)
        return [parts[number] for number in self._numbers]

    def bytes_of(self, memory: Any) -> list[Any]:
        """Where in such memory the stretches go."""
        content = bytes_of(memory)
        sizes = [span.shape[0] for span in self.stretches]
        return [content[start : start + size] for start, size in zip(self._starts, sizes, strict=True)]

    def _end_stretch(self, first: int, last: int) -> None:
        import torch

        if self._starts:
            self.stretches.append(Span.contiguous(first, torch.uint8, (last - first,)))

    def _leave_out(self, size: int) -> None:
        import torch

        if size:
            dtype = self.homes[0].tensor.dtype
            self._templates.append(torch.empty(size // dtype.itemsize, dtype=dtype, device="meta"))
            self.size += size


def blocks(pairs: Iterable[tuple[Any, Home]]) -> Iterator[Block]:
    """Blocks for these parameters.

    Args:
        pairs: `(parameter, home)`, of homes that are not empty.
    """
    alike: dict[Any, list[tuple[Any, Home]]] = {}
    for pair in pairs:
        region, span = pair[1].place
        alike.setdefault((region, span.dtype, pair[1].tensor.is_inference()), []).append(pair)
    for group in alike.values():
        group.sort(key=lambda pair: pair[1].place[1].offset)
        yield from map(Block, _cut(group))


def _cut(group: Sequence[tuple[Any, Home]]) -> Iterator[list[tuple[Any, Home]]]:
    together: list[tuple[Any, Home]] = []
    total = 0
    for pair in group:
        if together and total + pair[1].size > _LARGEST:
            yield together
            together, total = [], 0
        together.append(pair)
        total += pair[1].size
    yield together


def bytes_of(tensor: Any) -> Any:
    """A contiguous tensor's bytes, as a flat tensor."""
    import torch

    with torch.inference_mode(tensor.is_inference()):
        return tensor.view(-1).view(torch.uint8)


def memory_of(tensor: Any) -> Any:
    """All bytes of the memory that a tensor lies in, as a flat tensor."""
    import torch

    with torch.inference_mode():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def is_in_one(weight: Any) -> bool:
    """Whether a weight on a device shares its memory with others, which tensors of special types never do."""
    import torch

    is_plain = type(weight.data) is torch.Tensor and weight.layout == torch.strided
    return is_plain and bool(weight.untyped_storage().nbytes() != weight.nbytes)


def seal(memory: Any) -> Any:
    """What tells a block's bytes from any that a program writes there: their sums by row and by column.

    torch counts writes, but not those to `.data`, to tensors made in inference mode (as nearly all of the host's), and
    those of kernels that are not torch's. To read a block on its GPU takes a fiftieth of the time to copy it there.

    Args:
        memory: a flat tensor.
    """
    import torch

    with torch.inference_mode():
        content = bytes_of(memory)
        numbers = content[: len(content) // 8 * 8].view(torch.int64)
        whole = len(numbers) // _COLUMNS * _COLUMNS
        table = numbers[:whole].view(-1, _COLUMNS)
        return torch.cat([table.sum(1), table.sum(0), numbers[whole:], content[8 * len(numbers) :].long()])
