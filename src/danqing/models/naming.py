"""Naming: which of the components at a place is which of a family's. Needs no torch.

`weights` recognises components by kind. A family says in its slots what each is called: T5 may be
`text_encoder_2` or `text_encoder_3`. In a diffusers folder the subfolders' names are the slots'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from danqing.errors import CheckpointError, RequestError
from danqing.weights import Checkpoint
from danqing.weights.deepgen_pt import with_adapters
from danqing.weights.kinds import KINDS, RELEASED, TOKENIZERS
from danqing.weights.parts import (
    named,
    nothing_at,
    read_component,
    read_network,
    read_part,
    read_place,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from danqing.models.slots import Slot
    from danqing.weights import Component, Contents


def component_names(slots: Iterable[Slot]) -> dict[str, Slot]:
    """Return the slots by every name `--component` accepts: their own, and aliases of one alone."""
    own: dict[str, Slot] = {}
    for slot in slots:
        own.setdefault(slot.name, slot)
    aliases: dict[str, list[Slot]] = {}
    for slot in own.values():
        aliases.setdefault(_alias(slot), []).append(slot)
    return {alias: row[0] for alias, row in aliases.items() if len(row) == 1} | own


@dataclass(frozen=True, kw_only=True)
class Match:
    """A family's slots beside the components at a place.

    Attributes:
        contents: what lies at the place.
        slots: of the family.
        given: what lies at the places that the user named, by the names the user gave.
    """

    contents: Contents
    slots: Sequence[Slot]
    given: Mapping[str, Sequence[Component]]

    @cached_property
    def _names(self) -> dict[str, Slot]:
        return component_names(self.slots)

    @cached_property
    def _unique(self) -> list[Slot]:
        """One slot a component; tokenizers after the encoders whose folders they may lie in."""
        unique: dict[str, Slot] = {}
        for slot in self.slots:
            unique.setdefault(slot.name, slot)
        return sorted(unique.values(), key=lambda slot: slot.kind in TOKENIZERS)

    # --- how well it fits ------------------------------------------------------------------------

    @cached_property
    def denoisers(self) -> set[str]:
        """Kinds of the family's denoisers that are found."""
        slots = [slot for slot in self._unique if slot.role == "denoiser"]
        return {slot.kind for slot in slots if self._is_found(slot)}

    def _is_found(self, slot: Slot) -> bool:
        names = [name for name in self.given if name in self._names]
        for name in (name for name in names if self._names[name].name == slot.name):
            if parts := self.given[name]:  # where nothing can be read, the error comes with names
                return any(slot.kind in part.kinds for part in parts)
        part = self.contents.components.get(slot.name)
        if part is not None:
            return _kind(part) == slot.kind
        return any(slot.kind in part.kinds for part in self.contents.loose)

    @cached_property
    def missing(self) -> list[Slot]:
        """Required slots that nothing fills."""
        return [slot for slot in self._unique if slot.required and slot.name not in self._filled]

    @cached_property
    def unused(self) -> int:
        """Number of components that no slot takes."""
        return (
            len(self._loose)
            - len(self._taken)
            + len([name for name in self.contents.components if name not in self._names])
        )

    @property
    def misfit(self) -> int:
        """Number of slots without a component, and of components without a slot."""
        return len(self.missing) + self.unused

    @property
    def unknown_denoiser(self) -> bool:
        """Whether no denoiser is found, and those of the family are missing or cannot be read."""
        held = self.contents.components
        kinds = [_kind(part) for part in held.values()]
        kinds += [kind for part in self._loose for kind in part.kinds]
        own = [held[s.name] for s in self._unique if s.role == "denoiser" and s.name in held]
        return all(_kind(part) is None for part in own) and not any(
            kind in KINDS and KINDS[kind].denoiser for kind in kinds
        )

    @property
    def named_folders(self) -> int:
        """Number of components in folders that are called as the slot is."""
        pairs = ((slot, part) for slot in self._unique for part in self._loose)
        return sum(slot.kind in part.kinds and _has_name(part, slot) for slot, part in pairs)

    @cached_property
    def _loose(self) -> list[Component]:
        strange = [
            part for name, parts in self.given.items() if name not in self._names for part in parts
        ]
        return [*self.contents.loose, *strange]

    @cached_property
    def _taken(self) -> dict[str, int]:
        """Index of a loose component that may fill each slot."""
        taken: dict[str, int] = {}
        for slot in self._unique:
            if slot.name not in self._held:
                for index, part in enumerate(self._loose):
                    if slot.kind in part.kinds and index not in taken.values():
                        taken[slot.name] = index
                        break
        return taken

    @cached_property
    def _held(self) -> set[str]:
        """Names of the slots that have a component already."""
        given = {
            self._names[name]: parts for name, parts in self.given.items() if name in self._names
        }
        kinds = {slot.name: slot.kind for slot in self._unique}
        beside = {  # tokenizers in the folders of encoders that the user named
            slot.tokenizer
            for slot, parts in given.items()
            if slot.tokenizer and any(kinds[slot.tokenizer] in part.kinds for part in parts)
        }
        own = {slot.name for slot in given}
        return {*self.contents.components, *self.contents.broken, *own, *beside}

    @cached_property
    def _filled(self) -> set[str]:
        return {*self._held, *self._taken}

    # --- naming ----------------------------------------------------------------------------------

    def checkpoint(self, family: str) -> Checkpoint:
        """Return the components under the names of the slots.

        Raises:
            RequestError: the user named a component that the family has not.
            CheckpointError: a component at its place cannot be used, or several may be meant.
        """
        contents = self.contents
        chosen = self._chosen_by_user()
        places = {self._names[name].name: place for name, place in contents.places.items()}
        components = {**contents.components, **chosen}
        for slot in self._unique:
            if slot.name not in components and slot.name not in contents.broken:
                part = self._pick(slot, components)
                if part is not None:
                    components[slot.name] = named(part, slot.name)
        for name, slot in self._names.items():
            if name in components and (adapters := contents.adapters.get(slot.kind)):
                components[name] = with_adapters(components[name], adapters)
        return Checkpoint(
            path=contents.path,
            layout=contents.layout,
            components=components,
            family=family,
            kinds={slot.name: slot.kind for slot in self._unique},
            index=contents.index,
            overrides=places,
            broken={n: error for n, error in contents.broken.items() if n not in components},
            unread=contents.unread,
            name=contents.name,
        )

    def _chosen_by_user(self) -> dict[str, Component]:
        """Return the components at the places the user named; an encoder's with its tokenizer."""
        chosen: dict[str, Component] = {}
        beside: dict[str, Component] = {}
        for name, place in self.contents.places.items():
            slot = self._names.get(name)
            if slot is None:
                raise self._unknown(name)
            part, *tokenizers = read_component(slot.name, KINDS[slot.kind], place)
            chosen[slot.name] = named(part, slot.name)
            if slot.tokenizer and tokenizers:
                beside[slot.tokenizer] = named(tokenizers[0], slot.tokenizer)
        return {**beside, **chosen}

    def _unknown(self, name: str) -> RequestError:
        several = [slot.name for slot in self._unique if _alias(slot) == name]
        return RequestError(
            "unknown component",
            seen=name,
            allowed=", ".join(sorted(self._names)),
            hint=f"{name} may be {' or '.join(several)} here" if several else None,
        )

    def _pick(self, slot: Slot, components: Mapping[str, Component]) -> Component | None:
        """Return the loose component for a slot: the only one, or the one that is plainly meant."""
        used = {_identity(part) for part in components.values()}
        parts = [
            part
            for part in self.contents.loose
            if slot.kind in part.kinds and _identity(part) not in used
        ]
        homes = [
            components[encoder.name].folder
            for encoder in self._unique
            if encoder.tokenizer == slot.name and encoder.name in components
        ]
        for preferred in (
            [part for part in parts if part.folder in homes],  # an encoder's folder
            [part for part in parts if part.style == RELEASED],
            [part for part in parts if _has_name(part, slot)],
        ):
            if len(preferred) == 1:
                return preferred[0]
        rivals = [
            other
            for other in self._unique
            if other.kind == slot.kind and other.name not in components
        ]
        if len(parts) > 1:
            return self._pick_by_size(slot, rivals, parts)
        if not parts and slot.kind in self.contents.damaged:
            return read_network(slot.name, "transformers", self.contents.damaged[slot.kind])
        return parts[0] if parts else None

    def _pick_by_size(
        self, slot: Slot, rivals: Sequence[Slot], parts: Sequence[Component]
    ) -> Component:
        """Return the component for a slot where several slots are of its kind: smallest first.

        Raises:
            CheckpointError: it is left open which is meant.
        """
        sizes = [sum(entry.elements for entry in part.entries.values()) for part in parts]
        if len(parts) > len(rivals) or len(set(sizes)) < len(sizes):
            raise CheckpointError(
                f"there is more than one {slot.name} side by side",
                seen=f"{self.contents.path}: {_places(parts)}",
                hint="name the file itself as --model_path"
                if slot.role == "denoiser"
                else f"say which: --component {slot.name}=PLACE",
            )
        return parts[sizes.index(min(sizes))]


