"""The routes of /api/v1: each handler parses, makes one call into the domain, and renders."""

from __future__ import annotations

import logging
from datetime import datetime
from functools import partial
from typing import Any, cast

from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hookline import deliveries, egress, events, history, missed, replays
from hookline.errors import NotFound, Unavailable
from hookline.registration import Registration, generate_secret
from hookline.storage import Storage
from hookline.webhooks import WebhookManager
from web import schemas
from web.schemas import Json

log = logging.getLogger("hookline")


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
    for warning in warnings(request, url):  # the answer's form is fixed
        log.warning("webhook %s: %s", webhook_id, warning)
    shown = {"webhook_id": webhook_id, "url": url, "events": new.events, "team": new.team}
    return Json({**shown, "message": "Webhook registered successfully"}, 201)


def warnings(request: Request, url: str) -> list[str]:
    """What the egress guard will say to this URL, as far as that can be told from its host alone."""
    refusal = egress.literal_refusal(url, request.app.state.allowed_networks)
    return [f"it will not be delivered to: {refusal}"] if refusal else []


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
    shown["warnings"] = warnings(request, shown["url"])
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
    return paged(await storage_of(request).scan(look_up), query.limit, "created_at", "webhook_id")


def paged(found: list[dict[str, Any]], limit: int, *order: str) -> Response:
    """A page of rows, of which one more than `limit` was asked for, to see whether there is another page."""
    cursor = schemas.cursor_after(found[limit - 1], *order) if len(found) > limit else None
    return Json({"data": found[:limit], "next_cursor": cursor})


async def get(request: Request) -> Response:
    found = await storage_of(request).read(manager_of(request).get, request.path_params["webhook_id"])
    return Json(found)


async def update(request: Request) -> Response:
    changes = await parsed(request, schemas.WebhookChanges)
    webhook_id = request.path_params["webhook_id"]
    storage = storage_of(request)
    found, began = await storage.write(manager_of(request).change, webhook_id, changes.given())
    if began is not None:
        found["replay"] = await missed_by(storage, webhook_id, began)
    return Json({**found, "warnings": warnings(request, found["url"])})


async def missed_by(storage: Storage, webhook_id: str, began: datetime) -> dict[str, Any]:
    """What a replay would bring back, counted after the change is stored: so a failure is no failure of the change."""
    try:
        return await storage.scan(missed.since, storage.db, webhook_id, began)
    except (NotFound, Unavailable) as exc:
        log.warning("webhook %s: what it missed could not be counted: %s", webhook_id, exc)
        return {"since": began, "deliveries": 0, "more": True}


async def rotate_secret(request: Request) -> Response:
    wanted = await parsed(request, schemas.Rotation, empty=b"{}")
    secret = wanted.secret or generate_secret()
    webhook_id = request.path_params["webhook_id"]
    expires = await storage_of(request).write(manager_of(request).rotate, webhook_id, secret, wanted.overlap_seconds)
    shown: dict[str, Any] = {"webhook_id": webhook_id, "previous_secret_expires_at": expires}
    if wanted.secret is None:
        shown["secret"] = secret
    return Json(shown)


async def send_test(request: Request) -> Response:
    published = await storage_of(request).write(manager_of(request).send_test, request.path_params["webhook_id"])
    return Json(published._asdict(), 202)


# Replays


async def replay(request: Request) -> Response:
    wanted = await parsed(request, schemas.Replay)
    webhook_id, storage = request.path_params["webhook_id"], storage_of(request)
    arguments = (storage.db, webhook_id, wanted.since, wanted.until, wanted.status)
    if wanted.dry_run:
        counted = await storage.scan(missed.count, *arguments)
        return Json({"webhook_id": webhook_id, **counted, "dry_run": True})
    started = await storage.write(replays.start, *arguments)
    return Json(started, 202, {"Location": f"/api/v1/replays/{started['replay_id']}"})


