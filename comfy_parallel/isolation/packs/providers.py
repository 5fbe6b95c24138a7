"""Cache providers that packs register with newer hosts: each slot calls its own copies, as their jobs are its own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from comfy_parallel.isolation.packs.copies import is_of_a_pack, own_copy
from comfy_parallel.isolation.packs.writes import SHARED
from comfy_parallel.slots.own_names import has_own

Providers = tuple[Any, ...]


def per_slot(original: Callable[[], Providers]) -> Callable[[], Providers]:
    """Wrap the host's function that gives the registered providers."""

    @functools.wraps(original)
    def get_cache_providers() -> Providers:
        found = original()
        return tuple(map(_own, found)) if has_own() else found

    return get_cache_providers


def _own(provider: Any) -> Any:
    return provider if _must_stay_one(provider) or not is_of_a_pack(type(provider)) else own_copy(provider)


def _must_stay_one(provider: Any) -> bool:
    """Whether a name of the pack that the server uses too holds it."""
    names = vars(sys.modules.get(type(provider).__module__, sys))
    return any(names.get(name) is provider for name in names.get(SHARED, ()))
