"""What else a forward depends on: the code it runs and torch's switches, which all slots share."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from types import CodeType
from typing import Any

from comfy_parallel.graphs.code_watch import CodeWatch
from comfy_parallel.graphs.refusal import Uncapturable
from comfy_parallel.slots import own_names

_code = CodeWatch()


def surroundings() -> tuple[Hashable, ...]:
    """Equal to an earlier value if nothing has changed since."""
    return _code.version(), own_names.state(), _switches()


def watch_code_of(model: Any, ran: Iterable[CodeType]) -> None:
    """Include what a forward of this model has run: the classes of its modules, and functions with these codes."""
    _code.include({type(module) for module in model.modules()}, ran)


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

    cuda, modules = torch.backends.cuda, torch.nn.modules.module
    matmul, cudnn = cuda.matmul, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_function_stack(),
        (*modules._global_forward_pre_hooks.values(), *modules._global_forward_hooks.values()),
        (matmul.allow_tf32, matmul.allow_fp16_accumulation, cuda.preferred_blas_library()),
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    )
