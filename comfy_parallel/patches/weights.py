"""Patches on where the host and torch load, move and write weights: slots share one copy of each file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from comfy_parallel.patching.engine import Patch
from comfy_parallel.weights import loading, streaming
from comfy_parallel.weights.files import regions
from comfy_parallel.weights.gpu import copies, homes

WEIGHTS = "weights"
_WHY = "Every slot would keep its own copy of the same weights in RAM."
_WHY_APART = "Weights that lie in one block on a GPU give its memory back together only."
_WHY_SAVED = "Who overwrites a mapped file waits until its users have a copy, and may hold the interpreter."
_WHY_FETCHED = (
    "Weights that are fetched at each use would come at a fifth of the speed: slots pin no copies of their own."
)
_UNTIL = "the host's models alias the mapped file on every device"


def _load_torch_file(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_torch_file(
        ckpt: str, safe_load: bool = False, device: Any = None, return_metadata: bool = False, **others: Any
    ) -> Any:
        def load() -> Any:
            return original(ckpt, safe_load=safe_load, device=device, return_metadata=return_metadata, **others)

        store = loading.store_of_slot()
        if store is None or not (device is None or str(getattr(device, "type", device)).startswith("cpu")):
            return load()
        metadata: Any = None

        def load_weights() -> Any:
            nonlocal metadata
            result = _naming(ckpt, load)
            weights, metadata = result if return_metadata else (result, None)
            return weights

        weights = loading.load_file(store, ckpt, load_weights)
        return (weights, metadata) if return_metadata else weights

    return load_torch_file


def _naming(path: str, load: Callable[[], Any]) -> Any:
    """The host does not name every file that it cannot read."""
    import safetensors

    try:
        return load()
    except (RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        if path in str(error):
            raise
        raise RuntimeError(f"{error}\n\nFile path: {path}\n\nThe file is corrupt or incomplete.") from error


def _load_from_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not local_metadata.get("assign_to_params_buffers", False):
            store = loading.store_of_slot()
            if store is not None and not self._load_state_dict_pre_hooks:
                done = loading.share_parameters(store, self, state_dict, prefix)
                state_dict = {**state_dict, **done} if done else state_dict
            loading.before_load(self, state_dict, prefix)
        original(self, state_dict, prefix, local_metadata, *args, **kwargs)

    return _load_from_state_dict


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        store = loading.store_of_slot()
        if store is None:
            return original(self, *args, **kwargs)
        if not kwargs and len(args) == 1 and loading.is_leaf_on(self, args[0]):
            return self  # as a thousand times in a load, after `load_ahead`
        import torch

        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        parts = loading.modules_of(self)
        is_plain = device is not None and dtype is None and memory_format is None
        if not is_plain or not loading.move_as_torch_does(parts):
            with loading.moving(store, loading.parameters_of(parts), device, dtype):
                return original(self, *args, **kwargs)
        parts = [part for part in parts if not loading.is_on(part, device)]
        if parts:
            with loading.moving(store, loading.parameters_of(parts), device, dtype):
                for part in parts:
                    if not loading.is_on(part, device):  # still; with buffers for example
                        # Alone: what is in it would forget its home, although it is there already.
                        part._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking), recurse=False)
        return self

    return to


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        loading.forget_homes(self)
        return original(self, *args, **kwargs)

    return _apply


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(
        self: Any,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **others: Any,
    ) -> Any:
        """Copies all weights at once and waits for the copies once, not module by module."""
        arguments = (device_to, lowvram_model_memory, force_patch_weights, full_load)
        store = loading.store_of_slot()
        if store is None:
            return original(self, *arguments, **others)
        with copies.complete():
            if full_load and getattr(device_to, "type", None) == "cuda":
                loading.load_ahead(store, self.model, device_to, self.patches)
            return original(self, *arguments, **others)

    return load


def _partially_unload(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def partially_unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Memory is given back weight by weight, as the host counts it."""
        store = loading.store_of_slot()
        if store is not None:
            loading.take_apart(store, self.model)
        return original(self, *args, **kwargs)

    return partially_unload


