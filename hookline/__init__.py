"""Hookline: webhook registrations and signed, durable deliveries. These two are what Python callers need."""

from hookline.events import publish
from hookline.manager import WebhookManager

__all__ = ["WebhookManager", "publish"]
