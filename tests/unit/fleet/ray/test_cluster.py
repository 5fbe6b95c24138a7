"""What a server tells the ComfyUIs that Ray starts, and what it says of a cluster that it cannot use."""

from __future__ import annotations

import os

import pytest

from comfy_parallel.core.ray_address import RayAddress
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet.ray.cluster import Cluster, arguments_of_workers
from tests.ports import free_port


def test_workers_get_the_servers_arguments_without_those_of_its_machine() -> None:
    given = ["--port", "8188", "--cpu", "--output-directory", "/out", "--temp-directory=/tmp", "--base-directory", "/b"]
    given += ["--listen", "--fast", "--database-url", "sqlite:///x", "--cuda-device", "3"]
    assert arguments_of_workers(given, has_database=False) == ["--base-directory", "/b", "--fast"]
    assert arguments_of_workers([], has_database=True) == ["--database-url", "sqlite:///:memory:"]


def test_a_cluster_that_does_not_answer_keeps_the_server_from_starting() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"COMFY_PARALLEL_RAY={address}: nothing answers at {address}"):
        Cluster(RayAddress(address), "/comfyui", [], dict(os.environ), has_database=False, skips_own_node=False)
