"""The command line: parse, call, print, exit code. Everything it can do, the library can do too."""

from __future__ import annotations

from danqing.cli.app import app, checks, main
from danqing.cli.commands import CHECKS, COMMANDS

__all__ = ["app", "main"]

PROGRAM = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Of `rehearse`: everything after its own flags belongs to the program."""

for _command in COMMANDS:
    app.command(context_settings=PROGRAM if _command.__name__ == "rehearse" else None)(_command)
for _command in CHECKS:
    checks.command()(_command)
app.add_typer(checks)
