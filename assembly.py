"""Assembly: the parts that the service and the command line both build from the settings."""

from __future__ import annotations

import gc
import logging

from peewee import Database

import models
import settings
from hookline.egress import Client
from hookline.logs import OneLine
from hookline.policy import Rules
from hookline.store import schema
from hookline.store.open import open_database, require_reachable
from hookline.store.storage import Storage
from hookline.worker.worker import Worker


def database_of(config: settings.Settings) -> Database:
    """What the service and the workers use: there and migrated, else Unavailable or Conflict is raised."""
    db = open_database(config.database_url, pool_size=config.database_pool)
    models.db.initialize(db)
    require_reachable(db)
    schema.require_current(db)
    return db


def worker_of(config: settings.Settings, storage: Storage) -> Worker:
    rules = Rules(
        retry_schedule=config.retry_schedule,
        disable_after=config.disable_after,
        lease=config.lease,
        timeout=config.delivery_timeout,
        concurrency=config.worker_concurrency,
        retention=config.retention,
        max_payload=config.max_payload,
    )
    own = (config.host, config.port)
    client = Client(allowed=config.allowed_networks, timeout=config.delivery_timeout, own=own)
    return Worker(storage, client, rules)


def quiet_gc() -> None:
    """What is loaded now stays: collecting it again and again costs a tenth of the work under load."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)


def start_logging(level: str) -> None:
    """Log to stderr: of ours what has this level, of others warnings. Peewee's debug lines hold secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hookline").setLevel(level.upper())
