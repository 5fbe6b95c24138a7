"""Patches on torch, numpy and the standard library: random numbers, caches and threads per slot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from comfy_parallel.http import bodies, log
from comfy_parallel.isolation import random_state, threads
from comfy_parallel.isolation.packs import loader, writes
from comfy_parallel.isolation.slot_globals import ModuleProperty
from comfy_parallel.patching.engine import Addition, Fit, Patch, Undo, replace
from comfy_parallel.slots import device, gates

_RANDOM_WHY = "Jobs that seed or draw from a process-wide generator would get each other's numbers."
_RANDOM_UNTIL = "the host and its nodes pass generators"

_FACTORIES = ("randn", "rand", "randint", "randperm")
_FROM_TENSORS = ("normal", "bernoulli", "multinomial", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")
_IN_PLACE = (
    "normal_",
    "uniform_",
    "random_",
    "exponential_",
    "bernoulli_",
    "cauchy_",
    "log_normal_",
    "geometric_",
)
_METHODS = ("bernoulli", "multinomial")


def _fill_normal(tensor: Any) -> Any:
    return tensor.normal_()


def _fill_uniform(tensor: Any) -> Any:
    return tensor.uniform_()


def _fill_integers(tensor: Any, *bounds: int) -> Any:
    return tensor.random_(*bounds) if len(bounds) == 2 else tensor.random_(0, *bounds)


_LIKE = {"randn_like": _fill_normal, "rand_like": _fill_uniform, "randint_like": _fill_integers}


@dataclass(frozen=True, kw_only=True)
class FunctionsPatch(Patch):
    """Replace every function that `find(module)` names; `target` names one of them."""

    find: Callable[[ModuleType], dict[str, Callable[..., Any]]]
    wrap: Callable[[Any], Any] = field(default=lambda original: original, repr=False)

    def check_live(self, module: ModuleType) -> Fit:
        return Fit.FITS if self.path[0] in self.find(module) else self.absent()

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        for name, new in self.find(module).items():
            yield replace(module, name, new)


def _random(target: str, wrap: Callable[[Any], Any], *, optional: bool = False, hazards: tuple[int, ...]) -> Patch:
    return Patch(target=target, wrap=wrap, optional=optional, hazards=hazards, why=_RANDOM_WHY, until=_RANDOM_UNTIL)


PATCHES: tuple[Patch, ...] = (
    *(_random(f"torch:{name}", random_state.factory, hazards=(45, 46)) for name in _FACTORIES),
    *(_random(f"torch:{name}", random_state.from_tensors, hazards=(46,)) for name in _FROM_TENSORS),
    *(_random(f"torch:{name}", random_state.like(fill), hazards=(46,)) for name, fill in _LIKE.items()),
    *(_random(f"torch:Tensor.{name}", random_state.from_tensors, hazards=(46,)) for name in (*_IN_PLACE, *_METHODS)),
    _random("torch.random:default_generator", random_state.DefaultGenerator, hazards=(45,)),
    _random("torch.random:fork_rng", random_state.fork_own_device, hazards=(47,)),
    *(
        ModuleProperty(
            target=f"torch.{kind}:default_generators",
            wrap=functools.partial(lambda kind, _initial: random_state.default_generators(kind), kind),
            optional=kind != "cuda",
            why="Seeding would reach the devices of all slots, and a device's generator all of its slots.",
            until=_RANDOM_UNTIL,
            hazards=(47,),
        )
        for kind in ("cuda", "xpu")
    ),
    FunctionsPatch(
        target="numpy.random:rand",
        find=random_state.numpy_functions,
        why=_RANDOM_WHY,
        until=_RANDOM_UNTIL,
        hazards=(48,),
    ),
    FunctionsPatch(
        target="random:random", find=random_state.python_functions, why=_RANDOM_WHY, until=_RANDOM_UNTIL, hazards=(48,)
    ),
    Patch(
        target="torch.cuda:empty_cache",
        wrap=device.empty_own_cache,
        why="Emptying the cache of every device stalls and slows the other slots.",
        until="torch can empty one device's cache",
        hazards=(34,),
    ),
    Patch(
        target="torch.cuda:synchronize",
        wrap=gates.wait_for_recording,
        params=("device",),
        why="CUDA refuses to wait for a device on which another slot records a forward, and spoils the recording.",
        until="CUDA can",
    ),
    Patch(
        target="comfy_aimdo.model_vbar:vbars_reset_watermark_limits",
        wrap=device.reset_own_watermarks,
        needs=("lib", "control.get_devctx"),
        spare=True,
        why="The end of a node on one slot walks the other devices' memory, without a lock.",
        until="comfy_aimdo resets one device",
        hazards=(39,),
    ),
    Patch(
        target="importlib.machinery:SourceFileLoader.exec_module",
        wrap=loader.load_per_slot,
        params=("self", "module"),
        why="What node packs keep for the whole process, and change in the host while a job runs, reaches other jobs.",
        until="packs keep what belongs to a job with the job",
        hazards=(51, 56, 58),
    ),
    *(
        Addition(
            target=target,
            wrap=functools.partial(lambda write, _none: write, write),
            why="What `mock.patch` and `redirect_stdout` put in place for a job of a node pack would reach other jobs.",
            until="packs pass what their jobs need",
            hazards=(56,),
        )
        for target, write in (
            ("contextlib:setattr", writes.set_attribute),
            ("unittest.mock:setattr", writes.set_attribute),
            ("unittest.mock:delattr", writes.delete_attribute),
        )
    ),
    Patch(
        target="threading:Thread.start",
        wrap=threads.start_in_slot,
        params=("self",),
        why="A thread that a node starts would compute on the first device and in no slot.",
        until="threads inherit context variables and the current device",
        hazards=(26, 57),
    ),
    Patch(
        target="concurrent.futures:ThreadPoolExecutor.submit",
        wrap=threads.submit_in_slot,
        params=("self", "fn"),
        why="A pool's thread would compute on the first device and in no slot.",
        until="pools run tasks in the submitter's context",
        hazards=(26, 57),
    ),
    Patch(
        target="aiohttp.http_parser:DeflateBuffer.feed_eof",
        wrap=bodies.refusing_early_ends,
        params=("self",),
        optional=True,
        why="A compressed request body that was cut off would be stored or acted on as if it were whole.",
        until="aiohttp notices where a gzip stream ends",
    ),
    *(
        Patch(
            target=f"logging:{name}",
            wrap=log.cut_in_requests,
            params=params,
            why="The host logs names and ids as clients send them, which may be as long as a body.",
            until="the host checks how long they are",
        )
        for name, params in (("LogRecord.getMessage", ("self",)), ("Formatter.formatException", ("self", "ei")))
    ),
)
