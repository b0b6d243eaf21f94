"""The routes of /api/v1: each handler parses, makes one call into the domain, and renders."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hookline.storage import Storage
from hookline.webhooks import Registration, WebhookManager, generate_secret
from web import schemas
from web.schemas import Json


def storage_of(request: Request) -> Storage:
    return cast(Storage, request.app.state.storage)


def manager_of(request: Request) -> WebhookManager:
    return cast(WebhookManager, request.app.state.manager)


async def parsed(request: Request, model: type[schemas.M], *, empty: bytes = b"") -> schemas.M:
    content_type = request.headers.get("content-type")
    body = await request.body()
    if body and not schemas.is_json(content_type):
        raise HTTPException(415, "Send JSON, with the header  Content-Type: application/json")
    return schemas.body_of(model, content_type, body or empty)


# The three endpoints of the replaced service.


async def register(request: Request) -> Response:
    # Another content type is a 422 here, as it was, and a 415 on the new routes.
    new = schemas.body_of(schemas.Registration, request.headers.get("content-type"), await request.body())
    url = str(new.url)
    registration = Registration(url, new.events, new.secret, new.team)
    webhook_id = await storage_of(request).write_together(manager_of(request).register_all, registration)
    shown = {"webhook_id": webhook_id, "url": url, "events": new.events, "team": new.team}
    return Json({**shown, "message": "Webhook registered successfully"}, 201)


async def list_all(request: Request) -> Response:
    return Json({"webhooks": await storage_of(request).scan(manager_of(request).get_all)})


async def delete(request: Request) -> Response:
    found = await storage_of(request).write(manager_of(request).unregister, request.path_params["webhook_id"])
    if not found:
        return Json({"detail": "Webhook not found"}, 404)
    return Response(status_code=204, media_type="application/json")


async def create(request: Request) -> Response:
    new = await parsed(request, schemas.NewWebhook)
    secret = new.secret or generate_secret()
    registration = Registration(str(new.url), new.events, secret, new.team, new.description, new.headers)
    storage = storage_of(request)
    webhook_id = await storage.write_together(manager_of(request).register_all, registration)
    shown = await storage.read(manager_of(request).get, webhook_id)
    if new.secret is None:
        shown["secret"] = secret
    return Json(shown, 201, {"Location": f"/api/v1/webhooks/{webhook_id}"})


async def page(request: Request) -> Response:
    query = schemas.query_of(schemas.Listing, request.query_params)
    look_up = partial(
        manager_of(request).list,
        team=query.team,
        event=query.event,
        enabled=query.enabled,
        limit=query.limit + 1,
        after=query.cursor,
    )
    found = await storage_of(request).scan(look_up)
    more = len(found) > query.limit
    cursor = schemas.cursor_after(found[query.limit - 1]) if more else None
    return Json({"data": found[: query.limit], "next_cursor": cursor})


async def get(request: Request) -> Response:
    found = await storage_of(request).read(manager_of(request).get, request.path_params["webhook_id"])
    return Json(found)


async def update(request: Request) -> Response:
    changes = await parsed(request, schemas.WebhookChanges)
    webhook_id = request.path_params["webhook_id"]
    found = await storage_of(request).write(manager_of(request).update, webhook_id, changes.given())
    return Json(found)


async def rotate_secret(request: Request) -> Response:
    wanted = await parsed(request, schemas.Rotation, empty=b"{}")
    secret = wanted.secret or generate_secret()
    webhook_id = request.path_params["webhook_id"]
    expires = await storage_of(request).write(manager_of(request).rotate, webhook_id, secret, wanted.overlap_seconds)
    shown: dict[str, Any] = {"webhook_id": webhook_id, "previous_secret_expires_at": expires}
    if wanted.secret is None:
        shown["secret"] = secret
    return Json(shown)


class WebhookId(Convertor[str]):
    """Any segment but the names of the two routes beside it, which must answer 405 to other methods."""

    regex = "(?!(?:register|list)$)[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("webhook", WebhookId())

routes: list[BaseRoute] = [  # the busiest first: they are tried in order
    Route("/api/v1/webhooks/register", register, methods=["POST"]),
    Route("/api/v1/webhooks/{webhook_id:webhook}", get, methods=["GET"]),
    Route("/api/v1/webhooks/{webhook_id:webhook}", update, methods=["PATCH"]),
    Route("/api/v1/webhooks/{webhook_id:webhook}", delete, methods=["DELETE"]),
    Route("/api/v1/webhooks", create, methods=["POST"]),
    Route("/api/v1/webhooks", page, methods=["GET"]),
    Route("/api/v1/webhooks/list", list_all, methods=["GET"]),
    Route("/api/v1/webhooks/{webhook_id:webhook}/rotate-secret", rotate_secret, methods=["POST"]),
]
