"""How the application is served: uvicorn, with the settings' limits on every connection."""

import logging
import resource
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from app.api.protocol import SPARE_CONNECTIONS, GuardedProtocol
from app.settings import LimitSettings, Settings

log = logging.getLogger(__name__)

OTHER_FILES = 256
"""Open files that are no connections: the store's, the models', uploads on their way."""


def server_config(app: ASGIApp, settings: Settings, **more: Any) -> uvicorn.Config:
    """`more`: what is the caller's to decide."""

    class Protocol(GuardedProtocol):
        limits = settings.limits

    return uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.limits.idle_seconds,
        **more,
    )


def allow_files(limits: LimitSettings) -> None:
    """Raises the process's limit of open files to what the connections need, as far as it may."""
    wanted = limits.max_connections + SPARE_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("%d open files are allowed, limits.max_connections needs %d: raise ulimit -n", most, wanted)
