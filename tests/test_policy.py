"""What follows from an attempt: outcomes, the whole schedule, Retry-After, and how much a lane may send."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookline import policy
from hookline.policy import DEFAULT, Outcome, Result, Settlement

NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
SCHEDULE = DEFAULT.retry_schedule
FAILED = Result(NOW, 10, 500, "answered 500")


def settle(result: Result = FAILED, **changes: Any) -> Settlement:
    given: dict[str, Any] = {"attempts": 1, "failures": 0, "schedule": SCHEDULE, "now": NOW, "spread": 0}
    return policy.settle(result, **given | changes)


def seconds(moment: datetime | None) -> float | None:
    return None if moment is None else (moment - NOW).total_seconds()


@pytest.mark.parametrize(
    ("status_code", "error", "outcome"),
    [
        (199, None, Outcome.FAILED),
        (200, None, Outcome.SUCCEEDED),
        (201, None, Outcome.SUCCEEDED),
        (204, None, Outcome.SUCCEEDED),
        (299, None, Outcome.SUCCEEDED),
        (200, "the answer was cut off", Outcome.FAILED),
        (300, "answered 300", Outcome.FAILED),
        (301, "answered 301", Outcome.FAILED),
        (304, None, Outcome.FAILED),
        (307, None, Outcome.FAILED),
        (400, None, Outcome.FAILED),
        (401, None, Outcome.FAILED),
        (404, None, Outcome.FAILED),
        (409, None, Outcome.FAILED),
        (410, None, Outcome.GONE),
        (410, "answered 410", Outcome.GONE),
        (411, None, Outcome.FAILED),
        (429, None, Outcome.FAILED),
        (500, None, Outcome.FAILED),
        (503, None, Outcome.FAILED),
        (999, None, Outcome.FAILED),
        (None, "timed out after 15 s", Outcome.FAILED),
        (None, "connection refused", Outcome.FAILED),
        (None, None, Outcome.FAILED),
    ],
)
def test_only_2xx_succeeds_and_only_410_is_gone(status_code: int | None, error: str | None, outcome: Outcome) -> None:
    assert policy.outcome_of(Result(NOW, 10, status_code, error)) is outcome


def test_a_success_settles_at_once_whatever_the_count() -> None:
    for attempts in range(1, len(SCHEDULE) + 3):
        settlement = settle(Result(NOW, 10, 200, retry_after=60), attempts=attempts, failures=attempts)
        assert settlement == Settlement(
            status="succeeded",
            next_attempt_at=None,
            lane_opens_at=None,
            is_asked=False,
            counts_as_failure=False,
            disables=False,
        )


def test_the_default_schedule_fails_a_delivery_after_over_3_days() -> None:
    lines, waits, attempts, failures, total = [], [], 1, 0, 0.0
    while (settlement := settle(attempts=attempts, failures=failures)).status == "pending":
        wait = seconds(settlement.next_attempt_at)
        assert settlement.counts_as_failure and not settlement.disables and wait is not None
        waits.append(wait)
        total += wait
        lines.append(f"attempt {attempts:2} failed: again in {wait:7.0f} s, at {timedelta(seconds=total)}")
        attempts, failures = attempts + 1, failures + 1
    print(*lines, f"attempt {attempts:2} failed: {settlement.status}", sep="\n")
    assert waits == [5, 30, 120, 600, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    assert attempts == 12
    assert settlement == settlement._replace(
        status="failed", next_attempt_at=None, counts_as_failure=True, disables=False
    )
    assert timedelta(days=3) < timedelta(seconds=total) < timedelta(days=4)


def test_an_empty_schedule_means_a_single_attempt() -> None:
    assert settle(schedule=()).status == "failed"


@pytest.mark.parametrize(("spread", "factor"), [(-1, 0.9), (-0.5, 0.95), (0, 1), (0.5, 1.05), (1, 1.1)])
def test_the_spread_sets_the_jitter(spread: float, factor: float) -> None:
    for attempts, step in enumerate(SCHEDULE, start=1):
        assert seconds(settle(attempts=attempts, spread=spread).next_attempt_at) == pytest.approx(step * factor)


def test_random_jitter_stays_within_a_tenth_and_does_vary() -> None:
    waits = [seconds(settle(attempts=4, spread=None).next_attempt_at) or 0 for _ in range(500)]
    assert all(540 <= wait <= 660 for wait in waits)
    assert min(waits) < 590 and max(waits) > 610


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        (None, 120),
        (0, 120),
        (1, 120),
        (119, 120),
        (121, 121),
        (3600, 3600),
        (24 * 3600, 24 * 3600),
        (24 * 3600 + 1, policy.MAX_RETRY_AFTER),
        (1e12, policy.MAX_RETRY_AFTER),
        (float("inf"), policy.MAX_RETRY_AFTER),
    ],
)
@pytest.mark.parametrize("status_code", [429, 503])
def test_retry_after_lengthens_a_wait_up_to_a_day_and_shortens_none(
    status_code: int, asked: float | None, waited: float
) -> None:
    settlement = settle(Result(NOW, 10, status_code, "answered", retry_after=asked), attempts=3)
    assert settlement.status == "pending"
    assert seconds(settlement.next_attempt_at) == waited


def test_jitter_does_not_bring_the_attempt_before_what_the_endpoint_asked() -> None:
    settlement = settle(Result(NOW, 10, 429, "answered 429", retry_after=119), attempts=3, spread=-1)
    assert seconds(settlement.next_attempt_at) == 119


def test_retry_after_rests_the_whole_lane() -> None:
    settlement = settle(Result(NOW, 10, 429, "answered 429", retry_after=900))
    assert (seconds(settlement.lane_opens_at), settlement.is_asked) == (900, True)
    assert not settle().is_asked


def test_the_lane_is_open_when_the_delivery_is_due_again() -> None:
    settlement = settle(attempts=1, failures=20)
    assert settlement.lane_opens_at == settlement.next_attempt_at


@pytest.mark.parametrize("attempts", [1, 5, 12])
def test_410_is_final_and_gone(attempts: int) -> None:
    settlement = settle(Result(NOW, 10, 410, "answered 410", retry_after=60), attempts=attempts)
    assert settlement == settlement._replace(
        status="failed", next_attempt_at=None, counts_as_failure=True, disables=True
    )


def test_a_final_failure_still_rests_the_lane() -> None:
    assert seconds(settle(attempts=len(SCHEDULE) + 1, failures=2).lane_opens_at) == 20


def test_the_lanes_rest_doubles_up_to_five_minutes() -> None:
    assert [policy.lane_backoff(failures) for failures in range(1, 9)] == [5, 10, 20, 40, 80, 160, 300, 300]
    assert policy.lane_backoff(10**9) == policy.MAX_LANE_BACKOFF


@given(
    attempts=st.integers(1, 20),
    failures=st.integers(0, 10**9),
    retry_after=st.none() | st.floats(min_value=0),
    spread=st.floats(-1, 1),
)
def test_no_failure_is_due_at_once_or_later_than_the_caps(
    attempts: int, failures: int, retry_after: float | None, spread: float
) -> None:
    settlement = settle(
        Result(NOW, 10, 503, "answered 503", retry_after=retry_after),
        attempts=attempts,
        failures=failures,
        spread=spread,
    )
    wait, rest = seconds(settlement.next_attempt_at), seconds(settlement.lane_opens_at)
    assert (wait is None) == (attempts > len(SCHEDULE)) == (settlement.status == "failed")
    assert wait is None or SCHEDULE[attempts - 1] * 0.899 <= wait <= 86400 * 1.101
    assert rest is not None and 4.4 < rest <= policy.MAX_RETRY_AFTER


@pytest.mark.parametrize(
    ("failures", "ordered", "rate_limit", "free", "budget"),
    [
        (0, False, None, 256, 128),
        (0, False, None, 255, 127),
        (0, False, None, 2, 1),
        (0, False, None, 1, 1),
        (1, False, None, 256, 1),
        (50, False, 1000, 256, 1),
        (0, True, None, 256, 1),
        (0, True, 1000, 256, 1),
        (0, False, 0.1, 256, 1),
        (0, False, 10, 256, 1),
        (0, False, 100, 256, 10),
        (0, False, 100, 8, 4),
        (0, False, 10_000, 256, 128),
    ],
)
def test_a_lane_gets_half_of_the_free_slots_at_most(
    failures: int, ordered: bool, rate_limit: float | None, free: int, budget: int
) -> None:
    assert policy.lane_budget(failures, ordered, rate_limit, free) == budget


@pytest.mark.parametrize(
    ("rate_limit", "burst"), [(0.001, 1), (1, 1), (14, 1), (16, 2), (20, 2), (100, 10), (1000, 100)]
)
def test_a_burst_is_a_tenth_of_a_seconds_worth_and_at_least_one(rate_limit: float, burst: int) -> None:
    assert policy.burst(rate_limit) == burst


@pytest.mark.parametrize(("concurrency", "per_webhook"), [(1, 1), (2, 1), (3, 1), (256, 128)])
def test_one_webhook_may_have_half_of_the_requests_in_flight(concurrency: int, per_webhook: int) -> None:
    assert replace(DEFAULT, concurrency=concurrency).per_webhook == per_webhook
