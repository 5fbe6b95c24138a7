"""Dynamic VRAM of newer hosts, which slots that share a GPU have to do without."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from comfy_parallel.errors import ConfigError

logger = logging.getLogger(__name__)

_WHY = "comfy_aimdo keeps what lies on a GPU in lists without a lock, which only one thread may use"


def turn_off() -> Callable[[], None]:
    """Have the host load models without it, if it would use it; call it before the host does.

    Returns what puts the host's choice back.

    Raises:
        ConfigError: when the user asked for it.
    """
    from comfy import cli_args

    enables = getattr(cli_args, "enables_dynamic_vram", lambda: False)
    if not enables():
        return lambda: None
    before = getattr(cli_args.args, "disable_dynamic_vram", False)

    def put_back() -> None:
        cli_args.args.disable_dynamic_vram = before

    cli_args.args.disable_dynamic_vram = True
    if enables():
        put_back()
        raise _refusal("leave out --enable-dynamic-vram and --fast dynamic_vram")
    logger.info("comfy_parallel: dynamic VRAM is off, because slots share a GPU: %s", _WHY)
    return put_back


def check_off() -> None:
    """See that the host does without it, when it has started.

    Raises:
        ConfigError: when it does not.
    """
    host = sys.modules.get("comfy.memory_management")  # older hosts have none
    if getattr(host, "aimdo_enabled", False):
        raise _refusal("start ComfyUI with --disable-dynamic-vram")


def _refusal(fix: str) -> ConfigError:
    return ConfigError(f"dynamic VRAM is on, with several slots on one GPU: {_WHY}; {fix}, or have one slot per GPU")


def can_do_without_pages(model: Any, place: tuple[Any, int, int]) -> bool:
    """Whether the host fetches a module's weights at each use, where `place` is what it has for pages.

    Models that say in which units they are used have pages for whole units: there the host asks for them all.
    """
    if hasattr(model, "get_dynamic_vram__units"):
        return False
    try:
        from comfy_aimdo import model_vbar
    except ImportError:
        return False
    try:
        model_vbar.vbar_unpin(place)
        return model_vbar.vbar_fault(place) is None and not model_vbar.vbar_signature_compare(None, None)
    except (AttributeError, TypeError, ValueError) as error:
        logger.info("comfy_parallel: this host's dynamic VRAM is of a kind we do not know (%s)", error)
        return False
