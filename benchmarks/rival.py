"""The rival: the story's own design on FastAPI and SQLAlchemy 2, a session for each request, `synchronous=NORMAL`."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, Field, HttpUrl
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(os.environ["DATABASE_URL"], connect_args={"check_same_thread": False})


@event.listens_for(engine, "connect")
def set_pragmas(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("PRAGMA synchronous = normal")


class Base(DeclarativeBase):
    pass


class Webhook(Base):
    __tablename__ = "webhooks"

    webhook_id: Mapped[str] = mapped_column(primary_key=True)
    url: Mapped[str]
    events: Mapped[str]
    secret: Mapped[str]
    team: Mapped[str | None] = mapped_column(index=True)
    created_at: Mapped[datetime]
    total_calls: Mapped[int] = mapped_column(default=0)
    failed_calls: Mapped[int] = mapped_column(default=0)


class Registration(BaseModel):
    url: HttpUrl
    events: list[str]
    secret: str = Field(min_length=16)
    team: str | None = None


def session() -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


Open = Annotated[Session, Depends(session)]
Base.metadata.create_all(engine)
app = FastAPI()


@app.post("/api/v1/webhooks/register", status_code=201)
def register(new: Registration, db: Open) -> dict[str, Any]:
    webhook = Webhook(
        webhook_id=str(uuid.uuid4()),
        url=str(new.url),
        events=json.dumps(new.events),
        secret=new.secret,
        team=new.team,
        created_at=datetime.now(UTC).replace(tzinfo=None),
    )
    db.add(webhook)
    db.commit()
    return {"webhook_id": webhook.webhook_id, "url": webhook.url, "events": new.events, "team": new.team}


@app.get("/api/v1/webhooks/{webhook_id}")
def get(webhook_id: str, db: Open) -> dict[str, Any]:
    webhook = db.scalars(select(Webhook).where(Webhook.webhook_id == webhook_id)).one_or_none()
    if webhook is None:
        raise HTTPException(404, "Webhook not found")
    return {"webhook_id": webhook.webhook_id, "url": webhook.url, "events": json.loads(webhook.events)}


@app.get("/ready")
def ready() -> dict[str, str]:
    return {"status": "ready"}
