"""Values with tensors in them, as bytes: what participants in different processes give each other."""

from __future__ import annotations

import io
import pickle
from typing import Any

_PICKLED = 5  # the protocol


class Packed(bytes):
    """A value that nobody here has to look at."""


def packed(value: Any) -> Packed:
    """The value as bytes; one that came so stays as it is.

    Raises:
        Exception: whatever pickle raises for what cannot be sent.
    """
    if isinstance(value, Packed):
        return value
    written = io.BytesIO()
    _Pickler(written, _PICKLED).dump(value)
    return Packed(written.getbuffer())


def unpacked(value: Any) -> Any:
    """The value again; one that was never packed stays as it is."""
    return pickle.loads(value) if isinstance(value, Packed) else value


class _Pickler(pickle.Pickler):
    """Torch's own way writes a small archive for each tensor."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
            return NotImplemented
        plain = value.detach().to("cpu").contiguous()
        raw: Any = plain.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (str(plain.dtype).removeprefix("torch."), tuple(plain.shape), pickle.PickleBuffer(raw))


def _tensor(dtype: str, shape: tuple[int, ...], raw: Any) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if not len(raw):
        return torch.empty(shape, dtype=kind)
    raw = raw if isinstance(raw, bytearray) else bytearray(raw)
    return torch.frombuffer(raw, dtype=torch.uint8).view(kind).reshape(shape)
