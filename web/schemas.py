"""What comes in and what goes out over HTTP: pydantic types for the one, plain functions for the other."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
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

from hookline import registration
from hookline.events import MAX_DEPTH, MAX_KEY, TOO_DEEP, has_lone_surrogate, is_too_deep
from hookline.legacy import MASK
from hookline.registration import (
    MAX_DESCRIPTION,
    MAX_EVENTS,
    MAX_HEADER_VALUE,
    MAX_HEADERS,
    MAX_NAME,
    MAX_OVERLAP,
    MAX_RATE,
    MAX_RETRIES,
    MAX_SECRET,
    MAX_URL,
    MAX_WAIT,
    MIN_RATE,
    MIN_SECRET,
    MIN_WAIT,
    text_problem,
)

SECRET_NAMES = ("secret", "headers")  # what a 422 must not echo

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


def problem_free(problem_of: Callable[[Any], str | None]) -> AfterValidator:
    """What comes in must be without a problem, in the words of `hookline.registration`."""

    def check(value: Any) -> Any:
        if (problem := problem_of(value)) is not None:
            raise PydanticCustomError("value_refused", "Value {problem}", {"problem": problem})
        return value

    return AfterValidator(check)


def url_problem(url: HttpUrl) -> str | None:
    """Pydantic vouches for its shape, which is checked again when it is stored."""
    text = str(url)
    return registration.url_problem(text) if "@" in text or len(text) > MAX_URL else None


def no_nul(text: Any) -> Any:
    if isinstance(text, str) and "\0" in text:
        raise PydanticCustomError("nul_character", "String should not contain NUL characters")
    return text


Text = Annotated[str, AfterValidator(no_nul)]
Url = Annotated[HttpUrl, BeforeValidator(no_nul), problem_free(url_problem)]
Secret = Annotated[str, Field(min_length=MIN_SECRET, max_length=MAX_SECRET), problem_free(registration.secret_problem)]
NewSecret = Annotated[Secret, problem_free(registration.key_problem)]
Seconds = Annotated[float, Field(ge=MIN_WAIT, le=MAX_WAIT)]
Name = Annotated[Text, Field(max_length=MAX_NAME)]
Events = Annotated[list[Name], Field(max_length=MAX_EVENTS)]
Description = Annotated[Text, Field(max_length=MAX_DESCRIPTION)]
Headers = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_HEADER_VALUE)]],
    Field(max_length=MAX_HEADERS),
    problem_free(registration.headers_problem),
]


def opened(cursor: Any, *kinds: type) -> list[Any]:
    """What a cursor holds: as many values as kinds, each of its kind."""
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError, RecursionError):
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


class Strict(BaseModel):
    """What new routes refuse besides: unknown fields."""

    model_config = ConfigDict(extra="forbid")


class NewWebhook(Strict):
    """`POST /api/v1/webhooks`. Without a `secret` one is generated."""

    url: Url
    events: Events
    secret: NewSecret | None = None
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None


class WebhookChanges(Strict):
    """`PATCH /api/v1/webhooks/{id}`: only what is given changes; null clears what may be null."""

    url: Url = NOT_GIVEN
    events: Events = NOT_GIVEN
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None
    enabled: bool = NOT_GIVEN
    retry_schedule: Annotated[list[Seconds], Field(min_length=1, max_length=MAX_RETRIES)] | None = None
    rate_limit: Annotated[float, Field(ge=MIN_RATE, le=MAX_RATE)] | None = None
    ordered: bool = NOT_GIVEN

    def given(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class Rotation(Strict):
    """`POST /api/v1/webhooks/{id}/rotate-secret`: the old secret keeps signing for `overlap_seconds`."""

    secret: NewSecret | None = None
    overlap_seconds: int = Field(24 * 3600, ge=0, le=MAX_OVERLAP)


class NoFields(Strict):
    """What needs no body, and takes none but an empty object: cancel, retry."""


class TestEvent(Strict):
    """`POST /api/v1/webhooks/{id}/test`. What is not given is as `hookline.events` has it."""

    event_type: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    data: dict[str, Any] | None = None


class NewEvent(Strict):
    """`POST /api/v1/events`. The key may come in the header `Idempotency-Key` instead."""

    event_type: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    data: dict[str, Any]
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY)] | None = None


class Replay(Strict):
    """`POST /api/v1/webhooks/{id}/replay`: of the events from `since` on, those that `failed` to arrive, or `all`."""

    since: Moment
    until: Moment | None = None
    status: Literal["failed", "all"] = "failed"
    dry_run: bool = False


class Page(Strict):
    """The query of a listing."""

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
    """JSON. Raises Refused, also for what no answer could show again."""
    try:
        value, is_unicode = from_json(body, allow_inf_nan=False), True
    except ValueError:  # the json module, which the replaced service used, says what is wrong in the words that it had
        value, is_unicode = decoded_by_json_module(body), False
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_too_deep(value):
        raise not_json(0, TOO_DEEP.capitalize())
    if not is_unicode and has_lone_surrogate(value):
        raise not_json(0, "Lone surrogate")
    return value


def decoded_by_json_module(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=no_constant)
    except UnicodeDecodeError as exc:
        raise not_json(exc.start, "Invalid UTF-8") from None
    except json.JSONDecodeError as exc:
        raise not_json(exc.pos, exc.msg) from None
    except RecursionError:
        raise not_json(0, TOO_DEEP.capitalize()) from None
    except ValueError as exc:
        raise not_json(0, str(exc)) from None


def not_json(at: int, reason: str) -> Refused:
    error = {"type": "json_invalid", "loc": ["body", at], "msg": "JSON decode error", "input": {}}
    return Refused([{**error, "ctx": {"error": reason}}])


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
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def printable(value: Any) -> Any:
    return value.encode(errors="replace").decode()[:2000] if isinstance(value, str) else value


def cursor_after(row: Mapping[str, Any], *names: str) -> str:
    """The cursor of the page behind this row, of the fields that the listing is ordered by."""
    place = [row[name] for name in names]
    texts = [one.replace(tzinfo=None).isoformat() if isinstance(one, datetime) else one for one in place]
    return base64.urlsafe_b64encode(json.dumps(texts).encode()).decode()
