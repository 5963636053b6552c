"""What the engine counts, and tells whoever asks."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """What the engine does, and has done since it was made."""

    queued: int
    """Requests that wait for a place."""
    running: int
    unread: int
    """Requests that are answered, but whose last event nobody has taken yet."""
    accepted: int
    finished: int
    failed: int
    """Ended with `Failed`."""
    aborted: int
    """Left by whoever waited for them."""
    refused: int
    prompt_tokens: int
    text_tokens: int
    """Written."""
    images: int
    """Generated."""
    prefix_hits: int
    """Requests that began with a prefix that was remembered, see `PrefixStore`."""
    prefix_misses: int
    prefix_tokens: int
    """Not read once more, images included."""
    prefix_images: int
    """Not encoded once more."""
    prefix_bytes: int
    """Kept now."""
    prefix_entries: int
    batch_sizes: Mapping[str, Mapping[int, int]]
    """How many passes had so many rows: of "encode" images, of "text" documents, of "image" images."""


@dataclass(slots=True)
class Counts:
    """The counts of `EngineStatistics`, while they change."""

    queued: int = 0
    running: int = 0
    unread: int = 0
    accepted: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    images: int = 0
