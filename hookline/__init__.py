"""Hookline: webhook registrations, stored durably. `WebhookManager` is the entry point for Python callers."""

from hookline.webhooks import WebhookManager

__all__ = ["WebhookManager"]
