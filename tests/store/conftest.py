"""A storage that is running, and the replaced service's file."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from peewee import Database

from hookline.store.open import storage_of
from hookline.store.storage import Storage
from tests.conftest import DATA
from tests.databases import Place


@pytest.fixture
async def storage(db: Database) -> AsyncIterator[Storage]:
    started = storage_of(db)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
def adopted(tmp_path: Path) -> Place:
    """A copy of the replaced service's SQLite file."""
    file = shutil.copy(DATA / "webhooks.db", tmp_path / "webhooks.db")
    return Place(f"sqlite:///{file}", tmp_path)
