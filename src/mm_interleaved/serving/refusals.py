"""Why a request is not answered: there is no place for it, or something went wrong inside."""

import math

from mm_interleaved.errors import MMInterleavedError, StorageError, memory_wanted


class RefusedError(MMInterleavedError):
    """A request that is not accepted now, but may be later.

    Attributes:
        retry_after: whole seconds, at least 1.
    """

    code = "refused"

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class QueueFull(RefusedError):  # noqa: N818
    """As many requests wait as may wait."""

    code = "queue_full"


class Draining(RefusedError):  # noqa: N818
    """The engine finishes what it has begun, and accepts nothing new."""

    code = "draining"


class InternalError(MMInterleavedError):
    """A bug or a failure of the machine; the log has more than the client is told."""

    code = "internal"


def told(error: Exception, id: str) -> MMInterleavedError:
    """What a client is told of an error that is not its own: no more than it needs to ask about it."""
    wanted = memory_wanted(error)
    if wanted is not None:
        return StorageError(wanted)
    return InternalError(f"something went wrong inside; the log has it under {id}")
