"""What the routes need of the service, as one value; made at assembly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from hookline.egress.guard import Network
from hookline.store.storage import Storage


@dataclass(frozen=True)
class Services:
    storage: Storage
    allowed_networks: Sequence[Network]
    worker_problem: Callable[..., str | None]  # of the database: why nothing is delivered, None if it is


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def storage_of(request: Request) -> Storage:
    return services_of(request).storage
