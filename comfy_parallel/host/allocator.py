"""Which allocator torch takes GPU memory from: recorded forwards need its own, many hosts choose cudaMallocAsync."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
_NEWER_VARIABLE = "PYTORCH_ALLOC_CONF"
_BACKEND = "backend:"
_ASYNC = "backend:cudaMallocAsync"


def prefer_native(env: MutableMapping[str, str]) -> Callable[[], None]:
    """Let torch allocate GPU memory itself, unless the user chose an allocator; call it before torch is imported.

    The user chooses on the command line or in the environment. Returns what puts the host's choice back exactly.
    """
    from comfy import cli_args

    args, before = cli_args.args, env.get(VARIABLE)
    switches = args.cuda_malloc, args.disable_cuda_malloc

    def undo() -> None:
        args.cuda_malloc, args.disable_cuda_malloc = switches
        if before is None:
            env.pop(VARIABLE, None)
        else:
            env[VARIABLE] = before

    if _is_chosen_on_command_line(cli_args) or _BACKEND in env.get(_NEWER_VARIABLE, ""):
        return undo
    if "cuda_malloc" not in sys.modules:  # The host has yet to choose.
        args.disable_cuda_malloc = True
        return undo
    rest, _, last = (before or "").rpartition(",")
    if args.cuda_malloc and last == _ASYNC and _ASYNC not in rest and "torch" not in sys.modules:
        args.cuda_malloc = False
        if rest:
            env[VARIABLE] = rest
        else:
            env.pop(VARIABLE)
    return undo


def _is_chosen_on_command_line(cli_args: Any) -> bool:
    """The host writes its own choice over the user's, so the command line is read again."""
    import comfy.options

    given, _ = cli_args.parser.parse_known_args(None if comfy.options.args_parsing else [])
    return bool(given.cuda_malloc or given.disable_cuda_malloc)