def _copy_to_param(original: Callable[..., Any], get_attr: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def copy_to_param(obj: Any, attr: str, value: Any) -> Any:
        loading.before_write(get_attr(obj, attr))
        return original(obj, attr, value)

    return copy_to_param


def _patch_weight_to_device(original: Callable[..., Any], get_attr: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patch_weight_to_device(
        self: Any, key: str, device_to: Any = None, inplace_update: bool = False, **others: Any
    ) -> Any:
        """The unpatched weight goes back to where it came from, so that its backup is no copy."""
        store = loading.store_of_slot()
        if key in self.patches and store is not None:
            weight = get_attr(self.model, key)
            home = homes.home_of(weight)
            if inplace_update or self.weight_inplace_update:
                loading.before_write(weight)
            elif home is not None and not others.get("return_weight"):
                loading.send_home(store, [(weight, home)])
        return original(self, key, device_to=device_to, inplace_update=inplace_update, **others)

    return patch_weight_to_device


def _patch_hook_weight_to_device(original: Callable[..., Any], get_attr: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patch_hook_weight_to_device(
        self: Any, hooks: Any, combined_patches: Any, key: str, *args: Any, **kwargs: Any
    ) -> Any:
        if key in combined_patches and loading.store_of_slot() is not None:
            loading.before_write(get_attr(self.model, key))
        return original(self, hooks, combined_patches, key, *args, **kwargs)

    return patch_hook_weight_to_device


def _on_cpu_first(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def initial_device(*args: Any, **kwargs: Any) -> Any:
        device = original(*args, **kwargs)
        if loading.store_of_slot() is None or device.type == "cpu":
            return device
        # Tensors of "cpu:0" are those of "cpu", but the names differ: so the host still takes a model that it would
        # have made on the GPU there at once. Where it lies decides on which device its schedule is computed.
        return torch.device("cpu:0")

    return initial_device


def _save_file(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        _before_saving(filename)
        return original(tensors, filename, *args, **kwargs)

    return save_file


def _open_for_saving(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, name: Any) -> None:
        _before_saving(name)
        original(self, name)

    return __init__


def _before_saving(path: Any) -> None:
    """These open files in native code and may hold the interpreter meanwhile."""
    store = loading.store()
    if store is not None:
        store.let_go(path)


def _pin_memory(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def pin_memory(tensor: Any) -> bool:
        """Shared memory is not a slot's to pin."""
        return original(tensor) if not regions.is_shared(tensor) else False

    return pin_memory


def _pin_weights(original: Callable[..., Any], read_slice: Callable[..., Any]) -> Callable[..., Any]:
    """Only for hosts that ask `read_slice` for each copy to the GPU: it keeps what these copies read."""

    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def pin_memory(module: Any, *args: Any, **kwargs: Any) -> Any:
        """No slot's own copy of what all slots can read from one place."""
        store = loading.store_of_slot()
        arguments = dict(zip(names, (module, *args), strict=False)) | kwargs
        if store is not None and arguments.get("subset", "weights") in ("weights", "weights-loaded"):
            weights = [getattr(module, name, None) for name in ("weight", "bias")]
            if streaming.can_stream(store, weights) or streaming.are_on_gpus(weights):
                return False
        return original(module, *args, **kwargs)

    return pin_memory


def _cast_to(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def cast_to(weight: Any, *args: Any, **kwargs: Any) -> Any:
        """A weight that the host offloads and that slots share comes from pinned memory, by the stream it chose."""
        store = loading.store_of_slot()
        if store is not None and weight.is_cpu:
            arguments = dict(zip(names, (weight, *args), strict=False)) | kwargs
            device, stream = arguments.get("device"), arguments.get("stream")
            is_copy = arguments.get("dtype") in (None, weight.dtype) and arguments.get("non_blocking")
            if is_copy and getattr(device, "type", None) == "cuda":
                fetched = streaming.fetched(store, weight, device, stream, arguments.get("r"))
                if fetched is not None:
                    return fetched
        return original(weight, *args, **kwargs)

    return cast_to


def _read_slice(original: Callable[..., bool]) -> Callable[..., bool]:
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def read_tensor_file_slice_into(tensor: Any, destination: Any, *args: Any, **kwargs: Any) -> bool:
        store = loading.store_of_slot()
        if store is not None:
            arguments = dict(zip(names, (tensor, destination, *args), strict=False)) | kwargs
            targets = [target for target in (destination, arguments.get("destination2")) if target is not None]
            is_to_gpu = [target.device.type for target in targets] == ["cuda"]  # not by way of the host's pinned copy
            if is_to_gpu and streaming.copy_in(store, tensor, targets[0], arguments.get("stream")):
                return True
        return original(tensor, destination, *args, **kwargs)

    return read_tensor_file_slice_into


def _patch(target: str, wrap: Any, *params: str, why: str = _WHY, **others: Any) -> Patch:
    return Patch(target=target, wrap=wrap, params=params, why=why, until=_UNTIL, feature=WEIGHTS, **others)


PATCHES: tuple[Patch, ...] = (
    _patch("comfy.utils:load_torch_file", _load_torch_file, "ckpt", "safe_load", "device", "return_metadata"),
    _patch("safetensors.torch:save_file", _save_file, "tensors", "filename", why=_WHY_SAVED),
    _patch("torch.serialization:_open_zipfile_writer_file.__init__", _open_for_saving, "self", "name", why=_WHY_SAVED),
    _patch("comfy.utils:copy_to_param", _copy_to_param, "obj", "attr", "value", needs=("get_attr",), hazards=(53,)),
    _patch(
        "torch.nn.modules.module:Module._load_from_state_dict",
        _load_from_state_dict,
        "self",
        "state_dict",
        "prefix",
        "local_metadata",
    ),
    _patch("torch.nn.modules.module:Module.to", _to, "self"),
    _patch("torch.nn.modules.module:Module._apply", _apply, "self"),
    _patch(
        "comfy.model_patcher:ModelPatcher.load",
        _load,
        "self",
        "device_to",
        "lowvram_model_memory",
        "force_patch_weights",
        "full_load",
    ),
    _patch("comfy.model_patcher:ModelPatcher.partially_unload", _partially_unload, "self", "device_to", why=_WHY_APART),
    _patch(
        "comfy.model_patcher:ModelPatcher.patch_weight_to_device",
        _patch_weight_to_device,
        "self",
        "key",
        "device_to",
        "inplace_update",
        needs=("comfy.utils:get_attr",),
    ),
    _patch(
        "comfy.model_patcher:ModelPatcher.patch_hook_weight_to_device",
        _patch_hook_weight_to_device,
        "self",
        "hooks",
        "combined_patches",
        "key",
        needs=("comfy.utils:get_attr",),
        hazards=(53,),
    ),
    _patch("comfy.model_management:unet_inital_load_device", _on_cpu_first),
    _patch("comfy.model_management:text_encoder_initial_device", _on_cpu_first),
    _patch("comfy.model_management:pin_memory", _pin_memory, "tensor", optional=True, hazards=(36,)),
    _patch("comfy.model_management:cast_to", _cast_to, "weight", "dtype", "device", why=_WHY_FETCHED),
    _patch(
        "comfy.pinned_memory:pin_memory",
        _pin_weights,
        "module",
        needs=("comfy.memory_management:read_tensor_file_slice_into",),
        spare=True,
    ),
    _patch(
        "comfy.memory_management:read_tensor_file_slice_into",
        _read_slice,
        "tensor",
        "destination",
        optional=True,
    ),
)
