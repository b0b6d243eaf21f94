"""The command line: schema, import and export, the worker, and tools for trying deliveries out.

`python manage.py COMMAND --help` tells each one's options.
"""

from __future__ import annotations

import os
import sys

import click

from commands.delivery import publish, purge, worker
from commands.migrate import migrate
from commands.terminal import Commands
from commands.transfer import copy_command, export_command, import_command
from commands.trying import listen, verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Hookline's database, its worker, and tools for trying deliveries out."""


for command in (migrate, import_command, export_command, copy_command, worker, publish, purge, verify, listen):
    main.add_command(command)

if __name__ == "__main__":
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - it may have been closed: nothing to read then
    main()
