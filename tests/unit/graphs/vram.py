"""Stand-ins for a host with dynamic VRAM: pages with serial numbers, pins and eviction, without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

PAGE = 64  # bytes
META = torch.device("meta")  # where weights lie that are not on the device


class Range:
    """A range of pages; `num_there` of them at most have memory at once.

    As with comfy_aimdo, to fault more than that takes away what is there.
    """

    device = 0
    newest: Range

    def __init__(self, num_there: int = 100) -> None:
        Range.newest = self
        self.base_addr = 1 << 20
        self.offset = 0
        self.num_there = num_there
        self.serials: dict[int, int] = {}
        self.there: set[int] = set()
        self.pins: dict[int, int] = {}
        self.faults = 0

    def alloc(self, num_bytes: int) -> tuple[Range, int, int]:
        place = (self, self.base_addr + self.offset, num_bytes)
        self.offset += num_bytes
        return place

    def fault(self, address: int, size: int) -> Any:
        self.faults += 1
        pages = self._pages(address, size)
        if any(page >= self.num_there for page in pages):
            if len(pages) > 1:
                self.evict(*self.there)
            return None
        for page in pages:
            if page not in self.there:
                self.there.add(page)
                self.serials[page] = self.serials.get(page, 0) + 1
            self.pins[page] = self.pins.get(page, 0) + 1
        return (ctypes.c_uint32 * (size // PAGE + 2))(*(self.serials[page] for page in pages))

    def unpin(self, address: int, size: int) -> None:
        for page in self._pages(address, size):
            self.pins[page] -= 1
            assert self.pins[page] >= 0, "unpinned more often than pinned"

    def loaded_size(self) -> int:
        return len(self.there) * PAGE

    @property
    def free_bytes(self) -> int:
        """Of the GPU, if this range alone is on it."""
        return (self.num_there - len(self.there)) * PAGE

    def evict(self, *pages: int) -> None:
        self.there -= {page for page in pages if not self.pins.get(page)}

    @property
    def num_pins(self) -> int:
        return sum(self.pins.values())

    def _pages(self, address: int, size: int) -> range:
        first = (address - self.base_addr) // PAGE
        return range(first, -(-(address - self.base_addr + size) // PAGE))


class PagedLinear(torch.nn.Module):
    """A layer whose weights are copied into its place when it is used and they are not there."""

    def __init__(self, pages: Range, number: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(4, 4, device=META), requires_grad=False)
        self.bias = None
        self.number = number
        self.comfy_cast_weights = True
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []
        self._v = pages.alloc(64)
        self._v_signature: Any = None
        self.fills = 0

    def forward(self, x: Any) -> Any:
        pages, address, size = self._v
        signature = pages.fault(address, size)
        if signature is None:
            return x @ torch.full((4, 4), self.number)
        if self._v_signature is None or bytes(signature) != bytes(self._v_signature):
            self._fill(signature)
        try:
            return x @ self._v_weight
        finally:
            pages.unpin(address, size)

    def _fill(self, signature: Any) -> None:
        self.fills += 1
        if "_v_weight" not in vars(self):
            self._v_weight = torch.empty(4, 4)
        self._v_weight.fill_(self.number)  # the same memory each time, as in a page
        self._v_weight = self._v_weight.view(4, 4)
        self._v_bias = None
        self._v_signature = signature


class PagedModel(torch.nn.Module):
    """Some layers in pages, one that is not always used, and one small one that lies on the device."""

    def __init__(self, num_there: int = 100) -> None:
        super().__init__()
        self.pages = Range(num_there)
        self.layers = torch.nn.ModuleList(PagedLinear(self.pages, number) for number in (1.0, 2.0, 3.0))
        self.extra = PagedLinear(self.pages)
        self.norm = torch.nn.LayerNorm(4)
        self.patches: str | None = None

    def apply(self, x: Any, uses_extra: bool = False, **_options: Any) -> Any:  # type: ignore[override]
        for layer in self.layers:
            x = self.norm(layer(x))
        return self.extra(x) if uses_extra else x

    def patch(self, name: str | None, number: float) -> None:
        """As a load after another LoRA: pages and serial numbers stay, places are filled anew at the next use."""
        self.patches = name
        for layer in self.layers:
            layer.number = number
            layer._v_signature = None
