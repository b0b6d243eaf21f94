"""Assembly: settings → store → worker → Starlette. `python app.py` serves; `app:app` is for any other ASGI server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import uvicorn
from peewee import Database, PeeweeException
from starlette.applications import Starlette
from starlette.middleware import Middleware

import settings
from assembly import database_of, quiet_gc, running, start_logging, worker_of
from hookline import lanes
from hookline.errors import HooklineError, visible
from hookline.store.failures import reason
from hookline.store.open import storage_of
from hookline.worker import heartbeat
from web import api, errors, middleware, operations
from web.access import Access
from web.protocol import Protocol, Server, listen
from web.services import Services

SHUTDOWN_TIMEOUT = 10  # seconds that open requests have to end


def create_app(config: settings.Settings) -> Starlette:
    """Assemble the service. Raises Unavailable, and Conflict while migrations of its database are pending."""
    db = database_of(config)
    storage = storage_of(db, config.database_pool)
    worker = worker_of(config, storage) if config.run_worker else None
    # Events are published to other processes' workers, until our own worker starts and attaches itself.
    lanes.attach(db, lanes.outlet_without_worker(config.max_payload, storage.notify))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with running(storage, worker):
            yield

    def worker_problem(db: Database) -> str | None:
        return heartbeat.problem(db) if worker is None else worker.problem()

    app = Starlette(
        routes=[*api.routes, *operations.routes],
        middleware=[
            Middleware(middleware.AnswerHeaders),
            Middleware(Access, api_keys=config.api_keys, allow_anonymous=config.allow_anonymous),
            Middleware(middleware.BodyLimit, max_body=config.max_body),
        ],
        exception_handlers=errors.exception_handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect has no body, and loses that of a POST
    app.state.services = Services(storage, config.allowed_networks, worker_problem)
    return app


@contextmanager
def or_exit() -> Iterator[None]:
    """Exit with status 1 and one line that says why the service cannot start."""
    try:
        yield
    except (settings.BadSetting, HooklineError, OSError) as exc:
        sys.exit(visible(f"Hookline cannot start: {exc}"))
    except PeeweeException as exc:
        sys.exit(visible(f"Hookline cannot start: the database refused: {reason(exc)}"))


def __getattr__(name: str) -> Any:
    """Make `app` when a server asks for it: importing this module does nothing."""
    if name == "app":
        with or_exit():
            return create_app(settings.load())
    raise AttributeError(name)


def main() -> None:
    with or_exit():
        config = settings.load()
        sockets = listen(config.host, config.port)
        config = replace(config, port=sockets[0].getsockname()[1])  # PORT may be 0
        app = create_app(config)
    quiet_gc()
    start_logging(config.log_level)
    serving = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=Protocol,
        ws="none",
        workers=1,
        log_level=config.log_level,
        log_config=None,  # its lines go through our formatter: they hold text that strangers sent
        access_log=config.log_level == "debug",
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=[str(network) for network in config.trusted_proxies],  # not $FORWARDED_ALLOW_IPS
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )
    with suppress(KeyboardInterrupt):
        Server(serving).run(sockets)


if __name__ == "__main__":
    main()
