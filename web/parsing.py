"""Parse a request: its bytes and query into a model, or a 422 that shows no secret."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import from_json
from starlette.datastructures import QueryParams

from hookline.payloads import MAX_DEPTH, TOO_DEEP, has_lone_surrogate, is_too_deep
from hookline.registration import MASK

SECRET_NAMES = ("secret", "headers")  # what a 422 must not echo


M = TypeVar("M", bound=BaseModel)


class Refused(Exception):
    """A request that cannot be understood: the `detail` of a 422, in FastAPI's shape."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        self.detail = detail


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
