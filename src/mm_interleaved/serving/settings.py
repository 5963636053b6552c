"""What a server is told when it starts. No request may raise a limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mm_interleaved.documents.images import MAX_PIXELS
from mm_interleaved.errors import UsageError, escape

ANSWER_FORMATS = ("images", "parts", "markdown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one request, one client or all of them together may take."""

    body_bytes: int = 32 * 2**20
    """Of a request, refused before more than this is held in memory."""
    messages: int = 64
    """Messages, or input items, of a request."""
    images: int = 8
    """Images given in a request."""
    pixels: int = MAX_PIXELS
    """Of all images given in a request together, read from their headers."""
    characters: int = 200_000
    """Of all texts of a request together."""
    new_tokens: int = 4096
    new_images: int = 8
    """Images generated for one request, all candidates and all of its `n` counted."""
    output_pixels: int = 1024 * 1024
    """Of one generated image."""
    times_own_pixels: int = 16
    """Of one generated image, the pixels that the model makes by default so many times: attention takes their
    square, so that one image of 1024 by 1024 from a model of 64 by 64 would hold up everybody for minutes."""
    inference_steps: int = 250
    beams: int = 8
    seconds: float = 600.0
    """From the end of a request's body to the end of its answer, the time in the queue included."""
    header_seconds: float = 10.0
    """Until the headers of a request have come."""
    body_seconds: float = 10.0
    """Until a body has come, plus the time that it takes at `body_bytes_per_second`."""
    body_bytes_per_second: float = 32 * 2**10
    write_seconds: float = 30.0
    """That a client may leave what is sent to it unread."""
    connections: int = 1024
    requests: int = 512
    """Requests at once, queued ones included, whatever they ask for."""
    remote_seconds: float = 10.0
    """Of fetching one remote image, all redirects included."""
    remote_bytes: int = 16 * 2**20
    redirects: int = 3
    files_bytes: int = 256 * 2**20
    """Of images that wait at short addresses; the oldest go first."""
    file_seconds: float = 3600.0
    """How long such an address is good for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server."""

    model: str = "storyworld"
    """The name that clients ask for."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route; none: nothing is asked for."""
    public_url: str | None = None
    """Where clients reach the server, such as `https://pictures.example`; by default what they asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which the server may be asked for; none: any. A server without keys on one machine allows
    that machine's own names only, so that no web page reaches it through a name of its own."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may read answers; none by default."""
    remote_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from; none by default."""
    remote_ports: tuple[int, ...] = (80, 443)
    keep_alive_seconds: float = 15.0
    """Between two comments on a stream on which nothing happens."""
    limits: Limits = field(default_factory=Limits)

    @property
    def aliases(self) -> dict[str, str]:
        """The answer format of each name of the model."""
        named = {f"{self.model}:{answer_format}": answer_format for answer_format in ANSWER_FORMATS}
        return {self.model: ANSWER_FORMATS[0], **named}


def name_of(model: str) -> str:
    """The name by which clients ask for a model: of a folder or a hub id, what stands last."""
    return Path(model).name or model


def checked_url(url: str | None) -> str | None:
    """An address without query and without what ends an address in Markdown. Raises UsageError."""
    if url is None or (url.startswith(("http://", "https://")) and not set(url) & set(" '\"<>()?#\\")):
        return url
    raise UsageError(
        f"public_url: found {escape(url)!r}, expected an address such as https://pictures.example",
        field="public_url",
    )
