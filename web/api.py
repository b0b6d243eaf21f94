"""The routes of /api/v1: each handler parses, makes one call into the domain, and renders."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from ipaddress import ip_network
from typing import Any, cast

from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hookline import deliveries, egress, events, history, legacy, missed, removal, replays, webhooks
from hookline.errors import NotFound, Unavailable
from hookline.registration import Registration, generate_secret, host_of
from hookline.store.storage import Storage
from web import cursors, parsing, schemas
from web.schemas import Json
from web.services import services_of, storage_of

log = logging.getLogger("hookline")

Handler = Callable[[Request], Awaitable[Response]]
PRIVATE_NETWORKS = [  # RFC 1918, RFC 4193, RFC 3927, RFC 4291
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "169.254.0.0/16", "fe80::/10")
]


async def parsed(request: Request, model: type[parsing.M], *, empty: bytes = b"") -> parsing.M:
    """The body as `model`. Its type must be JSON's; a type without a body too, since a form sends one."""
    content_type = request.headers.get("content-type")
    body = await request.body()
    is_json = bool(content_type) and parsing.is_json(content_type)
    if (body or content_type) and not is_json:
        raise HTTPException(415, "Send JSON, with the header  Content-Type: application/json")
    return parsing.body_of(model, content_type, body or empty)


# The three endpoints of the replaced service.


async def register(request: Request) -> Response:
    # Another content type is a 422 here, as it was, and a 415 on the new routes.
    new = parsing.body_of(schemas.Registration, request.headers.get("content-type"), await request.body())
    url = str(new.url)
    registration = Registration(url, new.events, new.secret, new.team)
    webhook_id = await storage_of(request).write_together(webhooks.register_all, registration)
    for warning in warnings(request, url, new.events):  # the answer's form is fixed
        log.warning("webhook %s: %s", webhook_id, warning)
    shown = {"webhook_id": webhook_id, "url": url, "events": new.events, "team": new.team}
    return Json({**shown, "message": "Webhook registered successfully"}, 201)


def warnings(request: Request, url: str, events: Sequence[str]) -> list[str]:
    """Why this webhook will get nothing, as far as that can be told from its registration alone."""
    allowed = services_of(request).allowed_networks
    found = [] if events else ["it will get no events: its list of events is empty"]
    if refusal := egress.literal_refusal(url, allowed):
        found.append(f"it will not be delivered to: {refusal}")
    elif is_local_name(url) and not any(is_private(network) for network in allowed):
        found.append(
            "it will not be delivered to: names in .local are of private addresses, and ALLOWED_NETWORKS has none"
        )
    return found


def is_local_name(url: str) -> bool:
    """A name of multicast DNS (RFC 6762)."""
    return host_of(url).rstrip(".").endswith(".local")


def is_private(network: egress.Network) -> bool:
    return any(network.version == one.version and network.overlaps(one) for one in PRIVATE_NETWORKS)


async def list_all(request: Request) -> Response:
    return Json({"webhooks": await storage_of(request).scan(legacy.everything)})


async def delete(request: Request) -> Response:
    storage, webhook_id = storage_of(request), request.path_params["webhook_id"]
    await removal.delete_deliveries_beside(storage, webhook_id)
    found = await storage.write(webhooks.unregister, webhook_id)
    if not found:
        return Json({"detail": "Webhook not found"}, 404)
    return Response(status_code=204, media_type="application/json")


async def create(request: Request) -> Response:
    new = await parsed(request, schemas.NewWebhook)
    secret = new.secret or generate_secret()
    registration = Registration(str(new.url), new.events, secret, new.team, new.description, new.headers)
    shown = await storage_of(request).write_together(webhooks.create_all, registration)
    if new.secret is None:
        shown["secret"] = secret
    shown["warnings"] = warnings(request, shown["url"], shown["events"])
    return Json(shown, 201, {"Location": f"/api/v1/webhooks/{shown['webhook_id']}"})


