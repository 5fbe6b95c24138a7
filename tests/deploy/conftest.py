"""Fixtures for the tests of what surrounds the package: scripts, nginx, systemd, diffs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from tests.host.pool import ServerPool
from tests.host.server import HostServer, clean_environment

Need = Callable[[str], str]

# What a developer may have set, and start_multi_gpu.sh would obey.
SETTINGS = ("COMFYUI_", "CUDA_VISIBLE_DEVICES", "OMP_", "MKL_", "OPENBLAS_")


@pytest.fixture(scope="session")
def need() -> Need:
    """The path of a program: without it, the test is skipped on a laptop and fails in CI."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None and os.environ.get("CI"):
            pytest.fail(f"{program} is not installed", pytrace=False)
        if path is None:
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture
def plain_env() -> dict[str, str]:
    """The environment of a user who has configured nothing."""
    return {name: value for name, value in clean_environment().items() if not name.startswith(SETTINGS)}


@pytest.fixture(scope="module")
def host(shared_server: ServerPool) -> HostServer:
    """A real ComfyUI with four slots, which other test files use as well."""
    return shared_server(slots="cpu,cpu,cpu,cpu")
