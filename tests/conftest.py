"""Fixtures for every kind of test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

REPO_DIR = Path(__file__).resolve().parents[1]
# `from tests.host.server import HostServer` and `import comfy_parallel` work from any directory.
if str(REPO_DIR) not in sys.path:
    sys.path.insert(0, str(REPO_DIR))

from tests import costs, order  # noqa: E402 - needs the path above
from tests.host.models import cached_models  # noqa: E402
from tests.host.pool import ServerPool, server_pool  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `--no-loadscope-reorder` has pytest-xdist keep that."""
    items.sort(key=lambda item: -order.seconds(item.path))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.user_properties += costs.take_starts()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    kinds = ("passed", "failed", "error", "skipped", "")  # the last holds set-ups and tear-downs
    reports = [one for kind in kinds for one in terminalreporter.stats.get(kind, ()) if hasattr(one, "duration")]
    if any(report.when == "teardown" for report in reports):
        terminalreporter.section("test files by what they take", sep="=")
        for line in costs.table(reports):
            terminalreporter.write_line(line)


def missing(what: str) -> NoReturn:
    """Skip on a laptop, fail where the run claims to have everything."""
    if os.environ.get("CI") or os.environ.get("COMFY_PARALLEL_REQUIRE_HOST"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    default = Path.home() / ".cache" / "comfy_parallel"
    return Path(os.environ.get("COMFY_PARALLEL_CACHE", default)).resolve()


@pytest.fixture(scope="session")
def host_dir() -> Path:
    """An unmodified ComfyUI checkout."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        missing("COMFYUI_PATH is not set; set it to a ComfyUI checkout, or run: source tests/setup.sh")
    if not (Path(path) / "main.py").is_file():
        missing(f"COMFYUI_PATH={path} holds no main.py; set it to a ComfyUI checkout")
    return Path(path).resolve()


@pytest.fixture(scope="session", autouse=True)
def _own_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Made now: two threads of a test that ask for the first folder in it would both make it, and one would fail."""
    tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def models_dir(host_dir: Path, cache_dir: Path) -> Path:
    """checkpoints/a.safetensors, checkpoints/b.safetensors and loras/lora.safetensors."""
    return cached_models(host_dir, cache_dir)


@pytest.fixture(scope="session")
def shared_server(host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """`shared_server(slots="cpu,cpu", env=…, args=…)`: a host that other test files use as well."""
    with server_pool(host_dir, lambda: tmp_path_factory.mktemp("host"), models_dir) as pool:
        yield pool