async def page(request: Request) -> Response:
    query = parsing.query_of(schemas.Listing, request.query_params)
    look_up = partial(
        webhooks.page,
        team=query.team,
        event=query.event,
        enabled=query.enabled,
        limit=query.limit + 1,
        after=query.cursor,
    )
    return paged(await storage_of(request).scan(look_up), query.limit, "created_at", "webhook_id")


def paged(found: list[dict[str, Any]], limit: int, *order: str) -> Response:
    """A page of rows, of which one more than `limit` was asked for, to see whether there is another page."""
    cursor = cursors.cursor_after(found[limit - 1], *order) if len(found) > limit else None
    return Json({"data": found[:limit], "next_cursor": cursor})


async def get(request: Request) -> Response:
    found = await storage_of(request).read(webhooks.get, request.path_params["webhook_id"])
    return Json(found)


async def update(request: Request) -> Response:
    changes = await parsed(request, schemas.WebhookChanges)
    webhook_id = request.path_params["webhook_id"]
    storage = storage_of(request)
    found, began = await storage.write(webhooks.change, webhook_id, changes.given())
    if began is not None:
        found["replay"] = await missed_by(storage, webhook_id, began)
    return Json({**found, "warnings": warnings(request, found["url"], found["events"])})


async def missed_by(storage: Storage, webhook_id: str, began: datetime) -> dict[str, Any]:
    """What a replay would bring back, counted after the change is stored: so a failure is no failure of the change."""
    try:
        return await storage.scan(missed.since, webhook_id, began)
    except (NotFound, Unavailable) as exc:
        log.warning("webhook %s: what it missed could not be counted: %s", webhook_id, exc)
        return {"since": began, "deliveries": 0, "more": True}


async def rotate_secret(request: Request) -> Response:
    wanted = await parsed(request, schemas.Rotation, empty=b"{}")
    secret = wanted.secret or generate_secret()
    webhook_id = request.path_params["webhook_id"]
    expires = await storage_of(request).write(webhooks.rotate, webhook_id, secret, wanted.overlap_seconds)
    shown: dict[str, Any] = {"webhook_id": webhook_id, "previous_secret_expires_at": expires}
    if wanted.secret is None:
        shown["secret"] = secret
    return Json(shown)


async def send_test(request: Request) -> Response:
    new = await parsed(request, schemas.TestEvent, empty=b"{}")
    webhook_id = request.path_params["webhook_id"]
    published = await storage_of(request).write(webhooks.send_test, webhook_id, new.event_type, new.data)
    return Json(published._asdict(), 202)


# Replays


async def replay(request: Request) -> Response:
    wanted = await parsed(request, schemas.Replay)
    webhook_id, storage = request.path_params["webhook_id"], storage_of(request)
    arguments = (webhook_id, wanted.since, wanted.until, wanted.status)
    if wanted.dry_run:
        counted = await storage.scan(missed.count, *arguments)
        return Json({"webhook_id": webhook_id, **counted, "dry_run": True})
    started = await storage.write(replays.start, *arguments)
    return Json(started, 202, {"Location": f"/api/v1/replays/{started['replay_id']}"})


