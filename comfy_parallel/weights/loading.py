"""Weights between file and model: read once, aliased by the models of all slots, and never written to."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import contains
from typing import TYPE_CHECKING, Any

from comfy_parallel.slots.slot import Slot, SlotLocal, current_index, current_slot
from comfy_parallel.weights import lost, streaming
from comfy_parallel.weights.files import ram
from comfy_parallel.weights.files.formats import Entry, is_safetensors, read_entries
from comfy_parallel.weights.files.regions import ALIGNMENT, Region, SharedMemory, is_shared
from comfy_parallel.weights.gpu import copies, homes, loads
from comfy_parallel.weights.gpu.homes import Home
from comfy_parallel.weights.spans import Span

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.files.store import Store, WeightFile

logger = logging.getLogger(__name__)

_OWN_USES = 2  # of a storage: the parameter, and the storage object that asks
_PLAIN = (bool, int, float, str, bytes, type(None))
_store: Store | None = None
_has_loaded: SlotLocal[bool] = SlotLocal(lambda: False)
_loads: SlotLocal[int] = SlotLocal(lambda: 0)


def use(store: Store | None, free: Callable[[int], None] = lambda index: None) -> None:
    """Share weights through this store; None: do not share.

    Args:
        free: has a slot, by its index, let go of all that it keeps.
    """
    global _store
    _store = store
    if store is not None:
        store.on_loss(lambda region, error: lost.note(region, error, free))


def store() -> Store | None:
    """The store; None where weights are not shared."""
    return _store


def store_of_slot() -> Store | None:
    """The store, for code of a slot that shares."""
    return _store if current_slot() is not None else None


def file_loads(slot: Slot) -> int:
    """How many weight files a slot has loaded."""
    return _loads.of(slot)


def between_jobs(was_freed: bool) -> None:
    """Give back memory, on a slot's thread: what the allocator keeps after a load, and on request what nobody uses."""
    if _store is None:
        return
    streaming.between_jobs()
    if was_freed:
        lost.let_go(current_index(), _store.files())
        _store.drop_unused()
    if was_freed or _has_loaded.get():
        ram.trim()
        _has_loaded.set(False)


def load_file(store: Store, path: str, load: Callable[[], Any]) -> Any:
    """What `load()` returns for a weight file, with tensors that remember where in the file they come from.

    They may be written to: they are copy-on-write views. A pickled file is read once.

    Raises:
        OSError: when the file cannot be read, or is overwritten meanwhile.
    """
    store.keep_to_budget()
    _has_loaded.set(True)
    _loads.set(_loads.get() + 1)
    with store.opened(path) as file:
        if is_safetensors(path):
            return _views_of_safetensors(store, file, load())
        return _views_of_pickled(store, file, load)


