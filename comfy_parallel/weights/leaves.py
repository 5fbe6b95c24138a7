"""What torch and the host tell of a module by walking it, told at once of one without others, or without theirs.

A host asks this of each module when it loads a model; walking takes Python longer than the GPU needs for the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def named_parameters(module: Any, prefix: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    """What `module.named_parameters(prefix, recurse=False, remove_duplicate)` tells."""
    seen: set[int] = set()
    start = f"{prefix}." if prefix else ""
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in seen:
            if remove_duplicate:
                seen.add(id(parameter))
            yield start + name, parameter


def lists_as_torch_does(module: Any) -> bool:
    import torch

    return type(module)._named_members is torch.nn.Module._named_members


def size(module: Any) -> int | None:
    """The bytes of what `module.state_dict()` holds; None if torch must be asked."""
    import torch

    kind, base = type(module), torch.nn.Module
    is_plain = (
        not (module._modules or module._state_dict_hooks or module._state_dict_pre_hooks)
        and kind.state_dict is base.state_dict
        and kind._save_to_state_dict is base._save_to_state_dict
        and kind.get_extra_state is base.get_extra_state
    )
    if not is_plain:
        return None
    total = 0
    for store, left_out in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
        for name, tensor in store.items():
            if tensor is None or name in left_out:
                continue
            if type(tensor) not in (torch.nn.Parameter, torch.Tensor):
                return None
            total += tensor.nbytes
    return total
