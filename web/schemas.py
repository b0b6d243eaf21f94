"""What comes in and what goes out over HTTP: pydantic types for the one, plain functions for the other."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault, from_json, to_json
from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse

from hookline.registration import MAX_EVENTS, MAX_NAME, MAX_RATE, MIN_RATE, MIN_SECRET, secret_problem, text_problem
from hookline.webhooks import MASK

SECRET_NAMES = ("secret", "headers")  # what a 422 must not echo
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
OWN_HEADERS = re.compile(r"(?i)webhook-.*|x-webhook-.*|content-length|content-type|host|transfer-encoding|connection")

NOT_GIVEN: Any = None  # a default that is never validated nor used: see `given`

M = TypeVar("M", bound=BaseModel)


class Json(JSONResponse):
    """JSON as pydantic writes it: times in UTC as RFC 3339 with `Z`, and several times as fast as the json module."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Refused(Exception):
    """A request that cannot be understood: the `detail` of a 422, in FastAPI's shape."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        self.detail = detail


def no_nul(text: Any) -> Any:
    if isinstance(text, str) and "\0" in text:
        raise PydanticCustomError("nul_character", "String should not contain NUL characters")
    return text


def no_credentials(url: HttpUrl) -> HttpUrl:
    if url.username is not None or url.password is not None:
        raise PydanticCustomError("url_credentials", "URL should not contain a user name or password")
    return url


def usable_secret(secret: str) -> str:
    if (problem := secret_problem(secret)) is not None:
        raise PydanticCustomError("secret_encoding", "Secret {problem}", {"problem": problem})
    return secret


Text = Annotated[str, AfterValidator(no_nul)]
Url = Annotated[HttpUrl, BeforeValidator(no_nul), AfterValidator(no_credentials)]
Secret = Annotated[
    str, Field(min_length=MIN_SECRET, max_length=1024), AfterValidator(no_nul), AfterValidator(usable_secret)
]
Seconds = Annotated[float, Field(ge=0.1, le=30 * 86400)]
Name = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(no_nul)]
Events = Annotated[list[Name], Field(max_length=MAX_EVENTS)]
Description = Annotated[str, Field(max_length=1000), AfterValidator(no_nul)]
Headers = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=20)]


def opened(cursor: Any, *kinds: type) -> list[Any]:
    """What a cursor holds: as many values as kinds, each of its kind."""
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError):
        values = None
    if (
        not isinstance(values, list)
        or [type(value) for value in values] != list(kinds)
        or any(text_problem(value) if isinstance(value, str) else not 0 <= value < 2**63 for value in values)
    ):
        raise PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing")
    return values


def opened_place(cursor: Any) -> tuple[datetime, str]:
    moment, name = opened(cursor, str, str)
    try:
        return datetime.fromisoformat(moment + "Z"), name
    except ValueError:
        raise PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing") from None


def opened_text(cursor: Any) -> Any:
    return opened(cursor, str)[0]


def opened_number(cursor: Any) -> Any:
    return opened(cursor, int)[0]


def utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("time_range", "Time should be in the years 1 to 9999 of UTC") from None


Moment = Annotated[AwareDatetime, AfterValidator(utc)]
Place = Annotated[tuple[datetime, str], BeforeValidator(opened_place)]


class Registration(BaseModel):
    """`POST /api/v1/webhooks/register`, as the replaced service took it. `sport` is checked and not kept, as there."""

    url: Url
    events: Events
    secret: Secret
    team: Name | None = None
    sport: str = Field("nfl", pattern="^(nfl|nhl)$")


class WebhookFields(BaseModel):
    """What new routes refuse besides: unknown fields, and headers that are not theirs to set."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("headers", check_fields=False)
    @classmethod
    def allowed_headers(cls, headers: dict[str, str] | None) -> dict[str, str] | None:
        for name, value in (headers or {}).items():
            if not HEADER_NAME.fullmatch(name) or OWN_HEADERS.fullmatch(name):
                raise PydanticCustomError("header_name", "Header should be a token, and not one that Hookline sets")
            if not value.isprintable() or not value.isascii():
                raise PydanticCustomError("header_value", "Header values should be printable ASCII")
        return headers


class NewWebhook(WebhookFields):
    """`POST /api/v1/webhooks`. Without a `secret` one is generated."""

    url: Url
    events: Events
    secret: Secret | None = None
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None


