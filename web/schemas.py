"""Types of request bodies and queries, and the JSON of answers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    field_validator,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault, to_json
from starlette.responses import JSONResponse

from hookline import registration
from hookline.events import MAX_KEY
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
)
from web.cursors import number_in, text_in, time_and_id_in

ABSENT: Any = None  # a default that is neither validated nor read: see `WebhookChangesBody.changes`


class Json(JSONResponse):
    """JSON as pydantic writes it: times in UTC as RFC 3339 with `Z`, and several times as fast as the json module."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


# Types of fields


def problem_free(problem_of: Callable[[Any], str | None]) -> AfterValidator:
    """Refuse a value that has a problem, in the words of `hookline.registration`."""

    def check(value: Any) -> Any:
        if (problem := problem_of(value)) is not None:
            raise PydanticCustomError("value_refused", "Value {problem}", {"problem": problem})
        return value

    return AfterValidator(check)


def url_problem(url: HttpUrl) -> str | None:
    """Name a problem that pydantic does not look for. Storing checks the whole URL again."""
    text = str(url)
    return registration.url_problem(text) if "@" in text or len(text) > MAX_URL else None


def no_nul(text: Any) -> Any:
    if isinstance(text, str) and "\0" in text:
        raise PydanticCustomError("nul_character", "String should not contain NUL characters")
    return text


def utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("time_range", "Time should be in the years 1 to 9999 of UTC") from None


Text = Annotated[str, AfterValidator(no_nul)]
Url = Annotated[HttpUrl, BeforeValidator(no_nul), problem_free(url_problem)]
Secret = Annotated[str, Field(min_length=MIN_SECRET, max_length=MAX_SECRET), problem_free(registration.secret_problem)]
NewSecret = Annotated[Secret, problem_free(registration.key_problem)]
Seconds = Annotated[float, Field(ge=MIN_WAIT, le=MAX_WAIT)]
Name = Annotated[Text, Field(max_length=MAX_NAME)]
EventType = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Events = Annotated[list[Name], Field(max_length=MAX_EVENTS)]
Description = Annotated[Text, Field(max_length=MAX_DESCRIPTION)]
Headers = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_HEADER_VALUE)]],
    Field(max_length=MAX_HEADERS),
    problem_free(registration.headers_problem),
]
Moment = Annotated[AwareDatetime, AfterValidator(utc)]
TimeAndId = Annotated[tuple[datetime, str], BeforeValidator(time_and_id_in)]  # of a cursor
TextCursor = Annotated[str, BeforeValidator(text_in)]
NumberCursor = Annotated[int, BeforeValidator(number_in)]


# Bodies


class RegistrationBody(BaseModel):
    """`POST /api/v1/webhooks/register`, as the replaced service took it. `sport` is checked and not kept, as there."""

    url: Url
    events: Events
    secret: Secret
    team: Name | None = None
    sport: str = Field("nfl", pattern="^(nfl|nhl)$")


class Strict(BaseModel):
    """A model that refuses unknown fields, as all new routes do."""

    model_config = ConfigDict(extra="forbid")


class WebhookBody(Strict):
    """`POST /api/v1/webhooks`. Without a `secret` one is generated."""

    url: Url
    events: Events
    secret: NewSecret | None = None
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None


class WebhookChangesBody(Strict):
    """`PATCH /api/v1/webhooks/{id}`: only the fields that are present change; null clears a field that may be null."""

    url: Url = ABSENT
    events: Events = ABSENT
    team: Name | None = None
    description: Description | None = None
    headers: Headers | None = None
    enabled: bool = ABSENT
    retry_schedule: Annotated[list[Seconds], Field(min_length=1, max_length=MAX_RETRIES)] | None = None
    rate_limit: Annotated[float, Field(ge=MIN_RATE, le=MAX_RATE)] | None = None
    ordered: bool = ABSENT

    def changes(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class RotationBody(Strict):
    """`POST /api/v1/webhooks/{id}/rotate-secret`: the old secret keeps signing for `overlap_seconds`."""

    secret: NewSecret | None = None
    overlap_seconds: int = Field(24 * 3600, ge=0, le=MAX_OVERLAP)


class TestEventBody(Strict):
    """`POST /api/v1/webhooks/{id}/test`. `webhooks.send_test` has the defaults."""

    event_type: EventType | None = None
    data: dict[str, Any] | None = None


class EventBody(Strict):
    """`POST /api/v1/events`. The key may come in the header `Idempotency-Key` instead."""

    event_type: EventType
    data: dict[str, Any]
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY)] | None = None


class ReplayBody(Strict):
    """`POST /api/v1/webhooks/{id}/replay`: events from `since` on, only those that `failed` to arrive or `all`."""

    since: Moment
    until: Moment | None = None
    status: Literal["failed", "all"] = "failed"
    dry_run: bool = False


class EmptyBody(Strict):
    """A body without fields, for a route that needs none: cancel, retry."""


# Queries


class PageQuery(Strict):
    """The query of a listing. An empty value counts as absent."""

    limit: int = Field(50, ge=1, le=200)

    @field_validator("*", mode="before")  # the last one defined is the first one run
    @classmethod
    def empty_is_absent(cls, value: Any) -> Any:
        if value == "":
            raise PydanticUseDefault()
        return value


class WebhooksQuery(PageQuery):
    """The query of `GET /api/v1/webhooks`."""

    team: Text | None = None
    event: Text | None = None
    enabled: bool | None = None
    cursor: TimeAndId | None = None


class ReplaysQuery(PageQuery):
    """The query of `GET /api/v1/replays`."""

    webhook_id: Text | None = None
    state: Literal["running", "finished", "cancelled"] | None = None
    cursor: TextCursor | None = None


class EventsQuery(PageQuery):
    """The query of `GET /api/v1/events`."""

    event_type: Text | None = None
    cursor: TimeAndId | None = None


class ExplainQuery(PageQuery):
    """The query of `GET /api/v1/events/{event_id}/explain`."""

    cursor: TextCursor = ""


class DeliveriesQuery(PageQuery):
    """The query of `GET /api/v1/deliveries`."""

    webhook_id: Text | None = None
    event_id: Text | None = None
    status: Literal["pending", "succeeded", "failed", "cancelled"] | None = None
    cursor: NumberCursor | None = None
