"""Errors after which a GPU is lost are told from those of one call."""

from __future__ import annotations

import pytest

from comfy_parallel.core.device_errors import Fate, fate_of

HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered" + HINT,
        "CUDA error: an illegal memory access was encountered" + HINT,
        "CUDA error: misaligned address",
        "CUDA error: unspecified launch failure",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA driver error: device-side assert triggered",
        "HIP error: an illegal memory access was encountered",
        "sampling failed: CUDA error: context is destroyed",
        "CUDA error: GPU is lost",
    ],
)
def test_sticky(text: str) -> None:
    assert fate_of(text) is Fate.LOST


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: unknown error",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: invalid argument",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    ],
)
def test_to_be_tried(text: str) -> None:
    assert fate_of(text) is Fate.ASK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory" + HINT,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "no such file: 'misaligned address.png'",
        "a prompt about a device-side assert triggered by a gpu",
        "Torch not compiled with CUDA enabled",
    ],
)
def test_says_nothing_of_the_device(text: str) -> None:
    assert fate_of(text) is Fate.USABLE
