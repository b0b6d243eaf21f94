"""Parse a request: its body or query into a model, or a 422 that shows no secret."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hookline.payloads import MAX_DEPTH, TOO_DEEP, has_lone_surrogate, is_too_deep
from hookline.registration import MASK

SECRET_NAMES = ("secret", "headers")  # fields that a 422 must not echo
MAX_ECHO = 2000  # characters of a text that a 422 echoes
WRONG_TYPE = "Send JSON, with the header  Content-Type: application/json"

M = TypeVar("M", bound=BaseModel)


class Unprocessable(Exception):
    """A request that cannot be understood: the `detail` of a 422, in FastAPI's shape."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        self.detail = detail


async def body_of(request: Request, model: type[M], *, default: bytes = b"") -> M:
    """Read a request's JSON as `model`; an empty body is read as `default`.

    A body must be declared as JSON. So must an empty one if it has a type: a browser's form sends one.
    Raises Unprocessable, and HTTPException with status 415.
    """
    content_type = request.headers.get("content-type")
    body = await request.body()
    if (body or content_type) and not (content_type and is_json(content_type)):
        raise HTTPException(415, WRONG_TYPE)
    return model_of(model, content_type, body or default)


async def legacy_body_of(request: Request, model: type[M]) -> M:
    """Read a request's JSON as the replaced service did: without a type it is JSON, another type is a 422.

    Raises Unprocessable.
    """
    return model_of(model, request.headers.get("content-type"), await request.body())


def query_of(request: Request, model: type[M]) -> M:
    """Read a request's query as `model`. Raises Unprocessable."""
    return validated(model, dict(request.query_params), "query")


def is_json(content_type: str | None) -> bool:
    """Tell whether a type is JSON's; no type counts as JSON."""
    media_type = (content_type or "application/json").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def model_of(model: type[M], content_type: str | None, body: bytes) -> M:
    """Read bytes as `model`. Raises Unprocessable, in the words of the replaced service."""
    if not body:
        raise Unprocessable([{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}])
    value = decoded(body) if is_json(content_type) else MASK
    if not isinstance(value, dict):
        msg = "Input should be a valid dictionary or object to extract fields from"
        error = {"type": "model_attributes_type", "loc": ["body"], "msg": msg, "input": without_secrets(value)}
        raise Unprocessable([error])
    return validated(model, value, "body")


def decoded(body: bytes) -> Any:
    """Decode JSON. Raises Unprocessable, also for values that no answer could show again."""
    try:
        value, is_unicode = from_json(body, allow_inf_nan=False), True
    except ValueError:  # the replaced service used the json module: it describes the fault in the same words
        value, is_unicode = decoded_by_json_module(body), False
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_too_deep(value):
        raise not_json(0, TOO_DEEP.capitalize())
    if not is_unicode and has_lone_surrogate(value):
        raise not_json(0, "Lone surrogate")
    return value


def decoded_by_json_module(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=refuse_constant)
    except UnicodeDecodeError as exc:
        raise not_json(exc.start, "Invalid UTF-8") from None
    except json.JSONDecodeError as exc:
        raise not_json(exc.pos, exc.msg) from None
    except RecursionError:
        raise not_json(0, TOO_DEEP.capitalize()) from None
    except ValueError as exc:
        raise not_json(0, str(exc)) from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def not_json(offset: int, reason: str) -> Unprocessable:
    error = {"type": "json_invalid", "loc": ["body", offset], "msg": "JSON decode error", "input": {}}
    return Unprocessable([{**error, "ctx": {"error": reason}}])


def validated(model: type[M], value: Any, source: str) -> M:
    """Validate a value that came from `source`, which is `body` or `query`. Raises Unprocessable."""
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise Unprocessable([shown_error(dict(error), source) for error in exc.errors(include_url=False)]) from None


def shown_error(error: dict[str, Any], source: str) -> dict[str, Any]:
    is_secret = any(part in SECRET_NAMES for part in error["loc"])
    shown = {
        "type": error["type"],
        "loc": [source, *(printable(part) for part in error["loc"])],
        "msg": error["msg"],
        "input": MASK if is_secret else without_secrets(error["input"]),
    }
    if "ctx" in error:
        shown["ctx"] = {
            name: value if isinstance(value, int | float) else str(value) for name, value in error["ctx"].items()
        }
    return shown


def without_secrets(value: Any) -> Any:
    """Return an input as it may be echoed: secrets and passwords masked, long text cut, always encodable."""
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
    return value.encode(errors="replace").decode()[:MAX_ECHO] if isinstance(value, str) else value