async def list_replays(request: Request) -> Response:
    query = parsing.query_of(schemas.ReplayListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(
        replays.page, webhook_id=query.webhook_id, state=query.state, limit=query.limit + 1, before=query.cursor
    )
    return paged(await storage.scan(look_up), query.limit, "replay_id")


async def get_replay(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.read(replays.get, request.path_params["replay_id"]))


async def cancel_replay(request: Request) -> Response:
    await parsed(request, schemas.NoFields, empty=b"{}")
    storage = storage_of(request)
    return Json(await storage.write(replays.cancel, request.path_params["replay_id"]))


# Events


async def publish(request: Request) -> Response:
    new = await parsed(request, schemas.NewEvent)
    key = new.idempotency_key or request.headers.get("idempotency-key")
    storage = storage_of(request)
    event = events.NewEvent(new.event_type, new.data, key)
    published = await storage.write_together(events.publish_all, event)
    return Json(cast(events.Published, published)._asdict(), 202)


async def list_events(request: Request) -> Response:
    query = parsing.query_of(schemas.EventListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(history.page, event_type=query.event_type, limit=query.limit + 1, before=query.cursor)
    return paged(await storage.scan(look_up), query.limit, "created_at", "event_id")


async def get_event(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.scan(history.get, request.path_params["event_id"]))


async def explain(request: Request) -> Response:
    query = parsing.query_of(schemas.Explaining, request.query_params)
    storage = storage_of(request)
    look_up = partial(history.explain, limit=query.limit + 1, after=query.cursor)
    return paged(await storage.scan(look_up, request.path_params["event_id"]), query.limit, "webhook_id")


# Deliveries


async def list_deliveries(request: Request) -> Response:
    query = parsing.query_of(schemas.DeliveryListing, request.query_params)
    storage = storage_of(request)
    look_up = partial(
        deliveries.page,
        webhook_id=query.webhook_id,
        event_id=query.event_id,
        status=query.status,
        limit=query.limit + 1,
        before=query.cursor,
    )
    return paged(await storage.scan(look_up), query.limit, "delivery_id")


def delivery_id_of(request: Request) -> int:
    text = request.path_params["delivery_id"]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise NotFound("Delivery not found")
    return int(text)


async def get_delivery(request: Request) -> Response:
    storage = storage_of(request)
    return Json(await storage.scan(deliveries.get, delivery_id_of(request)))


async def retry_delivery(request: Request) -> Response:
    await parsed(request, schemas.NoFields, empty=b"{}")
    storage = storage_of(request)
    return Json(await storage.write(deliveries.retry, delivery_id_of(request)))


async def cancel_delivery(request: Request) -> Response:
    await parsed(request, schemas.NoFields, empty=b"{}")
    storage = storage_of(request)
    return Json(await storage.write(deliveries.cancel, delivery_id_of(request)))


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


def route(path: str, **handlers: Handler) -> Route:
    """All methods of a path in one route, so that a 405 names them all."""
    if "GET" in handlers:
        handlers["HEAD"] = handlers["GET"]

    async def handle(request: Request) -> Response:
        return await handlers[request.method](request)

    return Route(path, handle, methods=list(handlers))


routes: list[BaseRoute] = [  # the busiest first: they are tried in order
    route("/api/v1/webhooks/register", POST=register),
    route("/api/v1/webhooks/{webhook_id:webhook}", GET=get, PATCH=update, DELETE=delete),
    route("/api/v1/webhooks", GET=page, POST=create),
    route("/api/v1/webhooks/list", GET=list_all),
    route("/api/v1/webhooks/{webhook_id:webhook}/rotate-secret", POST=rotate_secret),
    route("/api/v1/webhooks/{webhook_id:webhook}/test", POST=send_test),
    route("/api/v1/webhooks/{webhook_id:webhook}/replay", POST=replay),
    route("/api/v1/replays", GET=list_replays),
    route("/api/v1/replays/{replay_id:id}", GET=get_replay),
    route("/api/v1/replays/{replay_id:id}/cancel", POST=cancel_replay),
    route("/api/v1/events", GET=list_events, POST=publish),
    route("/api/v1/events/{event_id:id}", GET=get_event),
    route("/api/v1/events/{event_id:id}/explain", GET=explain),
    route("/api/v1/deliveries", GET=list_deliveries),
    route("/api/v1/deliveries/{delivery_id}", GET=get_delivery),
    route("/api/v1/deliveries/{delivery_id}/retry", POST=retry_delivery),
    route("/api/v1/deliveries/{delivery_id}/cancel", POST=cancel_delivery),
]
