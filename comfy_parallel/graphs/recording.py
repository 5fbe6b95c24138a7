"""Forwards recorded as CUDA graphs, in memory of their own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow
from comfy_parallel.graphs.signature import have_same_bytes

Function = Callable[[list[Any]], Any]


class Recorder:
    """Makes the recordings of one device. They share a memory pool, which is given back when the last of them goes."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._recordings: WeakSet[Recording] = WeakSet()
        self._pool: Any = None
        self._pool_bytes = 0
        self._stream: Any = None

    @property
    def size_bytes(self) -> int:
        """Device memory that the recordings hold."""
        return self._pool_bytes if len(self._recordings) else 0

    def record(self, forward: Function, buffers: list[Any]) -> Recording:
        """A recording of `forward`, a function of tensors that returns one; it waits for nothing.

        It holds the addresses of what it read, so whoever keeps it sees to it that these tensors stay where they are.

        Args:
            buffers: tensors on the device, from now on the recording's own.

        Raises:
            Uncapturable: when CUDA refuses to record it. The device is usable afterwards.
        """
        import torch

        with torch.cuda.device(self._device):
            self._prepare()
            before = torch.cuda.memory_reserved()
            self._stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.stream(self._stream):
                output = _captured(graph, forward, buffers, self._pool)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._pool_bytes += max(0, torch.cuda.memory_reserved() - before)
        recording = Recording(graph, buffers, output)
        self._recordings.add(recording)
        return recording

    def wait(self) -> None:
        """Return when no replay runs any more."""
        import torch

        torch.cuda.synchronize(self._device)

    def _prepare(self) -> None:
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if not len(self._recordings):  # torch refuses a pool whose graphs have all gone
            self._pool = torch.cuda.graph_pool_handle()
            self._pool_bytes = 0


class Recording:
    """Not to be replayed by two threads at once."""

    def __init__(self, graph: Any, buffers: list[Any], output: Any) -> None:
        self._graph = graph
        self._buffers = buffers
        self._output = output
        self._in_ram: dict[int, Any] = {}

    def replay(self, inputs: list[Any]) -> Any:
        """What `forward` would return for these tensors; the caller's to keep."""
        import torch

        pairs = [pair for pair in enumerate(inputs) if not self._is_there(*pair)]
        if pairs:
            torch._foreach_copy_([self._buffers[index] for index, _ in pairs], [tensor for _, tensor in pairs])
        self._graph.replay()
        return self._output.clone()

    def _is_there(self, index: int, tensor: Any) -> bool:
        """Whether these bytes were copied before. A copy from RAM waits for the device, and conditionings are the
        same in each step."""
        if tensor.device.type != "cpu":
            return False
        last = self._in_ram.get(index)
        if last is not None and have_same_bytes(last, tensor):
            return True
        self._in_ram[index] = tensor.clone()
        return False


def _captured(graph: Any, forward: Function, buffers: list[Any], pool: Any) -> Any:
    import torch

    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            return forward(buffers)
        finally:
            graph.capture_end()
    except BaseException as error:
        _repair_generator()
        if isinstance(error, torch.OutOfMemoryError):
            raise UncapturableNow("too little memory to record it") from error
        if isinstance(error, RuntimeError):
            raise Uncapturable("CUDA refused to record it") from error
        raise


_collection_lock = threading.Lock()
_recorders = 0
_was_collecting = False


@contextmanager
def _no_collection() -> Iterator[None]:
    """Freeing another recording or an event in the middle of a capture would spoil it."""
    global _recorders, _was_collecting
    with _collection_lock:
        if not _recorders:
            _was_collecting = gc.isenabled()
        _recorders += 1
        gc.disable()
    try:
        yield
    finally:
        with _collection_lock:
            _recorders -= 1
            if _was_collecting and not _recorders:
                gc.enable()


def _repair_generator() -> None:
    """A capture that fails leaves the device's generator in its capturing state, where it refuses to draw."""
    import torch

    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.get_state()
    generator.graphsafe_set_state(torch.Generator(device=generator.device).graphsafe_get_state())
    generator.set_state(state)
