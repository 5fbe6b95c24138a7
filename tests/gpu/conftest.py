"""GPU tests skip without the GPUs that they need, and fail where COMFY_PARALLEL_REQUIRE_GPU says they are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.host.models import cached_shapes
from tests.host.server import HostServer, without_front_end

MakeGpuServer = Callable[..., HostServer]
MakeGpuServers = Callable[[Sequence[dict[str, Any]]], list[HostServer]]


@pytest.fixture(scope="session")
def one_gpu() -> Any:
    """The first GPU, as a torch device."""
    import torch

    _need(1)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def num_gpus() -> int:
    """How many there are, for tests that need two."""
    return _need(2)


def _need(number: int) -> int:
    import torch

    count = torch.cuda.device_count()
    if count < number:
        give_up = pytest.fail if os.environ.get("COMFY_PARALLEL_REQUIRE_GPU") else pytest.skip
        give_up(f"{count} GPU(s) visible, {number} or more needed")
    return count


@pytest.fixture(scope="session")
def gpu_models(one_gpu: Any, host_dir: Path, cache_dir: Path) -> Path:
    return cached_shapes(host_dir, cache_dir)


@pytest.fixture(scope="module")
def make_gpu_server(
    one_gpu: Any, host_dir: Path, gpu_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeGpuServer]:
    """Starts hosts on the GPUs; `slots=None` is stock, `slots=""` all visible GPUs."""
    no_front_end = without_front_end(tmp_path_factory.mktemp("front_end"))

    with ExitStack() as started:

        def make(**options: Any) -> HostServer:
            base = tmp_path_factory.mktemp("host")
            (base / "models").symlink_to(gpu_models, target_is_directory=True)
            args = [*no_front_end, *options.pop("args", [])]
            return started.enter_context(HostServer(host_dir, base, is_cpu=False, args=args, **options))

        yield make


@pytest.fixture(scope="module")
def make_gpu_servers(make_gpu_server: MakeGpuServer) -> MakeGpuServers:
    """Starts several at once, each with options of its own."""

    def make(several: Sequence[dict[str, Any]]) -> list[HostServer]:
        with ThreadPoolExecutor(len(several)) as pool:
            return list(pool.map(lambda options: make_gpu_server(**options), several))

    return make
