"""Services: all that the routes need of the rest, as one value that assembly makes."""

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
    worker_problem: Callable[..., str | None]  # takes the database; the reason why no worker delivers, None if one does


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def storage_of(request: Request) -> Storage:
    return services_of(request).storage
