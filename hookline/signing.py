"""Signatures of deliveries, in two schemes side by side, and the reasons why one does not hold.

legacy               `X-Webhook-Signature`: hex HMAC-SHA256 of the body under the secret's UTF-8 bytes
Standard Webhooks    `webhook-signature`: `v1,` + base64 HMAC-SHA256 of `id.timestamp.body`
                     (https://github.com/standard-webhooks/standard-webhooks, version 1.0.0)
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

PREFIX = "whsec_"
OTHER_SECRET = "it was signed with another secret, or the body, the id or the timestamp was changed"
BLOCK = 64  # bytes of a block of SHA-256
INNER, OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))
TOLERANCE = 300  # seconds by which a receiver's clock and ours may differ
AGENT = "Hookline"


@lru_cache(maxsize=10_000)
def key_of(secret: str) -> bytes:
    """Return the key for Standard Webhooks: the decoded rest of a `whsec_` secret, else the secret's own bytes."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    encoded = secret.removeprefix(PREFIX)
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return secret.encode()  # imported as it was: the replaced service took anything


@lru_cache(maxsize=10_000)
def keyed(key: bytes) -> tuple[Hash, Hash]:
    """Return the inner and outer hash of HMAC-SHA256 (RFC 2104), both already fed with the key.

    To copy them costs half the time of `hmac`, which also releases the GIL each time, to the writer's thread.
    """
    block = (hashlib.sha256(key).digest() if len(key) > BLOCK else key).ljust(BLOCK, b"\0")
    return hashlib.sha256(block.translate(INNER)), hashlib.sha256(block.translate(OUTER))


def digest(key: bytes, message: bytes) -> bytes:
    """Compute HMAC-SHA256."""
    first, last = keyed(key)
    inner, outer = first.copy(), last.copy()
    inner.update(message)
    outer.update(inner.digest())
    return outer.digest()


def legacy_signature(secret: str, body: bytes) -> str:
    return digest(secret.encode(), body).hex()


def standard_signature(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    signed = b"%s.%d.%s" % (event_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(digest(key_of(secret), signed)).decode()


def headers(  # noqa: PLR0913  # each of them goes into a header
    secrets: Sequence[str],
    *,
    webhook_id: str,
    event_id: str,
    event_type: str,
    event_time: str,
    timestamp: int,
    body: bytes,
) -> dict[str, str]:
    """Return the headers of both schemes.

    `secrets`: the current one, then those that a rotation still keeps, newest first. The legacy header has room for one
    signature: that of the oldest secret, which every receiver still has. `event_time`: the `timestamp` in the body.
    `timestamp`: the unix second of this attempt.
    """
    return {
        "Content-Type": "application/json",
        "User-Agent": AGENT,
        "X-Webhook-Signature": legacy_signature(secrets[-1], body),
        "X-Webhook-Event": event_type,
        "X-Webhook-Timestamp": event_time,
        "X-Webhook-ID": webhook_id,
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(standard_signature(secret, event_id, timestamp, body) for secret in secrets),
    }


def problem(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> str | None:
    """Return why these headers do not prove that the body was signed with the secret; None if they do.

    Checks the Standard Webhooks headers, or the legacy one where they are absent. Names of headers are compared without
    case. `now`: unix seconds. Never raises, whatever the arguments hold.
    """
    received = {name.lower(): value for name, value in headers.items()}
    if not secret.removeprefix(PREFIX):
        return "the secret is empty"
    if not is_utf8(secret):
        return "the secret is not UTF-8"
    if "webhook-signature" in received:
        return _standard_problem(received, body, secret, now)
    if "x-webhook-signature" in received:
        signature = received["x-webhook-signature"].encode(errors="replace")
        return _difference(lambda other: hmac.compare_digest(signature, legacy_signature(secret, other).encode()), body)
    return "there is neither a webhook-signature nor an X-Webhook-Signature header"


def _standard_problem(received: Mapping[str, str], body: bytes, secret: str, now: float) -> str | None:
    for name in ("webhook-id", "webhook-timestamp"):
        if not received.get(name):
            return f"the header {name} is missing"
    text = received["webhook-timestamp"]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        return "the header webhook-timestamp is not a number of seconds"
    timestamp, event_id = int(text), received["webhook-id"]
    if not is_utf8(event_id):
        return "the header webhook-id is not UTF-8"
    tokens = received["webhook-signature"].split()
    signatures = [token for token in tokens if token.startswith("v1,") and token.isascii()]
    if not any(signature[3:] for signature in signatures):
        return "the header webhook-signature holds no v1 signature"

    def holds(other: bytes) -> bool:
        expected = standard_signature(secret, event_id, timestamp, other).encode()
        return any([hmac.compare_digest(signature.encode(), expected) for signature in signatures])

    if (difference := _difference(holds, body)) is not None:
        return difference
    if not abs(now - timestamp) <= TOLERANCE:  # so written, NaN does not pass
        late = "ago" if now > timestamp else "ahead"
        return f"the signature holds, but it was made {abs(now - timestamp):.0f} s {late}: check the clock, or a replay"
    return None


def _difference(holds: Callable[[bytes], bool], body: bytes) -> str | None:
    """Return None if the signature holds for the body, else what was done to it, as far as that can be found out."""
    if holds(body):
        return None
    change = next((change for change, other in rewritten(body) if holds(other)), None)
    return f"the body was {change} on its way" if change else OTHER_SECRET


def rewritten(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what the body may have been before a framework rewrote it, each with the change in words."""
    yield "given a line break at its end", body.removesuffix(b"\n").removesuffix(b"\r")
    try:
        value = json.loads(body)
        for ascii_only in (True, False):
            for separators in ((",", ":"), (", ", ": ")):
                text = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
                yield "parsed and written again (verify the raw bytes)", text.encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return


def is_utf8(text: str) -> bool:
    """Tell whether a text can be encoded. Python gives bytes that are not UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
