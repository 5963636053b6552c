"""`serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.options import (
    AdapterFolder,
    ChannelsLast,
    Compile,
    Device,
    Dtype,
    Memory,
    Model,
    Quantization,
    checked_memory,
)
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.errors import UsageError
from mm_interleaved.generation.loading import Acceleration
from mm_interleaved.serving.keys import KEY_VARIABLE, read_keys

if TYPE_CHECKING:
    import socket

    from mm_interleaved.serving.engine_protocol import Engine
    from mm_interleaved.serving.settings import ServerSettings

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LIMITS = "Limits"

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help=f"Asked of clients; may be repeated. Others see it in the list of processes: {KEY_VARIABLE} or "
        "--api-key-file are safer.",
    ),
]
ApiKeyFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Keys, one a line.")]
PublicUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Where clients reach the server, for addresses of images.")
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host", metavar="NAME", help="A name that clients call the server by; may be repeated."
    ),
]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", metavar="ORIGIN", help="Web pages that may read answers; none by default."),
]
RemoteHosts = Annotated[
    list[str] | None,
    typer.Option("--image-host", metavar="HOST", help="Fetch images from this host; none by default."),
]
MaxRunning = Annotated[
    int, typer.Option(min=1, max=1024, help="Requests computed at once.", rich_help_panel=_LIMITS)
]
MaxQueue = Annotated[
    int, typer.Option(min=0, max=100_000, help="Requests that may wait beyond.", rich_help_panel=_LIMITS)
]
PrefixMegabytes = Annotated[
    int,
    typer.Option(
        min=0, help="Memory for the beginnings of conversations; 0 is none.", rich_help_panel=_LIMITS
    ),
]
MaxBodyMegabytes = Annotated[
    int, typer.Option(min=1, max=1024, help="Of one request.", rich_help_panel=_LIMITS)
]
MaxSeconds = Annotated[
    float, typer.Option(min=1, help="Of one request, its waiting included.", rich_help_panel=_LIMITS)
]
FileSeconds = Annotated[
    float,
    typer.Option(min=1, help="How long addresses of images are good for.", rich_help_panel=_LIMITS),
]
Grace = Annotated[
    float,
    typer.Option(min=0, help="Seconds for running requests to finish when stopped.", rich_help_panel=_LIMITS),
]


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Serving")(serve)


def serve(
    model: Model = "storyworld",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_keys: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    public_url: PublicUrl = None,
    allowed_hosts: AllowedHosts = None,
    cors_origins: CorsOrigins = None,
    image_hosts: RemoteHosts = None,
    max_running: MaxRunning = 8,
    max_queue: MaxQueue = 64,
    prefix_megabytes: PrefixMegabytes = 256,
    max_body_megabytes: MaxBodyMegabytes = 32,
    max_seconds: MaxSeconds = 600,
    file_seconds: FileSeconds = 3600,
    grace: Grace = 30,
    device: Device = "auto",
    dtype: Dtype = "auto",
    channels_last: ChannelsLast = False,
    compile: Compile = False,
    adapter: AdapterFolder = None,
    quantization: Quantization = None,
    memory: Memory = None,
):
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/responses, /v1/images/generations.

    Stops at Ctrl-C or SIGTERM: running requests finish within --grace, a second signal ends at once.
    """
    require_extra()
    from mm_interleaved.serving.http_server import listening_socket
    from mm_interleaved.serving.settings import Limits, ServerSettings, checked_url, name_of

    memory = checked_memory(memory)
    keys = read_keys(api_keys or (), api_key_file)
    settings = ServerSettings(
        model=name_of(model),
        api_keys=keys,
        public_url=checked_url(public_url),
        allowed_hosts=_allowed_hosts(host, allowed_hosts or (), has_keys=bool(keys)),
        cors_origins=tuple(cors_origins or ()),
        remote_hosts=_checked_hosts(image_hosts or ()),
        limits=Limits(body_bytes=max_body_megabytes * 2**20, seconds=max_seconds, file_seconds=file_seconds),
    )
    if not keys and host not in _LOOPBACK:
        say_error(f"{host} may be reached by others, and no key is asked for (--api-key-file)")
    # Before the model is read: who chose a port that is taken shall not wait for that.
    listening = listening_socket(host, port)
    logging.getLogger("mm_interleaved.serving").setLevel(logging.INFO)
    acceleration = Acceleration(
        channels_last=channels_last, compile=compile, adapter=adapter, quantization=quantization
    )
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.generation.fitting import load_fitting
    from mm_interleaved.serving.engine import ServingEngine

    with listening:
        generator = load_fitting(
            model,
            memory,
            device=device,
            dtype=dtype,
            acceleration=acceleration,
            most_at_once=max_running,
            load=load_quietly,
        )
        engine = ServingEngine(
            generator,
            max_running=max_running,
            max_queue=max_queue,
            prefix_bytes=prefix_megabytes * 2**20,
        )
        asyncio.run(_serve(engine, settings, listening, grace))


async def _serve(engine: Engine, settings: ServerSettings, listening: socket.socket, grace: float) -> None:
    from mm_interleaved.serving.app import create_app, drain
    from mm_interleaved.serving.http_server import server

    app = create_app(engine, settings)
    say(_welcome(settings, listening))
    await server(app, settings.limits, lambda: drain(app, grace)).serve([listening])


def _welcome(settings: ServerSettings, listening: socket.socket) -> str:
    """The address, and a first request to try."""
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}/v1"
    key = f" -H 'Authorization: Bearer {'$' + KEY_VARIABLE}'".replace("'", '"') if settings.api_keys else ""
    words = "A grey cat with a red crown waves in the middle. It is a snowy evening on the mountain."
    body = f'{{"messages": [{{"role": "user", "content": "{words}"}}], "modalities": ["image"]}}'
    return (
        f"{settings.model} at {url} (stop with Ctrl-C). Try it:\n"
        f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )


def require_extra() -> None:
    """Raises UsageError where what only a server needs is not installed."""
    try:
        import fastapi
        import httpcore2
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise UsageError(
            f"serve needs {error.name}: pip install 'mm-interleaved[serve]' installs what a server needs"
        ) from error
    del fastapi, httpcore2, prometheus_client, uvicorn


def _allowed_hosts(host: str, names: Sequence[str], *, has_keys: bool) -> tuple[str, ...]:
    """By which names the server may be called: on this machine and without keys, not by any web page's."""
    from mm_interleaved.serving.auth import LOCAL_NAMES

    if names or has_keys or host not in _LOOPBACK:
        return tuple(names)
    return LOCAL_NAMES


def _checked_hosts(names: Sequence[str]) -> tuple[str, ...]:
    from mm_interleaved.serving.remote_images import checked_hosts

    try:
        return checked_hosts(names)
    except ValueError as error:
        raise UsageError(f"image_host: {error}", field="image_host") from error
