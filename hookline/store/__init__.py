"""The database: opening it, units of work, locks, and who runs what where. Knows nothing of webhooks."""
