"""What a model is and takes: what can be said of it without loading anything."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from danqing.errors import NoEffectError, RequestError
from danqing.request import Request, Resolved
from danqing.validation import allowed_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.weights import Component

RANDOM_SEED_BITS = 32
_ALWAYS = frozenset({"prompt", "seed", "num_images_per_prompt"})
"""Settings that every model takes."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is and what it takes; known from the files' headers alone.

    Attributes:
        family: architecture.
        kind: variant within the family, read from the weights.
        title: how it is shown to people.
        defaults: value of each setting that a request leaves out.
        no_effect: settings that would change nothing, each with the reason. A setting that is
            neither here, nor has a default, nor is one of `extras` is refused, too.
        size_multiple: height and width are multiples of it, in pixels.
        limits: the largest value of some settings, where the model's own is below the general one.
        own_name: what it is called, where that is not made of family and kind.
        extras: settings it takes that have no default.
    """

    family: str
    kind: str
    title: str
    defaults: Mapping[str, Any]
    no_effect: Mapping[str, str]
    size_multiple: int
    limits: Mapping[str, int]
    own_name: str | None = None
    extras: frozenset[str] = frozenset()

    @property
    def takes(self) -> frozenset[str]:
        """Settings that change the images; all others are refused."""
        return (_ALWAYS | self.extras | self.defaults.keys()) - self.no_effect.keys()

    @property
    def name(self) -> str:
        """Short name for files: `flux1-schnell`."""
        return self.own_name or f"{self.family}-{self.kind}"

    def resolve(self, request: Request) -> Resolved:
        """Fill in what the request leaves out; draw a seed if neither it nor the model names one.

        Raises:
            NoEffectError: a setting was given that this model would ignore.
            RequestError: a value is beyond this model's limit.
        """
        self._refuse_without_effect(request)
        for name, limit in self.limits.items():
            value = getattr(request, name)
            if value is not None and value > limit:
                low = (allowed_values(Request, name) or "up to").split(" to ")[0]
                raise RequestError(
                    f"{name} is too large for {self.title}",
                    seen=value,
                    allowed=f"{low} to {limit}",
                    setting=name,
                )
        changes = {
            name: value
            for name, value in self.defaults.items()
            if getattr(request, name) is None and name not in self.no_effect
        }
        notes = []
        for name in ("height", "width"):
            asked = changes.get(name, getattr(request, name))
            multiple = self.size_multiple
            changes[name] = max(multiple, asked // multiple * multiple)
            if changes[name] != asked:
                notes.append(
                    f"{name} {asked} is no multiple of {multiple}: {changes[name]} is used"
                )
        filled = request.replace(**changes)
        seed_is_random = filled.seed is None
        if seed_is_random:
            filled = filled.replace(seed=secrets.randbits(RANDOM_SEED_BITS))
        return _resolved(filled, notes=tuple(notes), seed_is_random=seed_is_random)

    def _refuse_without_effect(self, request: Request) -> None:
        """Refuse every setting that is not in `takes`, also those of a `Request` to come."""
        for name in sorted(request.model_fields_set - self.takes):
            value = getattr(request, name)
            if value is None or value == type(request).model_fields[name].default:
                continue
            reason = self.no_effect.get(name, "it does not take this setting")
            raise NoEffectError(
                f"{name} has no effect in {self.title}: {reason}",
                seen=_shown(value),
                hint=f"leave out --{name.replace('_', '-')}",
                setting=name,
            )


def stated(part: Component | None, key: str, most: int) -> int | None:
    """Return a whole number that a component's config states, from 1 to `most`; or None."""
    value = (part.config or {}).get(key) if part is not None else None
    return value if type(value) is int and 0 < value <= most else None


def _resolved(request: Request, *, notes: tuple[str, ...], seed_is_random: bool) -> Resolved:
    names = {field.name for field in fields(Resolved)} & type(request).model_fields.keys()
    values = {name: getattr(request, name) for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    return Resolved(request=request, notes=notes, seed_is_random=seed_is_random, **values)


def _shown(value: Any) -> Any:
    return ", ".join(one.name for one in value) if isinstance(value, tuple) else value
