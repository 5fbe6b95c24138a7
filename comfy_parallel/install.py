"""Installing the scheduler into the host's process, and making the slots when its server exists."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from comfy_parallel.config import Config, misspelt
from comfy_parallel.core import limits
from comfy_parallel.errors import ComfyParallelError, ConfigError, HostMismatch, JournalError
from comfy_parallel.fleet import choosing, places, worker_side
from comfy_parallel.graphs import per_slot
from comfy_parallel.host import access, allocator, dynamic_vram, facts, secrets
from comfy_parallel.isolation import process_state
from comfy_parallel.isolation.packs import judging, loader, streams
from comfy_parallel.journal.journal import Journal, Kept
from comfy_parallel.nodes import registry
from comfy_parallel.nodes.parallel import registry as parallel_registry
from comfy_parallel.patching.patch_set import PatchSet
from comfy_parallel.patching.sources import Checkout
from comfy_parallel.patching.unknown import Search
from comfy_parallel.slots import (
    alone,
    items,
    leaving,
    own_attributes,
    own_names,
    pool,
    stalls,
    watching,
    worker,
)
from comfy_parallel.slots.recovery import Recovery
from comfy_parallel.slots.slot import set_slots, slots, tell_slots_in_all
from comfy_parallel.weights import loading, sharing

logger = logging.getLogger(__name__)

_DEVICE_NODES = "device nodes"  # The features of the patches that our nodes need.
_FAN_OUT = "one workflow over all slots"

_WEB_DIRECTORY = Path(__file__).resolve().parent / "ui" / "sidebar"

_config = Config()
_env: dict[str, str] = {}  # what this process was started with, for those that it starts
_worker: worker_side.WorkerSide | None = None  # the link to the front, in the process of one slot
_patches: PatchSet | None = None
_put_back: list[Callable[[], object]] = []  # the host's choices that we changed
_search: Search | None = None
_kept: Kept | None = None  # what the journal tells of before the restart, until the node packs are loaded
_start_others: Callable[[], None] | None = None  # starts the slots that do not live in this process
_take_away: Callable[[], None] | None = None  # takes what we added to the host's web application


def install(env: MutableMapping[str, str] = os.environ) -> bool:
    """Make this ComfyUI process run one job per slot; call it before torch is imported.

    Does nothing unless `COMFY_MULTI_GPU_SCHED=1`. Returns whether the scheduler is on. A configuration
    that cannot be used ends the process; a host that cannot be patched starts as it is, with a warning
    (with `COMFY_PARALLEL_STRICT=1` it does not start).
    """
    global _config, _worker
    _worker = worker_side.take(env) or _worker
    try:
        _config = Config.from_env(env)
    except ConfigError as error:
        _exit(error)
    for sentence in misspelt(env):
        logger.warning("comfy_parallel: %s", sentence)
    if not _config.enabled or _patches is not None:
        return _patches is not None
    _env.update(env)
    if _config.exit_on_failed:
        leaving.prepare()
    try:
        _put_on()
    except ConfigError as error:
        _exit(error)
    except Exception as error:  # noqa: BLE001 - what we did not foresee of a host must not keep it from starting
        uninstall()
        _give_up(error if isinstance(error, HostMismatch) else HostMismatch(f"{error!r} while it was installed"))
    return _patches is not None


def _put_on() -> None:
    """Check the host, then have each of its modules patched when it is imported."""
    global _patches, _search
    from comfy_parallel import patches

    host_dir = facts.directory()
    off = _switched_off()
    chosen = patches.without(off) if _worker is None else patches.of_worker(off)
    patch_set = PatchSet(chosen, _give_up, _leave_out)
    problems = patch_set.check(Checkout(host_dir))
    if problems:
        raise HostMismatch("; ".join(str(problem) for problem in problems))
    _patches = patch_set
    _search = Search(host_dir, is_awaited=_config.strict)
    pool.when_server_is_made(_complete_server, _take_over)
    loader.use(_config.packs)
    limits.set_max_nodes(_config.max_nodes or limits.DEFAULT_MAX_NODES)
    patch_set.install()
    if _patches is not None:  # Not None unless a module that was there already did not fit.
        if "graphs" in patch_set.features():
            per_slot.switch(True)
            _put_back.append(allocator.prefer_native(os.environ))
        elif not _config.graphs:
            per_slot.switch(False)
        if _config.shares_gpus:
            _put_back.append(dynamic_vram.turn_off())


def _switched_off() -> set[str]:
    """The features that the user or the machine does without."""
    off = set() if _config.graphs else {"graphs"}
    if _config.weights == "off":
        off.add("weights")
    elif sys.platform != "linux":
        logger.info("comfy_parallel: every slot keeps its own copy of its weights: sharing them needs Linux")
        off.add("weights")
    return off


def uninstall() -> None:
    """Take every patch back. Only sensible while no job runs."""
    global _patches
    if _patches is not None:
        judging.let_go()
        items.when_to_bar(None)
        own_names.revert()
        own_attributes.revert()
        streams.revert()
        watching.stop()
        _patches.revert()
        _patches = None
        _give_choices_back()
        set_slots(())
        loading.use(None)
    _end_search()


def own_nodes() -> dict[str, type]:
    """Our nodes, some of them made of the loaders that the host has loaded so far; none while we are off."""
    if _patches is None:
        return {}
    features, known, folders = _patches.features(), facts.node_classes(), facts.pack_folders()
    made: dict[str, type] = {}
    if _DEVICE_NODES in features:
        made.update(registry.nodes(known, facts.device_type(), folders))
    if _FAN_OUT in features:
        made.update(parallel_registry.nodes(known, folders, facts.raise_if_interrupted))
    return made


def web_directory() -> str | None:
    """The folder whose script ComfyUI's page loads; None while we are off."""
    return None if _patches is None else str(_WEB_DIRECTORY)