async def list_replays(request: Request) -> Response:
    query = schemas.query_of(schemas.ReplayListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(
        replays.page, webhook_id=query.webhook_id, state=query.state, limit=query.limit + 1, before=query.cursor
    )
    return paged(await storage.scan(look_up, storage.db), query.limit, "replay_id")


async def get_replay(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.read(replays.get, storage.db, request.path_params["replay_id"]))


async def cancel_replay(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.write(replays.cancel, storage.db, request.path_params["replay_id"]))


# Events


async def publish(request: Request) -> Response:
    new = await parsed(request, schemas.NewEvent)
    key = new.idempotency_key or request.headers.get("idempotency-key")
    storage = storage_of(request)
    event = events.NewEvent(new.event_type, new.data, key)
    published = await storage.write_together(request.app.state.publish_all, event)
    return Json(published._asdict(), 202)


async def list_events(request: Request) -> Response:
    query = schemas.query_of(schemas.EventListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(history.page, event_type=query.event_type, limit=query.limit + 1, before=query.cursor)
    return paged(await storage.scan(look_up, storage.db), query.limit, "created_at", "event_id")


async def get_event(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.scan(history.get, storage.db, request.path_params["event_id"]))


async def explain(request: Request) -> Response:
    query = schemas.query_of(schemas.Explaining, request.query_params)
    storage = storage_of(request)
    look_up = partial(history.explain, limit=query.limit + 1, after=query.cursor)
    return paged(await storage.scan(look_up, storage.db, request.path_params["event_id"]), query.limit, "webhook_id")


# Deliveries


async def list_deliveries(request: Request) -> Response:
    query = schemas.query_of(schemas.DeliveryListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(
        deliveries.page,
        webhook_id=query.webhook_id,
        event_id=query.event_id,
        status=query.status,
        limit=query.limit + 1,
        before=query.cursor,
    )
    return paged(await storage.scan(look_up, storage.db), query.limit, "delivery_id")


def delivery_id_of(request: Request) -> int:
    text = request.path_params["delivery_id"]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise NotFound("Delivery not found")
    return int(text)


async def get_delivery(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.scan(deliveries.get, storage.db, delivery_id_of(request)))


async def retry_delivery(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.write(deliveries.retry, storage.db, delivery_id_of(request)))


async def cancel_delivery(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.write(deliveries.cancel, storage.db, delivery_id_of(request)))


class Id(Convertor[str]):
    """Any segment that could be an id: the databases do not agree on NUL."""

    regex = r"[^/\x00]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class WebhookId(Id):
    """Nor the names of the two routes beside it, which must answer 405 to other methods."""

    regex = rf"(?!(?:register|list)$){Id.regex}"


register_url_convertor("id", Id())
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
    Route("/api/v1/webhooks/{webhook_id:webhook}/test", send_test, methods=["POST"]),
    Route("/api/v1/webhooks/{webhook_id:webhook}/replay", replay, methods=["POST"]),
    Route("/api/v1/replays", list_replays, methods=["GET"]),
    Route("/api/v1/replays/{replay_id:id}", get_replay, methods=["GET"]),
    Route("/api/v1/replays/{replay_id:id}/cancel", cancel_replay, methods=["POST"]),
    Route("/api/v1/events", publish, methods=["POST"]),
    Route("/api/v1/events", list_events, methods=["GET"]),
    Route("/api/v1/events/{event_id:id}", get_event, methods=["GET"]),
    Route("/api/v1/events/{event_id:id}/explain", explain, methods=["GET"]),
    Route("/api/v1/deliveries", list_deliveries, methods=["GET"]),
    Route("/api/v1/deliveries/{delivery_id}", get_delivery, methods=["GET"]),
    Route("/api/v1/deliveries/{delivery_id}/retry", retry_delivery, methods=["POST"]),
    Route("/api/v1/deliveries/{delivery_id}/cancel", cancel_delivery, methods=["POST"]),
]
