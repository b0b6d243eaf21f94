"""The replaced service's recorded exchanges, replayed in order against the real server."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conftest import Server, recorded

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?")


def test_every_recorded_exchange_is_answered_as_it_was(server: Server) -> None:
    ids: dict[str, str] = {}  # the recording's ids and ours
    for exchange in recorded("contract.json"):
        request, expected = exchange["request"], exchange["response"]
        path = request["path"]
        for theirs, ours in ids.items():
            path = path.replace(theirs, ours)
        answer = server.client.request(
            request["method"], path, headers=request["headers"], content=(request["body"] or "").encode()
        )
        assert answer.status_code == expected["status"], exchange["name"]
        assert answer.headers["content-type"] == expected["content_type"], exchange["name"]
        body: Any = json.loads(answer.content) if answer.content else None
        if expected["status"] == 201:
            ids[expected["body"]["webhook_id"]] = body["webhook_id"]
        assert comparable(body, ids) == without_secrets(comparable(expected["body"], ids)), exchange["name"]


def comparable(value: Any, ids: dict[str, str]) -> Any:
    """With ids by their order of appearance, and times by their form."""
    text = json.dumps(value)
    for place, (theirs, ours) in enumerate(ids.items()):
        text = text.replace(theirs, f"id {place}").replace(ours, f"id {place}")
    assert not UUID.search(text)
    return json.loads(TIME.sub("a time", text))


def without_secrets(body: Any) -> Any:
    """The one difference: a 422 never echoes a secret."""
    if isinstance(body, dict) and isinstance(body.get("detail"), list):
        for error in body["detail"]:
            if "secret" in error["loc"] or (isinstance(error["input"], str) and "secret" in error["input"]):
                error["input"] = "***"
    return body


def test_keys_come_in_the_recorded_order(server: Server) -> None:
    assert server.register().status_code == 201
    (shown,) = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
    listed = next(one for one in recorded("contract.json") if one["name"] == "list")
    assert list(shown) == list(listed["response"]["body"]["webhooks"][0])
