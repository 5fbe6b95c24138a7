"""Whether steps can be recorded on a device at all, and what to do where they cannot."""

from __future__ import annotations


def why_not(device: str) -> str | None:
    """Why no step is recorded on this device, written as torch writes it, and what would help; None if steps are."""
    import torch

    kind = device.partition(":")[0]
    if kind != "cuda":
        return f"steps are recorded on NVIDIA GPUs only, and this slot computes on {kind}"
    if torch.version.hip is not None:
        return "steps are recorded on NVIDIA GPUs only, and this torch is made for AMD's"
    if not hasattr(torch.Generator, "graphsafe_get_state"):
        return f"torch {torch.__version__} is too old to record steps; install a newer one"
    if (backend := torch.cuda.get_allocator_backend()) != "native":
        return f"torch allocates memory by {backend}; start ComfyUI with --disable-cuda-malloc"
    return None
