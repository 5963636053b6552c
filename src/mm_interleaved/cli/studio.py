"""`studio`: a web page for documents of texts and images, written part by part with a model."""

from __future__ import annotations

import asyncio
import logging
import os
from importlib.util import find_spec
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
    Model,
    Quantization,
)
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.errors import UsageError
from mm_interleaved.files import locked_folder, make_folder
from mm_interleaved.generation.loading import Acceleration

if TYPE_CHECKING:
    import socket

    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.serving.engine_protocol import Engine
    from mm_interleaved.serving.settings import ServerSettings
    from mm_interleaved.studio.studio import Studio

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Sessions = Annotated[
    Path,
    typer.Option(
        "-o",
        "--sessions",
        metavar="DIR",
        help="Where sessions are saved, a folder each.",
        callback=folder_to_write,
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host", metavar="NAME", help="A name that browsers call the studio by; may be repeated."
    ),
]
MaxRunning = Annotated[int, typer.Option(min=1, max=1024, help="Sessions the model works for at once.")]
MaxQueue = Annotated[int, typer.Option(min=1, max=10_000, help="Sessions that may wait beyond.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")]


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Serving")(studio)


def studio(
    model: Model = "storyworld",
    sessions: Sessions = Path("out/studio"),
    host: Host = "127.0.0.1",
    port: Port = 7860,
    allowed_hosts: AllowedHosts = None,
    max_running: MaxRunning = 4,
    max_queue: MaxQueue = 16,
    open: Open = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    channels_last: ChannelsLast = False,
    compile: Compile = False,
    adapter: AdapterFolder = None,
    quantization: Quantization = None,
):
    """A web page on which a document of texts and images is written with a model, any part again at any time.

    Sessions are saved as they are written; `generate DIR/NAME/session.json` continues one. Stops at Ctrl-C.
    """
    require_extra()
    from mm_interleaved.serving.auth import LOCAL_NAMES
    from mm_interleaved.serving.http_server import listening_socket
    from mm_interleaved.serving.settings import ServerSettings

    is_local = host in _LOOPBACK
    names = tuple(allowed_hosts or ()) or (LOCAL_NAMES if is_local else ())
    settings = ServerSettings(model=model, allowed_hosts=names)
    if not is_local:
        say_error(f"{host} may be reached by others, who see all sessions and may change them")
    make_folder(sessions)
    logging.getLogger("mm_interleaved.studio").setLevel(logging.INFO)
    acceleration = Acceleration(
        channels_last=channels_last, compile=compile, adapter=adapter, quantization=quantization
    )
    # Before the model is read: who chose a port or a folder that is taken shall not wait for that.
    with listening_socket(host, port) as listening, locked_folder(sessions):
        from mm_interleaved.cli.process import load_quietly
        from mm_interleaved.serving.engine import ServingEngine

        generator = load_quietly(model, device=device, dtype=dtype, acceleration=acceleration)
        engine = ServingEngine(generator, max_running=2 * max_running, max_queue=max_queue)
        name = model if model == "storyworld" else Path(model).name or model
        made = _studio(generator, engine, name, sessions, settings)
        asyncio.run(_serve(made, settings, listening, max_running, max_queue, opens=open))


def _studio(
    generator: InterleavedGenerator, engine: Engine, name: str, sessions: Path, settings: ServerSettings
) -> Studio:
    from mm_interleaved.generation.defaults import defaults_of
    from mm_interleaved.generation.image_settings import image_size
    from mm_interleaved.generation.settings import GenerationSettings
    from mm_interleaved.studio.studio import Model as StudioModel
    from mm_interleaved.studio.studio import Studio

    defaults = defaults_of(generator.model)
    return Studio(
        engine,
        StudioModel(
            name,
            generator.processor,
            defaults,
            image_size(generator.model, GenerationSettings.combine(defaults), None),
            generator.model.config.text_config.max_position_embeddings,
            explain=generator.explain,
        ),
        sessions,
        settings.limits,
    )


async def _serve(
    made: Studio,
    settings: ServerSettings,
    listening: socket.socket,
    max_running: int,
    max_queue: int,
    *,
    opens: bool,
) -> None:
    from mm_interleaved.serving.http_server import server
    from mm_interleaved.studio.app import create_app

    app = create_app(made, settings, max_running=max_running, max_queue=max_queue)
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}/"
    say(f"the studio with {made.model.name}: {url} (stop with Ctrl-C; sessions in {made.shelf.folder})")
    if opens:
        import webbrowser

        webbrowser.open(url)
    await server(app, settings.limits, made.close).serve([listening])


def require_extra() -> None:
    """Raises UsageError where what only the studio needs is not installed."""
    # Read when Gradio is imported: nothing is told to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("gradio", "fastapi", "prometheus_client", "uvicorn", "httpcore2"):
        if find_spec(name) is None:
            raise UsageError(
                f"studio needs {name}: pip install 'mm-interleaved[studio]' installs what it needs"
            )
