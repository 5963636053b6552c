"""The server on Ray Serve: the same application object in several replicas, each with a model of its own.

    serve run mm_interleaved.serving.ray:app model=storyworld num_replicas=2

Names and meanings of the settings are those of the command `serve`; each replica has a queue, a prefix cache
and addresses of images of its own. Needs mm-interleaved[ray].
"""

# No postponed annotations: `serve run` reads the type of `app`'s argument off its signature.
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from mm_interleaved.generation.fitting import load_fitting
from mm_interleaved.generation.loading import Acceleration
from mm_interleaved.serving.app import create_app
from mm_interleaved.serving.engine import ServingEngine
from mm_interleaved.serving.keys import read_keys
from mm_interleaved.serving.settings import ServerSettings, checked_url, name_of

_BESIDE = 16
"""Requests beyond those that run and wait: for models, health and metrics, and to be told of a full queue."""


class ReplicaSettings(BaseModel):
    """What `serve run` may be told, as `name=value`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "storyworld"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    memory: str | None = None
    api_key_file: Path | None = None
    """Keys, one a line; beside what the environment variable of the command names."""
    public_url: str | None = None
    max_running: int = Field(default=8, ge=1)
    max_queue: int = Field(default=64, ge=0)
    prefix_megabytes: int = Field(default=256, ge=0)
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    """Of each replica."""
    num_gpus: float = Field(default=0, ge=0)
    """Of each replica; a part of one is shared with others."""


@serve.deployment
@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Replica:
    """One copy of the server."""

    def __init__(self, settings: ReplicaSettings):
        generator = load_fitting(
            settings.model,
            settings.memory,
            device=settings.device,
            dtype=settings.dtype,
            acceleration=Acceleration(quantization=settings.quantization),
            most_at_once=settings.max_running,
        )
        self.engine = ServingEngine(
            generator,
            max_running=settings.max_running,
            max_queue=settings.max_queue,
            prefix_bytes=settings.prefix_megabytes * 2**20,
        )
        self.settings = ServerSettings(
            model=name_of(settings.model),
            api_keys=read_keys((), settings.api_key_file),
            public_url=checked_url(settings.public_url),
        )

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.engine, self.settings)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that fails."""
        if not self.engine.healthy:
            raise RuntimeError("the engine has stopped")


def app(settings: ReplicaSettings) -> serve.Application:
    """The application, as `serve run` and configuration files name it."""
    # What the decorators return is typed as a function.
    replica: Any = Replica
    deployment = replica.options(
        num_replicas=settings.num_replicas,
        max_ongoing_requests=settings.max_running + settings.max_queue + _BESIDE,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    return deployment.bind(settings)
