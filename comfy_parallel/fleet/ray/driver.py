"""A process of its own that speaks with Ray for the server: when a cluster is lost, Ray ends the process that uses it.

It makes an actor (`worker.Worker`) for each slot and tells the server where each can be reached. Ray places an actor
where a GPU is free, and starts it again, there or elsewhere, when it or its machine has ended.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from comfy_parallel.core import ray_address
from comfy_parallel.fleet import lifeline
from comfy_parallel.fleet.link import Link

logger = logging.getLogger(__name__)

FD = "COMFY_PARALLEL_RAY_LINK"
UNIT = "comfy_slot"  # the resource that a machine without GPUs declares for each slot that it is
SAYS = "comfy_parallel: "
_CONNECT_S = 10.0
_AGAIN_S = 1.0
_CALLS_AT_ONCE = 8


def main() -> None:
    """Serve the server at the other end of the link."""
    logging.basicConfig(level=logging.INFO, format=f"{SAYS}%(message)s")
    link = Link(int(os.environ.pop(FD)))
    lifeline.hold(os.environ)
    try:
        message = link.receive()
        if message is None:
            return
        problem = _serve(link, *message)
    except (EOFError, OSError):
        return  # The server is gone.
    link.send("failed", problem)


def _serve(link: Link, address: str, skips_own_node: bool) -> str:
    """Serve until the server is gone; what keeps it from that."""
    problem = _connect(address)
    if problem is not None:
        return problem
    import ray

    own_node = ray.get_runtime_context().get_node_id() if skips_own_node else None
    link.send("units", *_units(ray.nodes(), own_node))
    message = link.receive()
    if message is not None:
        _Actors(ray, link, own_node, *message).serve()
    return "the server said nothing"


def _connect(address: str) -> str | None:
    if address != ray_address.AUTO:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except OSError as error:
            return f"nothing answers at {address} ({error}); start a cluster there with `ray start --head`"
    try:
        import ray
    except ImportError as error:
        return f"Ray cannot be imported ({error}); install it where ComfyUI runs: pip install 'comfy-parallel[ray]'"
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # noqa: BLE001 - Ray raises what its parts raise
        text = str(error).strip().partition("\n")[0]
        return f"the cluster {address} cannot be used ({text}); is Ray started on this machine, with `ray start`?"
    return None


def _units(nodes: list[dict[str, Any]], own_node: str | None) -> tuple[int, int]:
    """The GPUs, and the slots that machines without any have declared."""
    used = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] != own_node]
    return tuple(sum(int(one.get(name, 0)) for one in used) for name in ("GPU", UNIT))  # type: ignore[return-value]


class _Actors:
    """The actors of all slots. `orders`: for each, whether it needs a GPU, and what its worker is made with."""

    def __init__(self, ray: Any, link: Link, own_node: str | None, orders: list[tuple[bool, dict[str, Any]]]) -> None:
        from comfy_parallel.fleet.ray import worker

        ray.cloudpickle.register_pickle_by_value(worker)
        self._ray, self._link, self._own_node, self._orders = ray, link, own_node, orders
        self._kind = ray.remote(worker.Worker)
        self._made: dict[int, Any] = {}
        self._calls: dict[str, Callable[..., Any]] = {"fetch": self._fetch, "bring": self._bring}
        self._threads = ThreadPoolExecutor(_CALLS_AT_ONCE)

    def serve(self) -> None:
        """Follow them, and do what the server asks, until it is gone."""
        for index in range(len(self._orders)):
            threading.Thread(target=self._follow, args=(index,), daemon=True, name=f"ray{index}").start()
        while (message := self._link.receive()) is not None:
            self._threads.submit(self._answer, *message)

    def _follow(self, index: int) -> None:
        actor_error, said = self._ray.exceptions.RayActorError, ""
        while True:
            try:
                actor = self._made.get(index) or self._make(index)
                self._link.send("at", index, *self._ray.get(actor.describe.remote()))
                self._ray.get(actor.watch.remote())
            except OSError:
                return  # The server is gone.
            except Exception as error:  # noqa: BLE001 - Ray raises what its parts raise
                if isinstance(error, self._ray.exceptions.ActorDiedError):
                    self._made.pop(index, None)
                reason = _reason(error)
                if not isinstance(error, actor_error) and reason != said:
                    logger.error("ray%d: %s", index, reason)
                said = reason
                self._link.send("gone", index, reason)
            time.sleep(_AGAIN_S)

    def _make(self, index: int) -> Any:
        needs_gpu, order = self._orders[index]
        options: dict[str, Any] = {"num_gpus": 1} if needs_gpu else {"resources": {UNIT: 1}}
        if self._own_node is not None:
            options["label_selector"] = {"ray.io/node-id": f"!{self._own_node}"}
        made = self._kind.options(
            num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=4 + _CALLS_AT_ONCE, **options
        ).remote(**order)
        self._made[index] = made
        return made

    def _answer(self, number: int, what: str, *args: Any) -> None:
        try:
            answer = self._calls[what](*args)
        except Exception as error:  # noqa: BLE001 - it is the answer
            self._link.send("answer", number, False, _reason(error))
        else:
            self._link.send("answer", number, True, answer)

    def _fetch(self, index: int, path: str) -> bytes:
        """A value of a slot's ComfyUI, through the object store."""
        return bytes(self._ray.get(self._made[index].fetch.remote(path)))

    def _bring(self, index: int, path: str, value: bytes) -> None:
        self._ray.get(self._made[index].bring.remote(path, self._ray.put(value)))


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main()
