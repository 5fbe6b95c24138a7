"""Fixtures that start a real ComfyUI."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.host.server import HostServer

MakeServer = Callable[..., HostServer]

#: For a test of what slots of one process share.
ABOUT_ONE_PROCESS = pytest.mark.skipif(
    os.environ.get("COMFY_PARALLEL_TEST_SLOTS") == "process", reason="slots in processes of their own share none of it"
)


@contextmanager
def server_factory(host_dir: Path, make_base_dir: Callable[[], Path], models: Path) -> Iterator[MakeServer]:
    """A function that starts hosts; all of them are stopped at the end."""
    with ExitStack() as started:

        def make(base_dir: Path | None = None, *, host_dir: Path = host_dir, **options: Any) -> HostServer:
            home = base_dir or make_base_dir()
            home.mkdir(parents=True, exist_ok=True)
            if not (home / "models").exists():
                (home / "models").symlink_to(models, target_is_directory=True)
            return started.enter_context(HostServer(host_dir, home, **options))

        yield make


@pytest.fixture
def make_server(host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeServer]:
    """`make_server(slots="cpu,cpu", env=…, args=…)` returns a started HostServer."""
    with server_factory(host_dir, lambda: tmp_path_factory.mktemp("host"), models_dir) as make:
        yield make


@pytest.fixture(scope="module")
def make_module_server(
    host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeServer]:
    """Like make_server, for a host that the tests of one module share."""
    with server_factory(host_dir, lambda: tmp_path_factory.mktemp("host"), models_dir) as make:
        yield make


@pytest.fixture
def with_default_signals() -> Iterator[None]:
    """A shell's background job ignores SIGINT, one of `nohup` SIGHUP, and so would what it starts."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
