"""What comes in and what goes out over HTTP: pydantic types for the one, plain functions for the other."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
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

from hookline.webhooks import MASK, MAX_EVENTS, MIN_SECRET, secret_problem

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
Events = Annotated[list[Text], Field(max_length=MAX_EVENTS)]
Description = Annotated[str, Field(max_length=1000), AfterValidator(no_nul)]
Headers = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=20)]


class Registration(BaseModel):
    """`POST /api/v1/webhooks/register`, as the replaced service took it. `sport` is checked and not kept, as there."""

    url: Url
    events: Events
    secret: Secret
    team: Text | None = None
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
    team: Text | None = None
    description: Description | None = None
    headers: Headers | None = None


class WebhookChanges(WebhookFields):
    """`PATCH /api/v1/webhooks/{id}`: only what is given changes; null clears what may be null."""

    url: Url = NOT_GIVEN
    events: Events = NOT_GIVEN
    team: Text | None = None
    description: Description | None = None
    headers: Headers | None = None
    enabled: bool = NOT_GIVEN

    def given(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class Rotation(WebhookFields):
    """`POST /api/v1/webhooks/{id}/rotate-secret`: the old secret keeps signing for `overlap_seconds`."""

    secret: Secret | None = None
    overlap_seconds: int = Field(24 * 3600, ge=0, le=30 * 24 * 3600)


class Listing(BaseModel):
    """The query of `GET /api/v1/webhooks`."""

    model_config = ConfigDict(extra="forbid")

    team: Text | None = None
    event: Text | None = None
    enabled: bool | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: tuple[datetime, str] | None = None

    @field_validator("cursor", mode="before")
    @classmethod
    def opened(cls, value: str) -> tuple[datetime, str]:
        try:
            moment, webhook_id = json.loads(base64.urlsafe_b64decode(value))
            return datetime.fromisoformat(moment + "Z"), str(webhook_id)
        except (ValueError, TypeError):
            raise PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing") from None

    @field_validator("*", mode="before")  # the last one defined is the first one run
    @classmethod
    def empty_is_not_given(cls, value: Any) -> Any:
        if value == "":
            raise PydanticUseDefault()
        return value


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


def cursor_after(webhook: Mapping[str, Any]) -> str:
    """The cursor of the page behind this webhook."""
    place = [webhook["created_at"].replace(tzinfo=None).isoformat(), webhook["webhook_id"]]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()
