"""A model's small weights side by side in pinned memory: one copy takes them all to a GPU.

Half of a model's weights are norms and biases. They are a thousandth of its bytes, but to make and to copy a tensor
takes as long for them as for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from comfy_parallel.weights.homes import Home

LARGEST = 64 << 10  # bytes; what they lie in on the GPU goes with the last of them
_ALIGNMENT = 512  # bytes, as torch's allocator gives every tensor; kernels may depend on it


class Pack:
    """Copies of these homes, which have one dtype and one mode (see `kind`)."""

    def __init__(self, sources: Sequence[Home]) -> None:
        import torch

        self.size = sum(home.size for home in sources)
        self._is_inference = sources[0].tensor.is_inference()
        with torch.inference_mode(self._is_inference):
            self._shapes = list(_with_gaps([home.tensor for home in sources]))
            length = sum(tensor.numel() for tensor in self._shapes)
            self.pinned = torch.empty(length, dtype=sources[0].tensor.dtype, pin_memory=True)
            torch._foreach_copy_(self._cut(self.pinned), [home.tensor for home in sources])

    def queue_copies(self, device: Any) -> list[Any]:
        """Copies on a device, in the same order. `pinned` is to be kept until they are complete."""
        import torch

        with torch.inference_mode(self._is_inference):
            return self._cut(self.pinned.to(device, non_blocking=True))

    def _cut(self, memory: Any) -> list[Any]:
        """With one call of torch."""
        import torch

        cut: list[Any] = list(torch._C._nn.unflatten_dense_tensors(memory, self._shapes))
        return cut[::2]


def kind(home: Home) -> tuple[str, bool] | None:
    """What the weights of a pack have in common; None for a weight that is in none."""
    if not 0 < home.size <= LARGEST:
        return None
    return str(home.tensor.dtype), home.tensor.is_inference()


def _with_gaps(tensors: Sequence[Any]) -> Iterator[Any]:
    """After each, one that ends where the next may begin."""
    for tensor in tensors:
        yield tensor
        yield tensor.new_empty(-tensor.nbytes % _ALIGNMENT // tensor.itemsize)
