"""Ray Serve: the server as replicas that Ray starts, counts by the load, and puts its own HTTP in front of.

serve run app.scale.serving:build model=jxm/cde-small-v2
serve run config/ray-serve.yaml
"""

import asyncio
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ConfigError
from app.main import create_app
from app.settings import Settings
from app.settings_sources import load_settings
from app.telemetry.logs import configure_logging

POLL_SECONDS = 0.2
MAX_ONGOING_REQUESTS = 1024
"""So many that the server's own queue decides, which knows what a request costs and whose turn it is."""


class ServeArgs(BaseModel):
    """What `build` takes, from the command line or `args` of a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Hub id, folder, or builtin/minilm-context; else the settings' models")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] | None = None
    device: str | None = None
    config: Path | None = Field(None, description="Settings file (TOML), on the machine that builds the application")
    settings: dict[str, Any] = Field({}, description="Overrides of settings, nested as in the settings file")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(4.0, gt=0, description="Of one replica; more of them start more replicas")
    num_cpus: int = Field(1, ge=1, description="Cores of one replica, and on a CPU its workers")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of one replica; absent: what its devices say")
    drain_seconds: float = Field(60.0, gt=0, description="What a replica that is stopped has to answer what it took")


def build(args: ServeArgs) -> Application:
    """The application for `serve run`. Raises ConfigError."""
    settings = _settings(args)

    def replica_app() -> ASGIApp:
        return ReplicaApp(settings)

    deployment = serve.deployment(
        serve.ingress(replica_app)(Replica),
        name="cde-server",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
        },
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": gpus(args, settings)},
        graceful_shutdown_timeout_s=args.drain_seconds,
    )
    return deployment.bind()


class ReplicaApp:
    """The server's ASGI application, and whether it is ready."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError."""
        configure_logging(settings.server.log_level, settings.server.log_format)
        self._failures: list[Exception] = []
        self._started = False
        self._app = create_app(settings, on_failure=self._failures.append)
        self._transport = httpx.ASGITransport(app=self._app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ray's HTTP names every request in x-request-id, and its answer once more: the server's own header goes."""

        async def unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, unnamed)

    async def check_ready(self) -> None:
        """Raises what kept the start-up from finishing, NotReady's message as RuntimeError."""
        async with httpx.AsyncClient(transport=self._transport, base_url="http://replica") as http:
            ready = await http.get("/ready")
            while not (ready.is_success or self._started or self._failures):
                await asyncio.sleep(POLL_SECONDS)
                ready = await http.get("/ready")
        if self._failures:
            raise self._failures[0]
        self._started = True
        if not ready.is_success:
            raise RuntimeError(ready.json()["error"]["message"])


class Replica:
    """What Ray asks of a replica besides HTTP. Its end is the ASGI lifespan's, which drains the engine."""

    app: ReplicaApp  # by serve.ingress

    async def check_health(self) -> None:
        """First called before a replica gets requests: it waits until the models are loaded. Later a failure three
        times in a row has Ray start another replica in its place."""
        await self.app.check_ready()


def _settings(args: ServeArgs) -> Settings:
    options = {"dtype": args.dtype, "device": args.device}
    given = {key: value for key, value in options.items() if value is not None}
    overrides = dict(args.settings)
    if args.model is not None:
        overrides["models"] = [{"name": args.model, **given}]
    elif given:
        raise ConfigError(f"{next(iter(given))} is about model: name it too, or use the settings")
    settings = load_settings(overrides, args.config)
    if args.max_replicas > 1 and settings.contexts.database_url is None:
        raise ConfigError(
            "Several replicas share contexts through PostgreSQL: set contexts.database_url, or max_replicas = 1"
        )
    if not settings.engine.workers and not gpus(args, settings):
        workers = settings.engine.model_copy(update={"workers": args.num_cpus})
        settings = settings.model_copy(update={"engine": workers})
    return Settings.model_validate(settings.model_dump())  # of a class that a replica can import


def gpus(args: ServeArgs, settings: Settings) -> float:
    """A replica's own: on all `engine.devices`, or on one where a model names CUDA."""
    if args.num_gpus is not None:
        return args.num_gpus
    on_cuda = any(model.device.startswith("cuda") for model in settings.models)
    return float(len(settings.engine.devices) or on_cuda)
