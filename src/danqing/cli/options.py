"""Flags made from the fields of jobs, `Options` and `Request`, so that each is defined once.

A command takes one `Job`. A field annotated with `typer.Option` or `typer.Argument` is a flag; a
field annotated with `Fields` is filled from the flags of a model's fields.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict
from typer.models import ParameterInfo

from danqing.cli.app import guarded
from danqing.errors import RequestError
from danqing.options import OLD_NAMES, Options
from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from typing_extensions import Self

_PLAIN = {bool: "", int: "N", float: "X"}


class Job(BaseModel):
    """What a command was asked to do; its fields are the command's flags."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, defer_build=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return self.model_copy(update=changes)


Work = TypeVar("Work", bound=Job)


@dataclass(frozen=True)
class Fields:
    """Marks a job's field that is filled from the flags of a model's fields.

    Attributes:
        model: whose fields become flags.
        without: fields that the command does not take.
        flags: flags of fields that are called otherwise in this command.
    """

    model: type[BaseModel]
    without: Sequence[str] = ()
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Fields that are flags."""
        return [name for name in self.model.model_fields if name not in self.without]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield a parameter for each flag; old names of options are hidden."""
        for name in self.names:
            yield _parameter(self.model, name, self.flags.get(name) or flags(name, self.model))
        for old, name in OLD_NAMES.items() if self.model is Options else ():
            yield _parameter(self.model, name, [f"--{old.replace('_', '-')}"], old)

    def take(self, values: dict[str, Any]) -> Any:
        """Take the flags that were typed out of `values`: options, or a table of settings."""
        names = [*self.names, *(OLD_NAMES if self.model is Options else ())]
        typed = {name: value for name in names if (value := values.pop(name)) not in (None, [])}
        if self.model is not Options:
            return typed
        for name, form in PAIRS.items():
            if name in typed:
                typed[name] = read_pairs(typed[name], flags(name, Options)[0], form)
        return Options(**typed)


AllOptions = Annotated[Options, Fields(Options)]
Settings = Annotated[dict[str, Any], Fields(Request, without=("prompt",))]
PAIRS = {"components": "NAME=PATH", "place": "NAME=DEVICE"}
"""Options whose flag is repeated, each time with a pair."""


def takes(job: type[Work]) -> Callable[[Callable[[Work], None]], Callable[..., None]]:
    """Give a command `--debug` and the flags of its job; its errors are printed as documented."""

    def decorate(command: Callable[[Work], None]) -> Callable[..., None]:
        @guarded
        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(_build(job, values))

        parameters = [*_parameters(job)]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        parameters.append(_keyword("debug", debug, default=False))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(job: type[Job]) -> list[inspect.Parameter]:
    """Return a job's flags; arguments without a default come first."""
    found: list[inspect.Parameter] = []
    for name, info in job.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Fields):
                found += mark.parameters()
            elif isinstance(mark, ParameterInfo):
                default = inspect.Parameter.empty if info.is_required() else info.default
                found.append(_keyword(name, Annotated[info.annotation, mark], default=default))
    return sorted(found, key=lambda parameter: parameter.default is not inspect.Parameter.empty)


def _build(job: type[Work], values: dict[str, Any]) -> Work:
    """Return the job that the flags describe."""
    groups = {
        name: mark.take(values)
        for name, info in job.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, Fields)
    }
    return job.model_construct(**values, **groups)


# --- flags of a model's fields -------------------------------------------------------------------


def flags(name: str, model: type[BaseModel] = Request) -> list[str]:
    """Return the flags of a field, the full name first."""
    extra: Any = model.model_fields[name].json_schema_extra or {}
    return [extra.get("flag") or f"--{name.replace('_', '-')}", *extra.get("flags", [])]


def setting_names() -> list[str]:
    """Return the settings that are flags: all of `Request` but the prompt."""
    return [name for name in Request.model_fields if name != "prompt"]


def setting_type(name: str, model: type[BaseModel] = Request) -> Any:
    """Return the type that a flag's text is read as: its field's, bounds and None aside."""
    return _kind(model, name)[0]


def _kind(model: type[BaseModel], name: str) -> tuple[Any, bool]:
    """Return the type of a field's flag, and whether it may be repeated."""
    annotation: Any = model.model_fields[name].annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    repeated = get_origin(annotation) in (tuple, dict)
    return (annotation if annotation in _PLAIN else str), repeated


def _parameter(
    model: type[BaseModel], name: str, names: Sequence[str], old: str = ""
) -> inspect.Parameter:
    kind, repeated = _kind(model, name)
    info = model.model_fields[name]
    extra: Any = info.json_schema_extra or {}
    text = "NAME" if model is Options else "TEXT"
    option = typer.Option(
        *names,
        metavar=extra.get("metavar") or _PLAIN.get(kind, text) or None,
        help=f"{info.description}{' May be repeated.' * repeated}{_default(info.default)}",
        hidden=bool(old),
    )
    annotation = list[str] if repeated else kind
    return _keyword(old or name, Annotated[annotation | None, option], default=None)


def _default(value: Any) -> str:
    return f"  [default: {value}]" if value and isinstance(value, str) else ""


def _keyword(name: str, annotation: Any, *, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def read_pairs(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Return a table from texts such as `vae=FILE` or `vlm=npu:1`.

    Raises:
        RequestError: a text is not such a pair.
    """
    table = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise RequestError(f"{flag} takes {form}", seen=text, allowed=form)
        table[name.strip()] = value
    return table


def arguments(options: Options) -> list[str]:
    """Return the flags that repeat the options in another process."""
    words: list[str] = []
    for name, value in options.typed.items():
        flag = flags(name, Options)[0]
        if isinstance(value, bool):
            words += [flag] * value
        elif isinstance(value, dict):
            words += [word for pair in value.items() for word in (flag, "=".join(pair))]
        else:
            words += [flag, str(value)]
    return words