class WebhookChanges(WebhookFields):
    """`PATCH /api/v1/webhooks/{id}`: only what is given changes; null clears what may be null."""

    url: Url = NOT_GIVEN
    events: Events = NOT_GIVEN
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None
    enabled: bool = NOT_GIVEN
    retry_schedule: Annotated[list[Seconds], Field(min_length=1, max_length=50)] | None = None
    rate_limit: Annotated[float, Field(ge=MIN_RATE, le=MAX_RATE)] | None = None
    ordered: bool = NOT_GIVEN

    def given(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class Rotation(WebhookFields):
    """`POST /api/v1/webhooks/{id}/rotate-secret`: the old secret keeps signing for `overlap_seconds`."""

    secret: Secret | None = None
    overlap_seconds: int = Field(24 * 3600, ge=0, le=30 * 24 * 3600)


class NewEvent(BaseModel):
    """`POST /api/v1/events`. The key may come in the header `Idempotency-Key` instead."""

    model_config = ConfigDict(extra="forbid")

    event_type: Annotated[str, Field(min_length=1, max_length=200)]
    data: dict[str, Any]
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class Replay(BaseModel):
    """`POST /api/v1/webhooks/{id}/replay`: of the events from `since` on, those that `failed` to arrive, or `all`."""

    model_config = ConfigDict(extra="forbid")

    since: Moment
    until: Moment | None = None
    status: Literal["failed", "all"] = "failed"
    dry_run: bool = False


class Page(BaseModel):
    """The query of a listing."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=200)

    @field_validator("*", mode="before")  # the last one defined is the first one run
    @classmethod
    def empty_is_not_given(cls, value: Any) -> Any:
        if value == "":
            raise PydanticUseDefault()
        return value


class Listing(Page):
    """The query of `GET /api/v1/webhooks`."""

    team: Text | None = None
    event: Text | None = None
    enabled: bool | None = None
    cursor: Place | None = None


class ReplayListing(Page):
    """The query of `GET /api/v1/replays`."""

    webhook_id: Text | None = None
    state: Literal["running", "finished", "cancelled"] | None = None
    cursor: Annotated[str, BeforeValidator(opened_text)] | None = None


class EventListing(Page):
    """The query of `GET /api/v1/events`."""

    event_type: Text | None = None
    cursor: Place | None = None


class Explaining(Page):
    """The query of `GET /api/v1/events/{event_id}/explain`."""

    cursor: Annotated[str, BeforeValidator(opened_text)] = ""


class DeliveryListing(Page):
    """The query of `GET /api/v1/deliveries`."""

    webhook_id: Text | None = None
    event_id: Text | None = None
    status: Literal["pending", "succeeded", "failed", "cancelled"] | None = None
    cursor: Annotated[int, BeforeValidator(opened_number)] | None = None


def body_of(model: type[M], content_type: str | None, body: bytes) -> M:
    """A request's body as `model`. Raises Refused, in the words of the replaced service."""
    if not body:
        raise Refused([{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}])
    value = decoded(body) if is_json(content_type) else MASK
    if not isinstance(value, dict):
        msg = "Input should be a valid dictionary or object to extract fields from"
        raise Refused([{"type": "model_attributes_type", "loc": ["body"], "msg": msg, "input": without_secrets(value)}])
    return checked(model, value, "body")


def is_json(content_type: str | None) -> bool:
    """JSON by its declared type, or nothing declared."""
    media_type = (content_type or "application/json").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def query_of(model: type[M], query: QueryParams) -> M:
    """A request's query as `model`. Raises Refused."""
    return checked(model, dict(query), "query")


def decoded(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError:
        pass  # the json module, which the replaced service used, says what is wrong in the words that it had
    try:
        return json.loads(body.decode(), parse_constant=no_constant)
    except UnicodeDecodeError as exc:
        at, reason = exc.start, "Invalid UTF-8"
    except json.JSONDecodeError as exc:
        at, reason = exc.pos, exc.msg
    except RecursionError:
        at, reason = 0, "Nested too deeply"
    except ValueError as exc:
        at, reason = 0, str(exc)
    error = {"type": "json_invalid", "loc": ["body", at], "msg": "JSON decode error", "input": {}}
    raise Refused([{**error, "ctx": {"error": reason}}])


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def checked(model: type[M], value: Any, place: str) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise Refused([shown_error(dict(error), place) for error in exc.errors(include_url=False)]) from None


def shown_error(error: dict[str, Any], place: str) -> dict[str, Any]:
    secret = any(part in SECRET_NAMES for part in error["loc"])
    shown = {
        "type": error["type"],
        "loc": [place, *(printable(part) for part in error["loc"])],
        "msg": error["msg"],
        "input": MASK if secret else without_secrets(error["input"]),
    }
    if "ctx" in error:
        shown["ctx"] = {
            name: value if isinstance(value, int | float) else str(value) for name, value in error["ctx"].items()
        }
    return shown


def without_secrets(value: Any) -> Any:
    """An input as it may be echoed: secrets and passwords masked, long text cut, always encodable."""
    if isinstance(value, dict):
        return {
            printable(name): MASK if name in SECRET_NAMES else without_secrets(item) for name, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"//[^/?#]*@", f"//{MASK}@", printable(value))
    return value


def printable(value: Any) -> Any:
    return value.encode(errors="replace").decode()[:2000] if isinstance(value, str) else value


def cursor_after(row: Mapping[str, Any], *names: str) -> str:
    """The cursor of the page behind this row, of the fields that the listing is ordered by."""
    place = [row[name] for name in names]
    texts = [one.replace(tzinfo=None).isoformat() if isinstance(one, datetime) else one for one in place]
    return base64.urlsafe_b64encode(json.dumps(texts).encode()).decode()
