"""What else a forward depends on: the code it runs and torch's switches, which all slots share."""

from __future__ import annotations

from collections.abc import Hashable

from comfy_parallel.graphs.code import CodeWatch
from comfy_parallel.graphs.refusal import Uncapturable

_code = CodeWatch()


def surroundings() -> Hashable:
    """Equal to an earlier value if nothing has changed since."""
    return _code.version(), _switches()


def check_mode() -> None:
    """Of the calling thread.

    Raises:
        Uncapturable: in a mode that recordings do not serve.
    """
    import torch

    if torch.is_grad_enabled():
        raise Uncapturable("gradients are computed")
    if torch.is_autocast_enabled("cuda"):
        raise Uncapturable("autocast is on")


def _switches() -> Hashable:
    import torch

    cuda = torch.backends.cuda
    matmul, cudnn = cuda.matmul, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        (matmul.allow_tf32, matmul.allow_fp16_accumulation, cuda.preferred_blas_library()),
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    )
