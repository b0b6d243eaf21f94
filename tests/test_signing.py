"""Both signature schemes: against published vectors, recorded deliveries and the reference implementation."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from hookline import signing
from tests.conftest import SECRET, recorded

WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
BODY = b'{"test": 2432232314}'
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
MADE = 1614265330
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
VECTOR = {"webhook-id": ID, "webhook-timestamp": str(MADE), "webhook-signature": SIGNATURE}

VECTORS = [
    (WHSEC, ID, MADE, BODY, SIGNATURE),
    (
        OTHER,
        "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
        1649367553,
        b'{"email":"test@example.com","username":"test_user"}',
        "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
    ),
    (WHSEC.removesuffix("w"), ID, MADE, BODY, "v1,LVOXivKoo4FWasi/IaHvzhE/u+7/cu2AME+zS/nXqzk="),  # unpadded
]

DELIVERIES = recorded("deliveries.json")


def signed(*secrets: str, body: bytes, timestamp: int = MADE) -> dict[str, str]:
    return signing.headers(
        secrets,
        webhook_id="a25c89e8-0fba-4dcf-b2cd-a8ac1ae08ec2",
        event_id="evt_1",
        event_type="game_started",
        event_time="2026-11-23T14:30:01.221962",
        timestamp=timestamp,
        body=body,
    )


@pytest.mark.parametrize(("secret", "event_id", "timestamp", "body", "signature"), VECTORS)
def test_the_published_vectors_are_signed_and_verified(
    secret: str, event_id: str, timestamp: int, body: bytes, signature: str
) -> None:
    headers = {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
    assert signing.standard_signature(secret, event_id, timestamp, body) == signature
    assert signing.problem(headers, body, secret, timestamp) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"webhook-signature": SIGNATURE[:-1] + "A"}, signing.OTHER_SECRET),
        ({"webhook-signature": "v1,"}, "the header webhook-signature holds no v1 signature"),
        ({"webhook-signature": ""}, "the header webhook-signature holds no v1 signature"),
        ({"webhook-signature": SIGNATURE.replace("v1,", "v2,")}, "the header webhook-signature holds no v1 signature"),
        ({"webhook-signature": None}, "there is neither a webhook-signature nor an X-Webhook-Signature header"),
        ({"webhook-id": None}, "the header webhook-id is missing"),
        ({"webhook-id": ""}, "the header webhook-id is missing"),
        ({"webhook-id": ID + "x"}, signing.OTHER_SECRET),
        ({"webhook-timestamp": None}, "the header webhook-timestamp is missing"),
        ({"webhook-timestamp": str(MADE + 1)}, signing.OTHER_SECRET),
        ({"webhook-timestamp": "-1"}, "the header webhook-timestamp is not a number of seconds"),
        ({"webhook-timestamp": "16142653³"}, "the header webhook-timestamp is not a number of seconds"),
        ({"webhook-timestamp": "9" * 5000}, "the header webhook-timestamp is not a number of seconds"),
    ],
)
def test_a_changed_or_missing_header_is_named(changes: dict[str, str | None], problem: str) -> None:
    headers = {name: value for name, value in (VECTOR | changes).items() if value is not None}
    assert signing.problem(headers, BODY, WHSEC, MADE) == problem


@pytest.mark.parametrize(("off", "word"), [(301, "ago"), (-301, "ahead"), (300, None), (-300, None)])
def test_a_clock_may_be_300_seconds_off_and_no_more(off: int, word: str | None) -> None:
    problem = signing.problem(VECTOR, BODY, WHSEC, MADE + off)
    expected = f"the signature holds, but it was made 301 s {word}: check the clock, or a replay"
    assert problem == (expected if word else None)


@pytest.mark.parametrize("headers", [VECTOR, {"X-Webhook-Signature": signing.legacy_signature("", BODY)}, {}])
def test_an_empty_secret_verifies_nothing(headers: dict[str, str]) -> None:
    assert signing.problem(headers, BODY, "", MADE) == "the secret is empty"


@pytest.mark.parametrize("delivery", DELIVERIES, ids=lambda delivery: delivery["headers"]["X-Webhook-Event"])
def test_the_replaced_service_would_have_signed_the_same(delivery: dict[str, Any]) -> None:
    body, secret, headers = delivery["body"].encode(), delivery["secret"], delivery["headers"]
    assert signing.legacy_signature(secret, body) == headers["X-Webhook-Signature"]
    assert signing.problem(headers, body, secret, time.time()) is None
    assert signing.problem(headers, body, secret + "x", time.time()) == signing.OTHER_SECRET
    ours = signing.headers(
        [secret],
        webhook_id=headers["X-Webhook-ID"],
        event_id="evt_1",
        event_type=headers["X-Webhook-Event"],
        event_time=headers["X-Webhook-Timestamp"],
        timestamp=MADE,
        body=body,
    )
    assert {name: ours[name] for name in headers if name != "User-Agent"} == {
        name: value for name, value in headers.items() if name != "User-Agent"
    }


@pytest.mark.parametrize("body", [delivery["body"] for delivery in DELIVERIES] + ['{"name":"Žižkov ☃ 🏈"}'])
def test_the_reference_implementation_verifies_what_we_sign(body: str) -> None:
    headers = signed(WHSEC, body=body.encode(), timestamp=int(time.time()))
    assert Webhook(WHSEC).verify(body, headers) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, headers)


def test_the_reference_implementation_takes_a_secret_without_prefix_as_its_bytes() -> None:
    headers = signed(SECRET, body=BODY, timestamp=int(time.time()))
    Webhook(signing.PREFIX + base64.b64encode(SECRET.encode()).decode()).verify(BODY.decode(), headers)
    assert signing.problem(headers, BODY, SECRET, time.time()) is None


@pytest.mark.parametrize("secret", [WHSEC, OTHER])
def test_during_a_rotation_each_of_the_two_secrets_alone_verifies(secret: str) -> None:
    headers = signed(WHSEC, OTHER, body=BODY, timestamp=int(time.time()))
    assert len(headers["webhook-signature"].split(" ")) == 2
    assert Webhook(secret).verify(BODY.decode(), headers) == json.loads(BODY)
    assert signing.problem(headers, BODY, secret, time.time()) is None
    assert signing.problem(headers, BODY, SECRET, time.time()) == signing.OTHER_SECRET


def test_the_legacy_signature_is_of_the_old_secret_during_a_rotation() -> None:
    assert signed(WHSEC, OTHER, body=BODY)["X-Webhook-Signature"] == signing.legacy_signature(OTHER, BODY)


COMPACT = '{"event":"score_changed","name":"Žižkov","score":{"home":7}}'.encode()
LEGACY = {"X-Webhook-Signature": signing.legacy_signature(WHSEC, COMPACT)}


@pytest.mark.parametrize("headers", [signed(WHSEC, body=COMPACT), LEGACY], ids=["standard", "legacy"])
@pytest.mark.parametrize(
    ("received", "problem"),
    [
        (COMPACT, None),
        (
            json.dumps(json.loads(COMPACT)).encode(),
            "the body was parsed and written again (verify the raw bytes) on its way",
        ),
        (
            json.dumps(json.loads(COMPACT), ensure_ascii=False, indent=2).encode(),
            "the body was parsed and written again (verify the raw bytes) on its way",
        ),
        (COMPACT + b"\n", "the body was given a line break at its end on its way"),
        (COMPACT + b"\r\n", "the body was given a line break at its end on its way"),
        (COMPACT.replace(b"7", b"8"), signing.OTHER_SECRET),
        (COMPACT[:-1], signing.OTHER_SECRET),
        (b"", signing.OTHER_SECRET),
        (b"\xff\xfe\x00", signing.OTHER_SECRET),
    ],
)
def test_what_happened_to_the_body_is_named(headers: dict[str, str], received: bytes, problem: str | None) -> None:
    assert signing.problem(headers, received, WHSEC, MADE) == problem


def test_names_of_headers_are_compared_without_case() -> None:
    assert signing.problem({name.upper(): value for name, value in VECTOR.items()}, BODY, WHSEC, MADE) is None
    assert signing.problem({name.lower(): value for name, value in LEGACY.items()}, COMPACT, WHSEC, MADE) is None


def test_the_legacy_header_does_not_save_a_wrong_standard_signature() -> None:
    headers = signed(WHSEC, body=BODY) | {"webhook-signature": SIGNATURE}
    assert signing.problem(headers, BODY, WHSEC, MADE) == signing.OTHER_SECRET


def test_an_unknown_scheme_beside_a_good_signature_does_no_harm() -> None:
    headers = VECTOR | {"webhook-signature": f"v1a,ed25519 v2,x v1, {SIGNATURE}"}
    assert signing.problem(headers, BODY, WHSEC, MADE) is None


@pytest.mark.parametrize("secret", ["whsec_not base64", "whsec_A", "whsec_ab-_", "whsec_\u010d"])
def test_a_secret_that_only_looks_encoded_is_its_own_bytes(secret: str) -> None:
    assert signing.key_of(secret) == secret.encode()


ANY_TEXT = st.text() | st.text(st.characters(categories=["Cs", "Cc", "Lu", "Nd"]))  # lone surrogates are likely
NAMES = st.sampled_from([*VECTOR, *LEGACY]) | ANY_TEXT
VALUES = ANY_TEXT | ANY_TEXT.map("v1,".__add__) | st.sampled_from([*VECTOR.values(), *LEGACY.values()])
DEEP = [b"[" * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 5000 + b"1" + b"}" * 5000]
BODIES = st.binary() | st.sampled_from([BODY, COMPACT, b"NaN", b"1e999", b'"\\ud800"', b"9" * 5000, *DEEP])
SECRETS = st.sampled_from([WHSEC, SECRET, "", "whsec_"]) | ANY_TEXT | ANY_TEXT.map("whsec_".__add__)


@given(headers=st.dictionaries(NAMES, VALUES), body=BODIES, secret=SECRETS, now=st.floats())
def test_nothing_makes_it_raise(headers: dict[str, str], body: bytes, secret: str, now: float) -> None:
    problem = signing.problem(headers, body, secret, now)
    assert problem is None or problem


@pytest.mark.parametrize("body", DEEP, ids=["open", "900 deep", "5000 deep"])
@pytest.mark.parametrize("headers", [VECTOR, LEGACY], ids=["standard", "legacy"])
def test_a_body_nested_too_deep_to_be_parsed_is_of_another_secret(headers: dict[str, str], body: bytes) -> None:
    assert signing.problem(headers, body, WHSEC, MADE) == signing.OTHER_SECRET


@pytest.mark.parametrize(
    ("changes", "secret", "problem"),
    [
        ({}, "\udcff" * 16, "the secret is not UTF-8"),
        ({}, "whsec_\udcff", "the secret is not UTF-8"),
        ({}, "whsec_", "the secret is empty"),
        ({}, "whsec_\u010d", signing.OTHER_SECRET),
        ({"webhook-id": "\udcff"}, WHSEC, "the header webhook-id is not UTF-8"),
        ({"webhook-signature": "v1,\udcff"}, WHSEC, "the header webhook-signature holds no v1 signature"),
        ({"webhook-timestamp": "\udcff"}, WHSEC, "the header webhook-timestamp is not a number of seconds"),
    ],
)
def test_what_is_not_utf_8_is_named(changes: dict[str, str], secret: str, problem: str) -> None:
    assert signing.problem(VECTOR | changes, BODY, secret, MADE) == problem


def test_a_signature_that_is_not_ascii_does_not_hold() -> None:
    assert signing.problem({"X-Webhook-Signature": "\udcff"}, BODY, WHSEC, MADE) == signing.OTHER_SECRET
    beside = VECTOR | {"webhook-signature": f"v1,\udcff {SIGNATURE}"}
    assert signing.problem(beside, BODY, WHSEC, MADE) is None


@pytest.mark.parametrize("now", [float("nan"), float("inf"), float("-inf")])
def test_without_a_time_nothing_holds(now: float) -> None:
    assert signing.problem(VECTOR, BODY, WHSEC, now) is not None


@given(body=st.binary(), secret=st.text(min_size=1).filter(lambda text: not text.startswith(signing.PREFIX)))
def test_whatever_is_signed_verifies(body: bytes, secret: str) -> None:
    headers = signed(secret, body=body)
    assert signing.problem(headers, body, secret, MADE) is None
    assert signing.problem({"X-Webhook-Signature": headers["X-Webhook-Signature"]}, body, secret, MADE) is None
