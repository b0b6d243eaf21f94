"""The commands of `manage.py`, by subject.

A module imports at its head what costs nothing, and a command what it needs once it runs: `--help`, `verify` and their
like need neither the ORM nor the HTTP client, whose imports take longer than all the rest.
"""
