"""Forwards recorded as CUDA graphs, in memory of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from comfy_parallel.graphs.collection import no_collection
from comfy_parallel.graphs.refusal import Uncapturable
from comfy_parallel.graphs.signature import have_same_bytes
from comfy_parallel.slots.gates import recording_on

Function = Callable[[list[Any]], Any]


class Recorder:
    """Makes the recordings of one slot. They share a memory pool, which is given back when the last of them goes.
    After one that failed the next begin another pool.

    Several slots may compute on one device: each has a pool and a stream to record on, they record in turns
    (`slots/gates.py`), and replays run on the stream that all of them compute on anyway, the device's default one.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._recordings: WeakSet[Recording] = WeakSet()
        self._in_pool: WeakSet[Recording] = WeakSet()
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
        The calling thread has run `forward` before: libraries make what they need (cuBLAS its handle) when they are
        first used by a thread, and cannot while that records.

        Args:
            buffers: tensors on the device, from now on the recording's own.

        Raises:
            Uncapturable: when CUDA refuses to record it. After any error the device is usable.
        """
        import torch

        with recording_on(self._device.index), torch.cuda.device(self._device):
            self._prepare()
            before = torch.cuda.memory_reserved()
            self._stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            try:
                with no_collection(), torch.cuda.stream(self._stream):
                    output = _captured(graph, forward, buffers, self._pool)
            except BaseException:
                self._stream = None  # It may be in any state.
                self._in_pool = WeakSet()  # torch may go on as if this pool's recording lasted.
                raise
            torch.cuda.current_stream().wait_stream(self._stream)
            self._pool_bytes += max(0, torch.cuda.memory_reserved() - before)
        recording = Recording(graph, buffers, output)
        self._recordings.add(recording)
        self._in_pool.add(recording)
        return recording

    def wait(self) -> None:
        """Return when no replay runs any more."""
        import torch

        torch.cuda.synchronize(self._device)

    def _prepare(self) -> None:
        """Waits, too: a host with dynamic VRAM waits for the GPU to free memory, which would end a capture."""
        import torch

        torch.cuda.synchronize()
        if self._stream is None:
            # torch hands out 32 streams of each priority in turns: what others do on one of ours would be recorded.
            # Next to nobody asks for this priority; kernels do the same with any.
            self._stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        if not len(self._in_pool):  # torch refuses a pool whose graphs have all gone
            self._pool = torch.cuda.graph_pool_handle()
        if not len(self._recordings):
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

    stream = torch.cuda.current_stream()
    try:
        _begin(graph, pool)
        try:
            return forward(buffers)
        finally:
            with torch.cuda.stream(stream):  # A forward that fails may leave another one.
                graph.capture_end()
    except BaseException as error:
        _release_pool(pool)
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise Uncapturable("CUDA refused to record it") from error
        raise


def _begin(graph: Any, pool: Any) -> None:
    """While a graph is recorded, torch lets nobody else draw from the generator state that the device had when it was
    begun, nor replay another graph begun with it. So that is one of the graph's own; a forward that draws is refused.
    """
    import torch

    generator = vars(torch.cuda)["default_generators"][torch.cuda.current_device()]  # in a slot torch gives the slot's
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(torch.Generator(device=generator.device).graphsafe_get_state())
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    finally:
        generator.graphsafe_set_state(state)


def _release_pool(pool: Any) -> None:
    """When CUDA ends a recording with an error, torch's allocator goes on as if it lasted: it never frees its cache
    again, and fails when it is asked to."""
    import torch

    index = torch.cuda.current_device()
    name = "_cuda_endAllocateToPool"
    end: Any = getattr(torch._C, name if hasattr(torch._C, name) else "_cuda_endAllocateCurrentStreamToPool")
    try:
        end(index, pool)
    except RuntimeError:  # It has ended well: the error was Python's.
        return
    torch._C._cuda_releasePool(index, pool)
