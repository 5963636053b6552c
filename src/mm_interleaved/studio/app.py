"""The studio as an application: Gradio's queue carries the model's work, our own routes and page the rest.

Guard (sizes, times, errors) -> Auth (names of this machine) -> Gate (what is open) -> routes, Gradio

Of Gradio only the two addresses are open that start one function of ours and listen to it: none that reads
files, takes uploads, or fetches what somebody names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mm_interleaved.documents.images import MAX_FILE_BYTES
from mm_interleaved.documents.strict_json import parse_strict
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.serving.auth import Auth
from mm_interleaved.serving.errors import ApiError, api_error
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.guard import Guard
from mm_interleaved.serving.metrics import Metrics
from mm_interleaved.serving.settings import ServerSettings
from mm_interleaved.studio.studio import StaleError, Studio

logger = logging.getLogger(__name__)

GRADIO = "/gradio"
GENERATE = f"{GRADIO}/gradio_api/call/generate"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OWN = b"x-studio"
"""A header of our page's requests: pages of others cannot send it without asking first, and are not heard."""


class Gate:
    """An ASGI application around another one: what of Gradio is open, and who may change anything."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, method = scope["path"], scope["method"]
            if path.startswith(GRADIO) and not _is_open(method, path):
                raise ApiError(404, "there is no such address", code="not_found")
            if method not in ("GET", "HEAD") and OWN not in dict(scope["headers"]):
                raise ApiError(403, "X-Studio: expected this header, which the studio's own page sends")
        await self._app(scope, receive, send)


def _is_open(method: str, path: str) -> bool:
    if method == "POST":
        return path == GENERATE
    rest = path.removeprefix(f"{GENERATE}/")
    return method == "GET" and rest != path and rest.isalnum()


def create_app(studio: Studio, settings: ServerSettings, *, max_running: int, max_queue: int) -> FastAPI:
    """The application, for uvicorn.

    Args:
        settings: its limits and the names that it goes by.
        max_running: sessions that the model works for at once.
        max_queue: those that may wait beyond.
    """
    app = FastAPI(
        title="mm-interleaved studio",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan(studio),
    )
    _add_page(app, studio)
    _add_sessions(app, studio)
    _add_files(app, studio)
    app.add_exception_handler(HTTPException, _refused)
    app = _with_gradio(app, studio, max_running, max_queue)
    app.add_middleware(Gate)
    app.add_middleware(Auth, settings=settings, files=FilesStore(settings.limits))
    app.add_middleware(Guard, limits=settings.limits, metrics=Metrics(studio.engine))
    return app


def _with_gradio(app: FastAPI, studio: Studio, max_running: int, max_queue: int) -> FastAPI:
    """The application with Gradio's queue in it, which has one function."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    async def generate(session: str, revision: int, ask: dict) -> AsyncGenerator[dict, None]:  # type: ignore[type-arg]
        try:
            async for message in studio.generate(session, revision, ask):
                yield message
        except MMInterleavedError as error:
            yield {"type": "refused", "message": str(error), "code": error.code}
        except Exception:
            logger.exception("the studio failed")
            yield {"type": "refused", "message": "something went wrong inside; the log has more", "code": ""}

    with gradio.Blocks(analytics_enabled=False, title="mm-interleaved studio") as blocks:
        gradio.api(generate, api_name="generate", concurrency_limit=max_running)
    blocks.queue(max_size=max_queue or None)
    return gradio.mount_gradio_app(
        app,
        blocks,
        path=GRADIO,
        allowed_paths=[],
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
    )


def _add_page(app: FastAPI, studio: Studio) -> None:
    page = files("mm_interleaved.studio") / "page"
    found = {file.name: file.read_bytes() for file in page.iterdir() if file.is_file()}

    def static(name: str) -> Response:
        kind = TYPES.get(name[name.rfind(".") :])
        if kind is None or name not in found:
            raise HTTPException(404)
        headers = {
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
        }
        return Response(found[name], media_type=f"{kind}; charset=utf-8", headers=headers)

    @app.get("/")
    async def index() -> Response:
        return static("index.html")

    @app.get("/page/{name}")
    async def asset(name: str) -> Response:
        return static(name)

    @app.get("/model")
    async def model() -> Response:
        return JSONResponse(studio.model.record())

    @app.get("/health")
    async def health() -> Response:
        is_good = studio.engine.healthy
        return JSONResponse({"status": "ok" if is_good else "failed"}, 200 if is_good else 503)


def _add_sessions(app: FastAPI, studio: Studio) -> None:
    """Reading and decoding happen in FastAPI's threads (`def`), changes in the event loop."""

    @app.get("/sessions")
    def sessions() -> Response:
        return JSONResponse(studio.shelf.list())

    @app.post("/sessions")
    async def new() -> Response:
        return JSONResponse(studio.view(studio.shelf.new()))

    @app.post("/import")
    async def take_in(request: Request) -> Response:
        return JSONResponse(studio.view(studio.shelf.take_in(await request.body())))

    @app.get("/sessions/{name}")
    async def session(name: str) -> Response:
        return JSONResponse(studio.view(studio.shelf.open(name)))

    @app.post("/sessions/{name}")
    async def act(name: str, request: Request) -> Response:
        return JSONResponse(await studio.act(name, await _json_of(request)))

    @app.post("/sessions/{name}/stop")
    async def stop(name: str) -> Response:
        studio.stop(name)
        return JSONResponse({})

    @app.post("/pictures")
    async def upload(request: Request) -> Response:
        data = await request.body()
        if len(data) > MAX_FILE_BYTES:
            raise ApiError(413, f"the picture has {len(data)} bytes, expected at most {MAX_FILE_BYTES}")
        return JSONResponse(studio.upload(data))

    @app.get("/pictures/{name}/{node}.png")
    def picture(name: str, node: int) -> Response:
        headers = {"Cache-Control": "private, max-age=86400", "Content-Security-Policy": "default-src 'none'"}
        return Response(studio.picture(name, node), media_type="image/png", headers=headers)

    @app.exception_handler(MMInterleavedError)
    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, MMInterleavedError)
        found = api_error(error)
        status = 409 if isinstance(error, StaleError) else found.status
        message = str(error) if status == 409 else str(found)
        return JSONResponse({"error": {"message": message, "code": error.code}}, status)

    del sessions, new, take_in, session, act, stop, upload, picture, told


def _add_files(app: FastAPI, studio: Studio) -> None:
    """What is made out of a session, in FastAPI's threads."""

    @app.get("/sessions/{name}/looked")
    def looked(name: str) -> Response:
        # The page has a script of its own, and may do nothing else with it: not even see this address.
        policy = "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        headers = {"Content-Security-Policy": f"{policy}script-src 'unsafe-inline'"}
        return Response(studio.looked(name), media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/sessions/{name}/export/{form}")
    def export(name: str, form: str) -> Response:
        done = studio.export(name, form)
        headers = {
            "Content-Disposition": f'attachment; filename="{done.name}"',
            "Content-Security-Policy": "sandbox; default-src 'none'",
        }
        return Response(done.data, media_type=done.kind, headers=headers)

    del looked, export


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "there is no such address" if error.status_code in (404, 405) else "refused"
    return JSONResponse({"error": {"message": message, "code": "not_found"}}, error.status_code)


async def _json_of(request: Request) -> Mapping[str, Any]:
    body = await request.body()
    try:
        found = parse_strict(body.decode("utf-8"), "body")
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body: expected an object")
    return found


def _lifespan(studio: Studio) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if not studio.engine.healthy:
            studio.engine.start()
        yield
        studio.engine.close()

    return lifespan
