"""`verify` and `listen`: tools for trying deliveries out, without a database."""

from __future__ import annotations

import getpass
import math
import os
import socket
import sys
import time
import warnings
from typing import BinaryIO

import click

from hookline import signing


def known_secret(context: click.Context, parameter: click.Parameter, secret: str | None) -> str:
    """The option, the variable, or else the answer to a prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            secret = secret or click.prompt("Secret", hide_input=True)
        except getpass.GetPassWarning as exc:  # there is no terminal to ask on
            raise click.UsageError("give the webhook's secret by WEBHOOK_SECRET or --secret") from exc
    if not signing.is_utf8(secret):
        raise click.BadParameter("it is not UTF-8.")
    return secret


secret_option = click.option(
    "--secret", envvar="WEBHOOK_SECRET", callback=known_secret, help="The webhook's secret (or WEBHOOK_SECRET)."
)


def finite(context: click.Context, parameter: click.Parameter, moment: float | None) -> float | None:
    if moment is not None and not math.isfinite(moment):
        raise click.BadParameter(f"{moment} is no time.")
    return moment


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--header", "headers", multiple=True, help="A header that was received, as 'name: value'. Give each.")
@secret_option
@click.option("--at", type=float, callback=finite, help="When it was received, in unix seconds; now unless given.")
def verify(file: BinaryIO, headers: tuple[str, ...], secret: str, at: float | None) -> None:
    """Does the signature of a delivery hold? If not: why. FILE holds the raw body as it was received."""
    received = {name.strip(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
    problem = signing.problem(received, file.read(), secret, time.time() if at is None else at)
    click.echo(f"it does not hold: {problem}" if problem else "it holds")
    sys.exit(1 if problem else 0)


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8006, show_default=True, help="0: any that is free.")
@click.option("--status", type=click.IntRange(200, 599), default=200, show_default=True, help="What to answer.")
@secret_option
def listen(port: int, status: int, secret: str) -> None:
    """Receive deliveries on 127.0.0.1 and print each, with whether its signature holds. For trying things out."""
    from hookline import receiving

    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as exc:
        raise click.ClickException(f"port {port} cannot be used: {os.strerror(exc.errno or 0)}") from exc
    click.echo(f"listening on http://127.0.0.1:{listener.getsockname()[1]}; stop with Ctrl-C")
    receiving.run(listener, status, secret, click.echo)