def _complete_server(server: Any) -> None:
    """Add slots, middlewares and routes to the host's server, which has built its queue.

    Ends the process with the reason when a device is missing or cannot be initialised.
    """
    from comfy_parallel.http import middleware, peers, preload, webhooks
    from comfy_parallel.isolation.loaded_models import models_of

    global _take_away, _start_others
    front = server.prompt_queue
    if _worker is not None:
        facts.set_temp_directory(_worker.temp)
        tell_slots_in_all(_worker.num_slots)
    try:
        _check_complete()
        _tell_unknown_globals()
        if _patches is not None:
            _patches.in_use()
        if _config.shares_gpus:
            dynamic_vram.check_off()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        is_worker = _worker is not None
        kind = facts.device_type()
        _start_others = places.make(_config, server, kind, env=_env, visible=visible, is_worker=is_worker)
    except ComfyParallelError as error:
        _exit(error)
    _open_journal(server, front)
    _share_weights(front)
    own_names.tell_node_by(lambda: server.last_node_id)
    watch = process_state.job_watch(server.loop.call_soon_threadsafe)
    front.job_begins, front.job_ends = watch.begin, watch.end
    watching.watch(front, server.loop, _config, None if _worker is None else _worker.leave)
    front.default_slot, front.policy = _config.default_slot, _config.policy
    front.ledger.most_attempts = _config.attempts
    peers.use(_config.trusted_proxies, _config.policy.fair_by)
    webhooks.send(server, front, _config.webhooks)
    per_slot.tell()
    for sentence in access.of_host():
        logger.warning("comfy_parallel: WARNING: %s", sentence)
    server.prompt_queues = front.slot_queues
    _take_away = middleware.setup(
        server, front, models_of, allows_origins=facts.allows_origins(), secret=worker_side.secret()
    )
    preload.submit_at_start(server, front, _config.preload)


def _take_over(server: Any) -> None:
    """Have the host's worker run for every slot.

    A queue that a node pack has put in the place of ours, and that has nothing of the host's, was written for one
    worker: it gets one. Patches that packs have patched since cannot be taken back, so that worker is a slot's.
    """
    front, queue = server.prompt_queues[0].front, server.prompt_queue
    if not front.is_behind(queue):
        kind = type(queue)
        source = getattr(sys.modules.get(kind.__module__), "__file__", "no file")
        found = f"PromptServer.instance.prompt_queue was replaced by a {kind.__module__}.{kind.__qualname__} ({source})"
        _stay_off(HostMismatch(f"{found}, which is no subclass of the host's PromptQueue and holds none"))
        if _take_away is not None:
            _take_away()
        set_slots(slots()[:1])
        del front.slot_queues[1:]
        front.ledger.close()
    if _start_others is not None:
        _start_others()
    facts.add_nodes(own_nodes())  # Of packs that were loaded after ours.
    modes, serial, classes, folders = _config.packs, _config.serial_nodes, facts.node_classes(), facts.pack_folders()
    choose = functools.partial(choosing.begin, front) if _config.workers == "auto" else lambda is_unsafe: None
    _put_back.append(judging.judge(modes, serial, classes, folders, facts.raise_if_interrupted, choose))
    alone.use(front.mutex)
    _restore_jobs(front)
    _put_back.append(stalls.watch(_config.stall_s if _worker is None else 0.0, _config.stall))
    _put_back.append(watching.listen(front, server.loop, _config, is_worker=_worker is not None))
    worker.take_over(front, lambda value: value is queue or front.is_behind(value))
    if _worker is not None:
        from comfy_parallel.http import health

        _worker.serve(server, front, health.report)


