"""Command line flags made from the fields of `Request`, so that there is one definition of both."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_METAVARS = {int: "N", float: "X", str: "TEXT"}
REPEATED = frozenset({"image"})
"""Settings whose flags may be given several times."""


def flags(name: str) -> list[str]:
    """Return the flags of a setting, the full name first."""
    extra: Any = Request.model_fields[name].json_schema_extra or {}
    return [f"--{name.replace('_', '-')}", *extra.get("flags", [])]


def setting_names() -> list[str]:
    """Return the settings that are flags: all of `Request` but the prompt."""
    return [name for name in Request.model_fields if name != "prompt"]


def setting_type(name: str) -> type[int | float | str]:
    """Return what the text of a setting is read as: its field's type, bounds and None aside."""
    if name in REPEATED:
        return str
    annotation: Any = Request.model_fields[name].annotation
    for option in get_args(annotation) or (annotation,):
        plain = get_args(option)[0] if get_origin(option) is Annotated else option
        if get_origin(option) is Literal:
            return str
        if plain in _METAVARS:
            return plain  # type: ignore[no-any-return]
    msg = f"no flag can be made of {name}: {annotation}"
    raise TypeError(msg)


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--debug` and, for `**settings`, a flag for each field of `Request`."""
    return extended(command, setting_parameters())


def setting_parameters() -> list[inspect.Parameter]:
    """Return a flag for each field of `Request` but the prompt."""
    return [_parameter(name) for name in setting_names()]


def extended(
    command: Callable[..., None], more: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Give a command `--debug` and, where it takes any keywords, more flags."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        command(*args, **kwargs)

    # not typing.get_type_hints: up to Python 3.10 it hides the option inside Optional[...]
    hints = inspect.get_annotations(inspect.unwrap(command), eval_str=True)
    own = inspect.signature(command).parameters.values()
    parameters = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in own
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own):
        parameters += more
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    parameters.append(_keyword("debug", debug, default=False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str) -> inspect.Parameter:
    field = Request.model_fields[name]
    kind = setting_type(name)
    repeated = name in REPEATED
    option = typer.Option(
        *flags(name),
        metavar="FILE" if repeated else _METAVARS[kind],
        help=f"{field.description}{' May be repeated.' * repeated}",
    )
    annotation: Any = list[str] if repeated else kind
    return _keyword(name, Annotated[annotation | None, option], default=None)


def _keyword(name: str, annotation: Any, *, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
