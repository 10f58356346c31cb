"""The command line's frame: the application, its exit codes and its last words."""

from __future__ import annotations

import codecs
import functools
import io
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from danqing.cli import terminal
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

EXIT_FAILED = 1
"""A check did not pass."""
EXIT_BUG = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Names may be typed with underscores or dashes: --model_path is --model-path.
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class Commands(TyperGroup):
    """The commands; their output is escaped, and a failed write is an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; on a full disk or a closed output, exit as documented."""
        from danqing.errors import DanqingError

        with terminal.streams():
            try:
                try:
                    result = super().main(*args, **kwargs)
                except SystemExit as end:
                    if not end.code:
                        sys.stdout.flush()
                    raise
                sys.stdout.flush()
            except DanqingError as error:  # of --help and --version: commands are guarded
                print(f"danqing: error: {error}", file=sys.stderr)
                raise SystemExit(error.exit_code) from None
            return result


app = typer.Typer(
    name="danqing",
    cls=Commands,
    help="Run open image models from local weights on any PyTorch device.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
checks = typer.Typer(
    name="verify",
    help="Check reproducibility and cross-device parity. Exits with 1 if a check fails.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"danqing {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error the way users need it, and exit with its documented code."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from danqing.errors import DanqingError

        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last door
            if debug:
                traceback.print_exc()
            if isinstance(error, DanqingError):
                message, code = f"error: {error}", error.exit_code
            elif isinstance(error, KeyboardInterrupt):
                message, code = "interrupted", EXIT_INTERRUPTED
            else:  # a bug must not look like a crash
                hint = "" if debug else "; --debug shows where"
                message = f"this is a bug in danqing: {type(error).__name__}: {error}{hint}"
                code = EXIT_BUG
            print(f"danqing: {message}", file=sys.stderr)
            raise typer.Exit(code) from None

    return run


def exit_unless(passed: bool) -> None:
    """Exit with 1 where a check failed."""
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    print("danqing: terminated", file=sys.stderr)
    raise SystemExit(EXIT_TERMINATED)


def _encode_anyway(error: UnicodeError) -> tuple[bytes, int]:
    """Print the bytes of a file name that is not UTF-8; escape what the terminal cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not text
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace"), error.start + 1


def main() -> None:
    """Run the command line."""
    terminal.keep_descriptors()
    signal.signal(signal.SIGTERM, _terminate)
    codecs.register_error("danqing", _encode_anyway)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="danqing")
    app()