def share_parameters(store: Store, module: Any, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Make a module's parameters alias what a state dict holds for them.

    Returns the entries to load in the place of those: each parameter itself, and copying a tensor to itself does
    nothing. Parameters that cannot alias are left for the host to fill.
    """
    done = {}
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        if value is not None and _is_plain_tensor(value) and _can_alias(parameter, value.shape):
            shared = _shared(store, value, parameter, parameter.dtype)
            if shared is not None:
                parameter.data = shared
                done[prefix + name] = parameter
    return done


def before_load(module: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the parameters that a state dict is about to be copied into memory of their own."""
    for name, parameter in module._parameters.items():
        if parameter is not None and prefix + name in state_dict and state_dict[prefix + name] is not parameter:
            before_write(parameter)


@contextmanager
def moving(store: Store, parameters: Sequence[Any], device: Any, dtype: Any) -> Iterator[None]:
    """Let the body, which moves these parameters' modules by `to(device, dtype)`, do without copying what ends in
    shared memory, and copy what leaves it for a GPU faster than torch would."""
    with copies.complete():
        leaving = before_move(store, parameters, device, dtype)
        try:
            if device is not None and device.type == "cuda":
                pairs = [(p, home) for p, home in leaving if p.is_cpu and dtype in (None, home.tensor.dtype)]
                loads.load_apart(store, pairs, device)
            yield
        finally:
            after_move(leaving)


def load_ahead(store: Store, model: Any, device: Any, patched: Collection[str]) -> None:
    """Copy the weights of a model that is about to be loaded whole to a CUDA device, within `copies.complete()`.

    Args:
        patched: names of parameters that are patched on the way, and stay.
    """
    found: dict[int, tuple[Any, Home]] = {}
    for name, module in named_modules_of(model):
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in found or parameter.grad is not None:
                continue
            home = home_at(parameter)
            if home is not None and (f"{name}.{own}" if name else own) not in patched:
                found[id(parameter)] = parameter, home
    loads.load_whole(store, found.values(), device)


def modules_of(module: Any) -> list[Any]:
    """What `module.modules()` tells, in a fraction of the time."""
    return [part for _, part in named_modules_of(module)]


def named_modules_of(module: Any) -> list[tuple[str, Any]]:
    """What `module.named_modules()` tells, in a fraction of the time."""
    found: dict[int, tuple[str, Any]] = {}
    left = [("", module)]
    while left:
        name, part = left.pop()
        if id(part) in found:
            continue
        found[id(part)] = (name, part)
        prefix = f"{name}." if name else ""
        for child_name, child in reversed(part._modules.items()):
            if child is not None:
                left.append((prefix + child_name, child))
    return list(found.values())


def parameters_of(modules: Iterable[Any]) -> list[Any]:
    """These modules' own parameters, each once."""
    found = (parameter for module in modules for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def is_on(module: Any, device: Any) -> bool:
    """Whether the module's own tensors are on a device, so that `to(device)` changes none of them."""
    for parameter in module._parameters.values():
        if parameter is not None and (parameter.device != device or parameter.grad is not None):
            return False
    buffers = module._buffers
    return not buffers or all(buffer is None or buffer.device == device for buffer in buffers.values())


def is_leaf_on(module: Any, device: Any) -> bool:
    """Whether `to(device)` changes nothing, for a module without others in it."""
    return not module._modules and move_as_torch_does([module]) and is_on(module, device)


def move_as_torch_does(modules: Sequence[Any]) -> bool:
    import torch

    kinds: set[Any] = set(map(type, modules))
    is_torchs = all(kind._apply is torch.nn.Module._apply for kind in kinds)
    return is_torchs and not any(map(contains, map(vars, modules), repeat("_apply")))


def before_move(store: Store, parameters: Iterable[Any], device: Any, dtype: Any) -> list[tuple[Any, Home]]:
    """Do without copying what of a move of these parameters ends in shared memory.

    Returns the parameters that leave it or have left it before, each with its home; for `after_move`.
    """
    leaving, returning = [], []
    for parameter in parameters:
        if parameter.device.type != "cpu":
            home = homes.home_of(parameter)
            if home is not None and device is not None and device.type == "cpu" and dtype in (None, parameter.dtype):
                returning.append((parameter, home))
            elif home is not None:
                leaving.append((parameter, home))  # It may stay where it is.
        elif (home := home_at(parameter)) is not None:
            if device is not None and device.type != "cpu":
                leaving.append((parameter, home))
            elif _is_other_float(dtype, parameter.dtype):
                shared = _shared(store, home.tensor, parameter, dtype)
                if shared is not None:
                    parameter.data = shared
    send_home(store, returning)
    return leaving


def send_home(store: Store, pairs: Sequence[tuple[Any, Home]]) -> None:
    """Let those of these parameters on a device that nobody wrote to be their shared tensors again."""
    for parameter, home in loads.unchanged(store, pairs):
        homes.go_home(parameter, home)


def after_move(leaving: list[tuple[Any, Home]]) -> None:
    """Remember where these parameters came from, so that the way back is free."""
    for parameter, home in leaving:
        is_copy = parameter.device.type != "cpu" and parameter.dtype == home.tensor.dtype
        if is_copy and homes.home_of(parameter) is not home:
            homes.remember(parameter, home, None)


def take_apart(store: Store, model: Any) -> None:
    """Give each weight on a device memory of its own, before weights go one by one."""
    found = [(parameter, homes.home_of(parameter)) for parameter in parameters_of(modules_of(model))]
    loads.take_apart(store, [(p, home) for p, home in found if home is not None or p.device.type != "cpu"])


def home_at(parameter: Any) -> Home | None:
    """The home of a parameter that is an alias of a shared tensor."""
    return homes.home_at(parameter, _shared_data)


def forget_homes(module: Any) -> None:
    """The module's own parameters are about to be replaced."""
    for parameter in module._parameters.values():
        homes.forget(parameter)


def before_write(parameter: Any) -> None:
    """Give a parameter memory of its own, and let it forget where it came from: somebody writes to it."""
    if is_shared(parameter.data):
        parameter.data = parameter.data.clone()
    homes.forget(parameter)


def _shared(store: Store, tensor: Any, parameter: Any, dtype: Any) -> Any:
    """The numbers of `tensor` for `parameter`, which may be made in inference mode and used outside, or the reverse."""
    import torch

    slot = current_slot()
    assert slot is not None
    with torch.inference_mode(parameter.is_inference()):
        return store.shared(tensor, dtype, slot.index, must_align=slot.device == "cpu")


def _can_alias(parameter: Any, shape: Any) -> bool:
    return _is_plain_parameter(parameter) and parameter.shape == shape and _owns_its_storage(parameter)


def _owns_its_storage(parameter: Any) -> bool:
    """Whether no other tensor lies in the same memory: one that does would not follow."""
    import torch

    storage = parameter.untyped_storage()
    is_whole = storage.nbytes() == parameter.numel() * parameter.dtype.itemsize
    return is_whole and torch._C._storage_Use_Count(storage._cdata) <= _OWN_USES


def _is_other_float(dtype: Any, current: Any) -> bool:
    return dtype not in (None, current) and dtype.is_floating_point and current.is_floating_point


def _shared_data(parameter: Any) -> Any:
    """The shared tensor that a parameter is an alias of; None if it is none."""
    if not _is_plain_parameter(parameter):
        return None
    data = parameter.data
    return data if is_shared(data) else None


def _is_plain_parameter(parameter: Any) -> bool:
    import torch

    return (
        type(parameter) is torch.nn.Parameter
        and type(parameter.data) is torch.Tensor
        and parameter.is_cpu
        and parameter.layout == torch.strided
        and parameter.is_contiguous()
    )


def _is_plain_tensor(value: Any) -> bool:
    import torch

    is_tensor = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return is_tensor and value.device.type == "cpu" and not value.is_conj() and not value.is_neg()


def _views_of_safetensors(store: Store, file: WeightFile, weights: dict[str, Any]) -> dict[str, Any]:
    content = store.content(file)
    plain = list(filter(_is_plain_tensor, weights.values()))
    if any(map(streaming.is_mapped_by_host, plain)):
        streaming.note_slices(content, plain)
        return weights
    if file.index is None:
        file.index = read_entries(content.fd)
    with file.private_view() as view:
        return {name: _private(content, view, file.index.get(name), tensor) for name, tensor in weights.items()}


def _private(content: Region, view: Any, entry: Entry | None, tensor: Any) -> Any:
    if entry is None or str(tensor.dtype) != f"torch.{entry.dtype}" or tuple(tensor.shape) != entry.shape:
        return tensor
    return content.private_tensor(view, Span.contiguous(entry.start, tensor.dtype, entry.shape), current_index())


def _views_of_pickled(store: Store, file: WeightFile, load: Callable[[], Any]) -> Any:
    if file.index is None:
        try:
            _read_pickled(store, file, load)
        except _Particular as found:
            file.handed.close()
            return found.weights
    assert file.content is not None
    kind, attributes, parts = file.index
    views: dict[str, Any] = kind()
    if attributes:
        vars(views).update(attributes)
    with file.private_view() as view:
        for name, part in parts:
            views[name] = file.content.private_tensor(view, part, current_index()) if type(part) is Span else part
    return views


class _Particular(Exception):
    """A file holds more than tensors by their names: whoever reads it has what it holds to himself."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = weights


def _read_pickled(store: Store, file: WeightFile, load: Callable[[], Any]) -> None:
    def make() -> tuple[SharedMemory, Any]:
        weights = load()
        if type(weights) not in (dict, OrderedDict) or not all(map(_is_simple, weights.values())):
            raise _Particular(weights)
        return _copied(weights, file)

    store.hand(file, file.path)
    made = file.handed.made_once("pickled", make, lambda: not store.has_changed(file, file.path))
    file.content, file.index = made


def _is_simple(value: Any) -> bool:
    import torch

    is_tensor = type(value) is torch.Tensor and not value.requires_grad
    return type(value) in _PLAIN or (is_tensor and _is_plain_tensor(value))


def _copied(weights: dict[str, Any], file: WeightFile) -> tuple[SharedMemory, Any]:
    """A pickled file's tensors in shared memory, each storage once, and where in it they are."""
    import torch

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in weights.values() if _is_plain_tensor(t)}
    memory = SharedMemory(max(1, sum(storage.nbytes() + ALIGNMENT for storage in storages.values())), file)
    starts = {}
    for address, storage in storages.items():
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        starts[address] = memory.append(content, torch.uint8).offset

    def part(value: Any) -> Any:
        if not _is_plain_tensor(value):
            return value
        start = starts[value.untyped_storage().data_ptr()] + value.storage_offset() * value.dtype.itemsize
        return Span.of(value, start)

    attributes = dict(getattr(weights, "__dict__", {}))  # torch keeps versions of modules there
    return memory, (type(weights), attributes, [(name, part(value)) for name, value in weights.items()])
