"""The application object: routes, and the layers around them. Plain ASGI, for uvicorn or Ray Serve.

CORS, if asked for -> Guard (ids, sizes, times, errors) -> Auth -> routes
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from mm_interleaved.serving.admission import Admission, ModelAdmission
from mm_interleaved.serving.api_schema import MAY_BE_MISSING, documented
from mm_interleaved.serving.auth import Auth
from mm_interleaved.serving.chat import complete_chat
from mm_interleaved.serving.chat_request import ChatRequest
from mm_interleaved.serving.content import Content
from mm_interleaved.serving.engine_protocol import Engine
from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.guard import Guard
from mm_interleaved.serving.images import generate_images
from mm_interleaved.serving.images_request import ImagesRequest
from mm_interleaved.serving.metrics import Metrics
from mm_interleaved.serving.remote_images import RemoteImages
from mm_interleaved.serving.responses import create_response
from mm_interleaved.serving.responses_request import ResponsesRequest
from mm_interleaved.serving.settings import ServerSettings
from mm_interleaved.serving.work import Services
from mm_interleaved.versions import __version__

Handler = Callable[[Services, Request], Awaitable[Response]]
POSTS: dict[str, tuple[Handler, type[BaseModel]]] = {
    "/v1/chat/completions": (complete_chat, ChatRequest),
    "/v1/responses": (create_response, ResponsesRequest),
    "/v1/images/generations": (generate_images, ImagesRequest),
}


def create_app(engine: Any, settings: ServerSettings, *, admission: Admission | None = None) -> FastAPI:
    """The server as an application.

    Args:
        engine: a `ServingEngine`, or what does the same; started and closed with the application.
        admission: what knows the model; by default the engine's own model.
    """
    files = FilesStore(settings.limits)
    metrics = Metrics(engine)
    services = Services(
        engine=engine,
        admission=admission or ModelAdmission(engine.generator),
        content=Content(settings, files, RemoteImages(settings)),
        files=files,
        metrics=metrics,
        settings=settings,
    )
    app = FastAPI(
        title="mm-interleaved",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(engine),
    )
    app.state.services, app.state.draining = services, False
    _add_generation(app, services)
    _add_reading(app, services)
    _add_errors(app)
    # The last one added is the outermost.
    app.add_middleware(Auth, settings=settings, files=files)
    app.add_middleware(Guard, limits=settings.limits, metrics=metrics)
    if settings.cors_origins:
        # Around what answers with errors: a page may read these too, or it shows nothing but a failure.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            # Any header of these pages: OpenAI's client for browsers sends a dozen of its own.
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return app


async def drain(app: FastAPI, grace: float) -> None:
    """Takes nothing new, and returns when what runs has finished, or after `grace` seconds."""
    app.state.draining = True
    await app.state.services.engine.drain(grace)


def _lifespan(engine: Engine) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if not engine.healthy:
            engine.start()
        yield
        engine.close()

    return lifespan


def _add_generation(app: FastAPI, services: Services) -> None:
    for path, (handler, model) in POSTS.items():
        app.add_api_route(path, _bound(handler, services), methods=["POST"], **documented(handler, model))


def _bound(handler: Handler, services: Services) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(services, request)

    return endpoint


def _add_reading(app: FastAPI, services: Services) -> None:
    settings, engine = services.settings, services.engine

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model by all its names; what stands behind the colon is the format of answers."""
        return {"object": "list", "data": [_model(name) for name in settings.aliases]}

    @app.get("/v1/models/{name:path}", responses=MAY_BE_MISSING)
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in settings.aliases:
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return _model(name)

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine runs."""
        return _state("ok" if engine.healthy or app.state.draining else "failed", is_good=engine.healthy)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken."""
        is_ready = engine.healthy and not app.state.draining
        return _state("ready" if is_ready else "draining", is_good=is_ready)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Measurements for Prometheus."""
        return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/files/{name}.png", responses=MAY_BE_MISSING)
    async def file(name: str) -> Response:
        """A generated image, for a while."""
        content = services.files.get(name)
        if content is None:
            raise ApiError(404, "there is no such file, or not any more", code="file_not_found")
        return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mm-interleaved"}


def _state(word: str, *, is_good: bool) -> Response:
    headers = {} if is_good else {"Retry-After": "5"}
    return JSONResponse({"status": word}, 200 if is_good else 503, headers)


def _add_errors(app: FastAPI) -> None:
    """What the framework refuses by itself, in the same shape as what we refuse."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException | HTTPException)
        message = {404: "there is no such address", 405: "this address does not take that method"}
        found = ApiError(error.status_code, message.get(error.status_code, "refused"), code="not_found")
        headers = dict(error.headers or {})
        return JSONResponse(found.body(request.scope["state"]["request_id"]), error.status_code, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        found = ApiError(400, "the address is not valid", code="invalid_value")
        return JSONResponse(found.body(request.scope["state"]["request_id"]), 400)

    app.add_exception_handler(StarletteHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
