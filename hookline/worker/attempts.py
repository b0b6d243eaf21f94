"""One attempt: the signed request, and the decision that follows from its result."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hookline import clock, policy, signing
from hookline.egress import Client
from hookline.policy import Result
from hookline.worker.jobs import Job, Settled

log = logging.getLogger("hookline")

UNUSABLE = "the delivery could not be made: the webhook's headers or its secret cannot be used"


async def attempt(client: Client, job: Job) -> Result:
    """Send the request. Whatever goes wrong is its result, so that it is counted."""
    started_at = clock.now()
    try:
        headers = signed_headers(job)
    except Exception as exc:  # the database holds what cannot be used: nothing was sent
        return Result(started_at, 0, error=f"{UNUSABLE}: {type(exc).__name__}")
    try:
        return await client.post(job.url, job.body, headers)
    except Exception as exc:
        return Result(started_at, 0, error=f"the request failed: {type(exc).__name__}")


def signed_headers(job: Job) -> dict[str, str]:
    """The headers of a request that is sent now. Raises what reading the webhook's own headers and secrets raises."""
    now = clock.now()
    signed = signing.headers(
        job.secrets(now),
        webhook_id=job.webhook_id,
        event_id=job.event_id,
        event_type=job.event_type,
        event_time=job.event_time,
        timestamp=int(now.timestamp()),
        body=job.body,
    )
    return job.own_headers() | signed if job.headers else signed


def decide(job: Job, result: Result, retry_schedule: Sequence[float]) -> Settled:
    """Decide what follows; `retry_schedule` is for webhooks that have none of their own."""
    schedule, is_usable = retry_schedule, True
    if job.retry_schedule:
        try:
            schedule = job.own_schedule() or retry_schedule
        except Exception:  # the database may hold anything
            is_usable = False
    settlement = policy.settle(
        result,
        attempts=job.attempts + 1 - job.attempts_before,
        failures=job.lane.failures,
        schedule=schedule,
        now=clock.now(),
    )
    if settlement.counts_as_failure and not is_usable:
        log.warning("webhook %s: its retry schedule cannot be used, the service's own is", job.webhook_id)
    return Settled(job, result, settlement)