def _open_journal(server: Any, front: Any) -> None:
    """Have jobs written down, after those that are there from before a restart; these wait for `_restore_jobs`."""
    global _kept
    if _config.state == "off":
        return
    path = facts.state_file() if _config.state is None else Path(_config.state).expanduser()
    try:
        journal = Journal(path, secrets.names(), is_power_safe=_config.state_fsync)
        _kept = journal.recover()
    except JournalError as error:
        logger.error("comfy_parallel: the queue is kept in memory only, and a restart loses it: %s", error)
        front.ledger.stay_off(str(error))
        return
    server.number = max(server.number, _kept.counter)
    front.ledger.open(journal, _kept.next_job, lambda: int(server.number))
    _put_back.append(front.ledger.close)
    atexit.register(front.ledger.close)


def _restore_jobs(front: Any) -> None:
    """Let the jobs of before a restart wait again, now that the node packs are loaded."""
    global _kept
    kept, _kept = _kept, None
    if kept is not None and front.ledger.journal is not None:
        Recovery(front, _config.attempts, secrets.asked_for).restore(kept)


def _share_weights(front: Any) -> None:
    if _patches is None or "weights" not in _patches.features():
        return
    sharing.begin(_config, front, _env, may_pin=facts.may_pin())


def _check_complete() -> None:
    missing = _patches.missing() if _patches is not None else ["all"]
    if missing:
        raise HostMismatch(f"these modules were never imported, so their patches are missing: {', '.join(missing)}")


def _tell_unknown_globals() -> None:
    """What the host changes at run time and nobody has looked at may race between slots. Waits only when strict.

    Raises:
        HostMismatch: with `COMFY_PARALLEL_STRICT=1`.
    """
    global _search
    search, _search = _search, None
    if search is None:
        return
    if not _config.strict:
        threading.Thread(target=_warn_of_unknown, args=(search,), daemon=True, name=_SEARCH_THREAD).start()
    elif unknown := search.found():
        raise HostMismatch("; ".join(unknown))


_SEARCH_THREAD = "comfy_parallel-unknown-globals"


def _warn_of_unknown(search: Search) -> None:
    try:
        unknown = search.found()
    except HostMismatch as failure:
        unknown = [str(failure)]
    for sentence in unknown:
        logger.warning("comfy_parallel: %s", sentence)


def _end_search() -> None:
    global _search
    if _search is not None:
        _search.stop()
        _search = None


_WITHOUT = {
    "weights": ("every slot keeps its own copy of its weights", "COMFY_PARALLEL_WEIGHTS=off"),
    "graphs": ("every step runs eagerly", "COMFY_PARALLEL_GRAPHS=off"),
}


def _leave_out(what: str, reason: HostMismatch) -> None:
    """Say once what this host does without, and why."""
    if what not in _WITHOUT:
        logger.warning("comfy_parallel: this ComfyUI does without %s: %s", what, reason)
        return
    effect, remedy = _WITHOUT[what]
    if _config.strict:
        _exit(HostMismatch(f"{what} does not fit this ComfyUI; start with {remedy} to do without: {reason}"))
    logger.warning(
        "comfy_parallel: %s does not fit this ComfyUI, so %s (%s asks for that): %s", what, effect, remedy, reason
    )
    if what == "graphs":
        per_slot.switch(False, f"they do not fit this ComfyUI: {reason}")


def _give_up(mismatch: HostMismatch) -> None:
    global _patches
    _patches = None
    _give_choices_back()
    _end_search()
    _stay_off(mismatch)


def _stay_off(mismatch: HostMismatch) -> None:
    if _config.strict or _worker is not None:
        _exit(mismatch)
    logger.warning(
        "comfy_parallel does not fit this ComfyUI %s and stays OFF; ComfyUI runs one job at a time. %s",
        _host_version(),
        mismatch,
    )


def _give_choices_back() -> None:
    while _put_back:
        _put_back.pop()()


def _host_version() -> str:
    try:
        return facts.version(facts.directory())
    except HostMismatch:
        return "(unknown)"


def _exit(error: ComfyParallelError) -> NoReturn:
    logger.critical("comfy_parallel: %s", error)
    sys.stderr.flush()
    raise SystemExit(2)
