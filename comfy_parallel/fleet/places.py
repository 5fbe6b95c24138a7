"""All slots, of whatever kind: in this process, in one of their own, on another machine."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comfy_parallel.config import Config
from comfy_parallel.core import ray_address, remotes
from comfy_parallel.core.remotes import Remote
from comfy_parallel.fleet import local_workers, processes
from comfy_parallel.fleet.gpu_config_file import named_file
from comfy_parallel.host import facts
from comfy_parallel.slots import device, pool
from comfy_parallel.slots.slot import slots

if TYPE_CHECKING:  # A server without remote slots does without their modules.
    from comfy_parallel.fleet.ray.cluster import Cluster
    from comfy_parallel.fleet.remote.hosts import Hosts

logger = logging.getLogger(__name__)


def make(
    config: Config, server: Any, host_device: str, *, env: Mapping[str, str], visible: str | None, is_worker: bool
) -> Callable[[], None]:
    """Make them; returns what starts those that do not live in this process.

    Args:
        host_device: the type that the host computes on.
        env, visible: as for `processes.make`.
        is_worker: this process is a slot's, and has no others.

    Raises:
        ConfigError, DeviceError: when what was asked for is not there.
    """
    cluster = None if is_worker else _cluster(config, env, host_device)
    hosts = None if is_worker else _hosts(config, () if cluster is None else cluster.remotes)
    places = [] if hosts is None else [place for _, _, place in hosts.places]
    devices = device.choose_devices(config, host_device, len(places))
    kinds = config.slot_kinds(len(devices))
    pool.start_slots(server.prompt_queue, devices, kinds, places)
    processes.make(config, server, kinds, env=env, visible=visible)
    if hosts is not None:
        requeues = config.worker_lost == "requeue"
        remote = slots()[len(devices) :]
        hosts.serve(server.prompt_queue, remote, requeues=requeues, sends_keys=config.remote_keys)
    names = [*processes.named(devices, kinds), *places]
    logger.info("comfy_parallel: %d slots: %s", len(names), ", ".join(names))
    device.warn_if_unequal(devices)

    def start() -> None:
        processes.start()
        if hosts is not None:
            hosts.start()
        if hosts is not None and cluster is not None:
            cluster.follow(hosts.of_later)

    return start


def _cluster(config: Config, env: Mapping[str, str], host_device: str) -> Cluster | None:
    where = ray_address.parse(config.ray)
    if where is None:
        return None
    from comfy_parallel.fleet.ray.cluster import Cluster

    has_database = facts.has_argument("database_url")
    cluster = Cluster(
        where,
        str(facts.directory()),
        local_workers.own_arguments(),
        env,
        has_database=has_database,
        skips_own_node=host_device != "cpu",
    )
    atexit.register(cluster.stop)
    return cluster


def _hosts(config: Config, of_ray: Sequence[Remote] = ()) -> Hosts | None:
    named = remotes.parse(config.remote, config.remote_token)
    file = named_file(config.gpu_config, facts.gpu_config_file())
    workers = () if file is None else remotes.of_workers(file.read(), config.remote_token)
    addresses = {remote.url for remote in named}
    named += tuple(remote for remote in workers if remote.url not in addresses)
    named += tuple(of_ray)
    if not named:
        return None
    from comfy_parallel.fleet.remote.hosts import Hosts

    return Hosts(named)