def given_parts(places: Mapping[str, Path]) -> dict[str, list[Component]]:
    """Return what lies at the places that the user named, as far as it can be read."""
    return {name: read_place(place) for name, place in places.items()}


def by_kind(contents: Contents) -> Checkpoint:
    """Return the components of no known family, under their folders' names or their kinds'.

    Raises:
        CheckpointError: what the user named cannot be read; it may be what would tell the family.
    """
    for name, place in contents.places.items():
        if not place.exists():
            raise nothing_at(name, place)
        read_part(place)
    components = dict(contents.components)
    for part in contents.loose:
        number = sum(name.split("#")[0] == part.name for name in components)
        components[f"{part.name}#{number + 1}" if number else part.name] = part
    return Checkpoint(
        path=contents.path,
        layout=contents.layout,
        components=components,
        index=contents.index,
        overrides=contents.places,
        broken=contents.broken,
        unread=contents.unread,
        name=contents.name,
    )


def several_models(contents: Contents) -> CheckpointError:
    """Return the error for a folder with denoisers of several models."""
    parts = [part for part in contents.loose if KINDS[part.kinds[0]].denoiser]
    return CheckpointError(
        "there is more than one model side by side",
        seen=f"{contents.path}: {_places(parts)}",
        hint="name the file itself as --model_path",
    )


def _alias(slot: Slot) -> str:
    return KINDS[slot.kind].shown if slot.kind in KINDS else slot.name


def _identity(part: Component) -> tuple[object, ...]:
    return part.folder, part.files, part.prefix, part.kinds


def _has_name(part: Component, slot: Slot) -> bool:
    return part.folder.name == slot.name


def _kind(part: Component) -> str | None:
    """Return a component's kind; None if it cannot be read, which is raised when it is checked."""
    try:
        return part.kind
    except CheckpointError:
        return None


def _places(parts: Iterable[Component]) -> str:
    return ", ".join(str(part.files[0] if part.files else part.folder) for part in parts)
