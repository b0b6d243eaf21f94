"""Routes of /api/v1: each handler parses, makes one call into the domain, and renders."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Any, cast

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hookline import deliveries, events, history, legacy, missed, removal, replays, webhooks
from hookline.errors import NotFound, Unavailable
from hookline.registration import Registration, generate_secret
from hookline.registration_warnings import warnings_of
from hookline.store.storage import Storage
from web import cursors, schemas
from web.parsing import body_of, legacy_body_of, query_of
from web.schemas import Json
from web.services import services_of, storage_of

log = logging.getLogger("hookline")

Handler = Callable[[Request], Awaitable[Response]]


# The three endpoints of the replaced service


async def register(request: Request) -> Response:
    body = await legacy_body_of(request, schemas.RegistrationBody)
    registration = Registration(str(body.url), body.events, body.secret, body.team)
    webhook_id = await storage_of(request).write_together(webhooks.register_all, registration)
    for warning in warnings_for(request, registration.url, body.events):  # the answer's form has no room for them
        log.warning("webhook %s: %s", webhook_id, warning)
    shown = {"webhook_id": webhook_id, "url": registration.url, "events": body.events, "team": body.team}
    return Json({**shown, "message": "Webhook registered successfully"}, 201)


async def list_all(request: Request) -> Response:
    return Json({"webhooks": await storage_of(request).scan(legacy.everything)})


async def delete_webhook(request: Request) -> Response:
    storage, webhook_id = storage_of(request), request.path_params["webhook_id"]
    await removal.delete_deliveries_beside(storage, webhook_id)
    if not await storage.write(webhooks.unregister, webhook_id):
        return Json({"detail": "Webhook not found"}, 404)
    return Response(status_code=204, media_type="application/json")


# Webhooks


async def create_webhook(request: Request) -> Response:
    body = await body_of(request, schemas.WebhookBody)
    secret = body.secret or generate_secret()
    registration = Registration(str(body.url), body.events, secret, body.team, body.description, body.headers)
    shown = await storage_of(request).write_together(webhooks.create_all, registration)
    if body.secret is None:
        shown["secret"] = secret
    shown["warnings"] = warnings_for(request, shown["url"], shown["events"])
    return Json(shown, 201, {"Location": f"/api/v1/webhooks/{shown['webhook_id']}"})


async def list_webhooks(request: Request) -> Response:
    query = query_of(request, schemas.WebhooksQuery)
    look_up = partial(
        webhooks.page,
        team=query.team,
        event=query.event,
        enabled=query.enabled,
        limit=query.limit + 1,
        after=query.cursor,
    )
    return paged(await storage_of(request).scan(look_up), query.limit, "created_at", "webhook_id")


async def get_webhook(request: Request) -> Response:
    return Json(await storage_of(request).read(webhooks.get, request.path_params["webhook_id"]))


async def update_webhook(request: Request) -> Response:
    body = await body_of(request, schemas.WebhookChangesBody)
    storage, webhook_id = storage_of(request), request.path_params["webhook_id"]
    shown, failing_since = await storage.write(webhooks.change, webhook_id, body.changes())
    if failing_since is not None:
        shown["replay"] = await missed_since(storage, webhook_id, failing_since)
    return Json({**shown, "warnings": warnings_for(request, shown["url"], shown["events"])})


async def missed_since(storage: Storage, webhook_id: str, failing_since: datetime) -> dict[str, Any]:
    """Count the deliveries that a replay would bring back.

    The change of the webhook is stored by now: a failure here is logged, and is none of the change.
    """
    try:
        return await storage.scan(missed.since, webhook_id, failing_since)
    except (NotFound, Unavailable) as exc:
        log.warning("webhook %s: the deliveries that it missed could not be counted: %s", webhook_id, exc)
        return {"since": failing_since, "deliveries": 0, "more": True}


async def rotate_secret(request: Request) -> Response:
    body = await body_of(request, schemas.RotationBody, default=b"{}")
    secret = body.secret or generate_secret()
    webhook_id = request.path_params["webhook_id"]
    expires = await storage_of(request).write(webhooks.rotate, webhook_id, secret, body.overlap_seconds)
    shown: dict[str, Any] = {"webhook_id": webhook_id, "previous_secret_expires_at": expires}
    if body.secret is None:
        shown["secret"] = secret
    return Json(shown)


async def send_test(request: Request) -> Response:
    body = await body_of(request, schemas.TestEventBody, default=b"{}")
    webhook_id = request.path_params["webhook_id"]
    published = await storage_of(request).write(webhooks.send_test, webhook_id, body.event_type, body.data)
    return Json(published._asdict(), 202)


def warnings_for(request: Request, url: str, event_types: list[str]) -> list[str]:
    return warnings_of(url, event_types, services_of(request).allowed_networks)


# Replays


async def start_replay(request: Request) -> Response:
    body = await body_of(request, schemas.ReplayBody)
    storage, webhook_id = storage_of(request), request.path_params["webhook_id"]
    arguments = (webhook_id, body.since, body.until, body.status)
    if body.dry_run:
        counted = await storage.scan(missed.count, *arguments)
        return Json({"webhook_id": webhook_id, **counted, "dry_run": True})
    started = await storage.write(replays.start, *arguments)
    return Json(started, 202, {"Location": f"/api/v1/replays/{started['replay_id']}"})


async def list_replays(request: Request) -> Response:
    query = query_of(request, schemas.ReplaysQuery)
    look_up = partial(
        replays.page, webhook_id=query.webhook_id, state=query.state, limit=query.limit + 1, before=query.cursor
    )
    return paged(await storage_of(request).scan(look_up), query.limit, "replay_id")


async def get_replay(request: Request) -> Response:
    return Json(await storage_of(request).read(replays.get, request.path_params["replay_id"]))


async def cancel_replay(request: Request) -> Response:
    await body_of(request, schemas.EmptyBody, default=b"{}")
    return Json(await storage_of(request).write(replays.cancel, request.path_params["replay_id"]))


# Events


async def publish_event(request: Request) -> Response:
    body = await body_of(request, schemas.EventBody)
    key = body.idempotency_key or request.headers.get("idempotency-key")
    event = events.NewEvent(body.event_type, body.data, key)
    published = await storage_of(request).write_together(events.publish_all, event)
    return Json(cast(events.Published, published)._asdict(), 202)  # `write_together` raises an exception


async def list_events(request: Request) -> Response:
    query = query_of(request, schemas.EventsQuery)
    look_up = partial(history.page, event_type=query.event_type, limit=query.limit + 1, before=query.cursor)
    return paged(await storage_of(request).scan(look_up), query.limit, "created_at", "event_id")


async def get_event(request: Request) -> Response:
    return Json(await storage_of(request).scan(history.get, request.path_params["event_id"]))


async def explain_event(request: Request) -> Response:
    query = query_of(request, schemas.ExplainQuery)
    look_up = partial(history.explain, limit=query.limit + 1, after=query.cursor)
    rows = await storage_of(request).scan(look_up, request.path_params["event_id"])
    return paged(rows, query.limit, "webhook_id")


# Deliveries


async def list_deliveries(request: Request) -> Response:
    query = query_of(request, schemas.DeliveriesQuery)
    look_up = partial(
        deliveries.page,
        webhook_id=query.webhook_id,
        event_id=query.event_id,
        status=query.status,
        limit=query.limit + 1,
        before=query.cursor,
    )
    return paged(await storage_of(request).scan(look_up), query.limit, "delivery_id")


async def get_delivery(request: Request) -> Response:
    return Json(await storage_of(request).scan(deliveries.get, delivery_id_of(request)))


async def retry_delivery(request: Request) -> Response:
    await body_of(request, schemas.EmptyBody, default=b"{}")
    return Json(await storage_of(request).write(deliveries.retry, delivery_id_of(request)))


async def cancel_delivery(request: Request) -> Response:
    await body_of(request, schemas.EmptyBody, default=b"{}")
    return Json(await storage_of(request).write(deliveries.cancel, delivery_id_of(request)))


def delivery_id_of(request: Request) -> int:
    text = request.path_params["delivery_id"]
    if not (text.isascii() and text.isdigit() and len(text) < 19):  # 19 digits may be over the databases' bigint
        raise NotFound("Delivery not found")
    return int(text)


def paged(rows: list[dict[str, Any]], limit: int, *order: str) -> Response:
    """Render a page of rows. The caller asks for one row more than `limit`: it shows that there is another page."""
    cursor = cursors.cursor_after(rows[limit - 1], *order) if len(rows) > limit else None
    return Json({"data": rows[:limit], "next_cursor": cursor})


# Routes


class Id(Convertor[str]):
    """A path segment that may be an id. Without NUL, which the databases treat differently."""

    regex = r"[^/\x00]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class WebhookId(Id):
    """An id that is not the name of one of the two routes beside it: these answer 405 to other methods."""

    regex = rf"(?!(?:register|list)$){Id.regex}"


register_url_convertor("id", Id())
register_url_convertor("webhook", WebhookId())


def route(path: str, **handlers: Handler) -> Route:
    """Make one route of all methods of a path, so that a 405 names them all."""
    if "GET" in handlers:
        handlers["HEAD"] = handlers["GET"]

    async def handle(request: Request) -> Response:
        return await handlers[request.method](request)

    return Route(path, handle, methods=list(handlers))


routes: list[BaseRoute] = [  # the busiest first: they are tried in order
    route("/api/v1/webhooks/register", POST=register),
    route("/api/v1/webhooks/{webhook_id:webhook}", GET=get_webhook, PATCH=update_webhook, DELETE=delete_webhook),
    route("/api/v1/webhooks", GET=list_webhooks, POST=create_webhook),
    route("/api/v1/webhooks/list", GET=list_all),
    route("/api/v1/webhooks/{webhook_id:webhook}/rotate-secret", POST=rotate_secret),
    route("/api/v1/webhooks/{webhook_id:webhook}/test", POST=send_test),
    route("/api/v1/webhooks/{webhook_id:webhook}/replay", POST=start_replay),
    route("/api/v1/replays", GET=list_replays),
    route("/api/v1/replays/{replay_id:id}", GET=get_replay),
    route("/api/v1/replays/{replay_id:id}/cancel", POST=cancel_replay),
    route("/api/v1/events", GET=list_events, POST=publish_event),
    route("/api/v1/events/{event_id:id}", GET=get_event),
    route("/api/v1/events/{event_id:id}/explain", GET=explain_event),
    route("/api/v1/deliveries", GET=list_deliveries),
    route("/api/v1/deliveries/{delivery_id}", GET=get_delivery),
    route("/api/v1/deliveries/{delivery_id}/retry", POST=retry_delivery),
    route("/api/v1/deliveries/{delivery_id}/cancel", POST=cancel_delivery),
]
