"""Every exception the package raises on purpose."""

from __future__ import annotations


class ComfyParallelError(Exception):
    """Base of all errors raised by comfy_parallel."""


class ConfigError(ComfyParallelError):
    """A variable, an argument of the command or an entry of gpu_config.json has a value that cannot be used."""


class HostMismatch(ComfyParallelError):
    """The host does not look the way a patch needs it to look."""


class DeviceError(ComfyParallelError):
    """A slot's device does not exist or cannot be initialised."""


class AllocationError(ComfyParallelError):
    """What says how a model is spread over devices cannot be understood or kept."""


class NodeInputError(ComfyParallelError):
    """An input of one of our nodes has a value that it cannot use."""


class ShareLost(ComfyParallelError):
    """A participant's share of a job was computed and gave nothing to the node that collects."""


class MustRunAlone(ComfyParallelError):
    """A share of a job must be the only one that runs, which it cannot be while its job runs."""


class WeightsLost(ComfyParallelError):
    """A weight file was overwritten while a job used it, and its old bytes could not be kept."""


class JournalError(ComfyParallelError):
    """The file in which the queue is kept cannot be used. `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.remedy = remedy


class BadRequest(ComfyParallelError):
    """A client sent something that cannot be acted on; nothing was changed.

    `type` is the machine-readable kind, as in the host's own error replies; `status` is the reply's.
    """

    status = 400
    retry_after_s: int | None = None

    def __init__(self, type: str, message: str, details: str) -> None:
        super().__init__(message)
        self.type = type
        self.message = message
        self.details = details


class JobLost(ComfyParallelError):
    """The process that ran a job ended before the job did. `has_begun`: it had been given the job."""

    def __init__(self, reason: str, *, has_begun: bool, may_run_again: bool) -> None:
        super().__init__(reason)
        self.has_begun = has_begun
        self.may_run_again = may_run_again


class RemoteError(ComfyParallelError):
    """Another ComfyUI could not be reached, or refused a request.

    `status` and `body` are of its reply, if it gave one. `was_sent`: it may have received the request. `is_refused`:
    nothing listens at its address.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        body: str = "",
        was_sent: bool = True,
        is_refused: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.body, self.was_sent, self.is_refused = status, body, was_sent, is_refused


class CannotRunThere(BadRequest):
    """A job is bound to a slot that cannot run it."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "cannot_run_there", reason, "send it to another slot or to auto, or add to that host what it lacks"
        )


class JobStalled(ComfyParallelError):
    """A job has shown no sign of life for too long, and was interrupted."""


class StalledAndWaitsAgain(BaseException):
    """As `JobStalled`, but the job is to run once more. Not an `Exception`, so that no node and no host handles it."""

    has_begun = may_run_again = True


class Draining(BadRequest):
    """A new job was sent to a server or a slot that takes no new ones for now."""

    status = 503
    retry_after_s = 10

    def __init__(self, what: str, details: str) -> None:
        super().__init__("draining", f"{what} is draining and takes no new jobs", details)


class SlotFailed(BadRequest):
    """A new job was sent to a slot whose device is lost to this process."""

    status = 503
    retry_after_s = 60

    def __init__(self, what: str, reason: str) -> None:
        details = "send the job again to another slot, or to any"
        super().__init__("slot_failed", f"{what} has failed and takes no jobs: {reason}", details)


class TooManyReaders(BadRequest):
    """As many watch the server's events as it serves."""

    status = 503
    retry_after_s = 10

    def __init__(self, limit: int) -> None:
        super().__init__(
            "too_many_readers", f"{limit} readers watch this server's events already", "close a dashboard, or try later"
        )


class NoSuchWorker(BadRequest):
    """No worker of `gpu_config.json` has this id."""

    status = 404

    def __init__(self, worker_id: str, known: str) -> None:
        super().__init__("no_such_worker", f"no worker has the id {worker_id}", f"ask for one of: {known or 'none'}")


class NotWaiting(BadRequest):
    """Only a job that waits can be changed."""

    def __init__(self, status: int, state: str, details: str) -> None:
        super().__init__("not_waiting", f"the job {state}", details)
        self.status = status


class QueueFull(BadRequest):
    """As many jobs wait as the operator allows."""

    status = 429
    retry_after_s = 10

    def __init__(self, message: str, variable: str) -> None:
        super().__init__(
            "queue_full", message, f"send the job again later, or have the operator raise {variable}; nothing was lost"
        )


class KeyReused(BadRequest):
    """An `Idempotency-Key` came a second time with another request."""

    status = 422

    def __init__(self, key: str) -> None:
        super().__init__(
            "idempotency_key_reused",
            f"the Idempotency-Key {key!r} has come before, with another request",
            "send each new job with a key of its own, and only a repetition, unchanged, with the same key",
        )


class TooManyNodes(BadRequest):
    """A job has more nodes than the server takes."""

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(
            "too_many_nodes",
            f"the job has {count} nodes, and this server takes at most {limit}",
            "send several smaller jobs, or start the server with a higher COMFY_PARALLEL_MAX_NODES",
        )

    def __str__(self) -> str:
        return f"{self.message}; {self.details}"
