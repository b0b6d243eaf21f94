"""Delivery over HTTP: the client, its connections, the names that it looks up, and the guard of where it connects."""
