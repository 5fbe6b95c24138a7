"""The size of a module without others in it, which a host asks of each when it loads a model."""

from __future__ import annotations

from typing import Any


def size_of(module: Any) -> int | None:
    """The bytes of what `module.state_dict()` holds, at once; None if torch must be asked."""
    import torch

    if not is_plain(module):
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


def is_plain(module: Any) -> bool:
    """Whether `module.state_dict()` holds the module's own tensors and nothing else."""
    import torch

    kind, base = type(module), torch.nn.Module
    return (
        not (module._modules or module._state_dict_hooks or module._state_dict_pre_hooks)
        and kind.state_dict is base.state_dict
        and kind._save_to_state_dict is base._save_to_state_dict
        and kind.get_extra_state is base.get_extra_state
    )
