"""Layouts: how people's weights lie on disk. One reader and one row for each.

A reader recognises a place by what is in it (index files, tensor names), never by the name of a
folder or file, and returns components under diffusers' names.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    RequestError,
    UnknownModelError,
    UnsafeFileError,
)
from danqing.files import expand
from danqing.weights.checkpoint import Checkpoint, Component, too_many_tensors, under
from danqing.weights.deepgen_pt import LAYOUT as DEEPGEN_PT
from danqing.weights.deepgen_pt import read_deepgen_pt, with_adapters
from danqing.weights.files import open_tensors
from danqing.weights.gguf_file import GgufFile
from danqing.weights.json_file import (
    MAX_INDEX_BYTES,
    MAX_TOKENIZER_BYTES,
    parse_table,
    read_json,
)
from danqing.weights.places import BUILT_IN, find
from danqing.weights.quantised import refuse_foreign
from danqing.weights.tensor_file import MAX_TENSORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.weights.tensor_file import TensorFile

ALIASES = {
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "t5_tokenizer": "tokenizer_2",
    "clip_tokenizer": "tokenizer",
    "dit": "transformer",
}
"""Short names accepted by `--component`."""

SIGNATURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformer", "bfl", ("double_blocks.0.img_attn.qkv.weight",)),
    ("transformer", "diffusers", ("transformer_blocks.0.attn.to_q.weight",)),
    ("vae", "bfl", ("decoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight")),
    (
        "vae",
        "diffusers",
        ("decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"),
    ),
    ("text_encoder_2", "transformers", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    ("text_encoder", "transformers", ("text_model.embeddings.token_embedding.weight",)),
    ("text_encoder", "transformers", ("embeddings.token_embedding.weight",)),
    ("connector", "deepgen", ("meta_queries", "projector_1.weight", "projector_3.weight")),
    (
        "vlm",
        "transformers",
        ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
    ),
    (
        "vlm",
        "transformers",
        (
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "model.visual.blocks.0.attn.qkv.weight",
        ),
    ),
    ("text_encoder_2", "llama.cpp", ("enc.blk.0.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight")),
)
"""Component, style of names, and tensors that only such a file has."""

PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_l.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.t5xxl.",
    "vae.",
    "first_stage_model.",
)
"""What tools put before the names of a component: ComfyUI, where several share a file."""

_TOKENIZERS = {
    "tokenizer_2": (("spiece.model",), "Unigram"),
    "tokenizer": (("vocab.json", "merges.txt"), "BPE"),
}
"""Of each: files that only its kind has, and the kind of model in its tokenizer.json."""
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt")
_ENCODER_OF = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
_READERS = {"vlm": "tokenizer", "text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Networks in whose folder their tokenizer may lie."""
_MODEL_TYPES = {
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "clip_text_model": "text_encoder",
    "qwen2_5_vl": "vlm",
}
PART = "part of a model"
EMBEDDED = "danqing.config"
"""Key of a config in a file's metadata, with the component's name behind it."""
_WITH_CONFIG = ("diffusers", "transformers")
_WITHOUT_CONFIG = ("deepgen",)
"""Styles whose shapes say all that a config would."""
_SMALL = re.compile(r"(Tokenizer(Fast)?|Scheduler|Processor(Fast)?|Extractor)$")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors$")
_ENDINGS = (".safetensors", ".sft", ".gguf")
_MAX_SHARDS = 1000
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")


@dataclass(frozen=True)
class Layout:
    """One way weights lie on disk.

    Attributes:
        name: as shown to the user.
        matches: whether a place (a folder or a file that exists) is of this layout.
        read: what is found there, given the names of components that come from elsewhere.
    """

    name: str
    matches: Callable[[_Place], bool]
    read: Callable[[Path, frozenset[str]], _Contents]


@dataclass(kw_only=True)
class _Contents:
    """What a reader found: components, those it cannot read, and files it cannot read."""

    components: dict[str, Component]
    broken: dict[str, CheckpointError] = field(default_factory=dict)
    unread: dict[Path, CheckpointError] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """A folder or a file that exists, and the transformers in the files directly there."""

    path: Path

    @cached_property
    def transformers(self) -> list[tuple[Component, int]]:
        """Each with the number of other components in its file."""
        files = [_read_file(path) for path in _loose(self.path)]
        return [
            (part, len(parts) - 1)
            for parts in files
            for part in parts
            if part.name == "transformer"
        ]


def open_checkpoint(
    path: str | Path,
    components: Mapping[str, str | Path] | None = None,
    *,
    allow_pt: bool = False,
) -> Checkpoint:
    """Find and recognise a checkpoint; reads indexes, configs and headers, no weights.

    Args:
        path: a folder or a file, the name of a model that comes with danqing, or an id of a hub,
            which is looked up in the caches on this disk.
        components: places of single components, which win over what lies at `path`.
        allow_pt: `path` is a file written by `torch.save`, and may be opened (of tensors only).

    Raises:
        CheckpointError: nothing usable is there; the message says what is.
        RequestError: a component name is unknown.
    """
    try:
        return _open(path, components or {}, allow_pt=allow_pt)
    except OSError as error:  # no permission, a name that is too long, a disk that fails
        raise CheckpointNotFoundError(
            "the path cannot be read", seen=f"{str(path)[:200]} ({error.strerror or error})"
        ) from error


def open_part(path: str | Path) -> Checkpoint:
    """Open a file or a folder that is one component of a model, or some, but no whole model.

    Raises:
        CheckpointError: nothing is recognised there.
    """
    place = find(path)
    parts = _read_part(place)
    if not parts:
        raise _nothing_recognised(place)
    return Checkpoint(path=place, layout=PART, components={part.name: part for part in parts})


def _open(path: str | Path, components: Mapping[str, str | Path], *, allow_pt: bool) -> Checkpoint:
    place = find(path)
    if allow_pt:
        return _open_pt(place, components)
    if place.name == "model_index.json":
        place = place.parent
    looked_at = _Place(place)
    layout = next((row for row in LAYOUTS if row.matches(looked_at)), None)
    if layout is None:
        raise _nothing_recognised(place)
    overrides, given = _read_overrides(components)
    contents = layout.read(place, frozenset(given))
    index = place / "model_index.json"
    return Checkpoint(
        path=place,
        layout=layout.name,
        components=contents.components | given,
        broken=contents.broken,
        unread=contents.unread,
        index=read_json(index) if layout.name == DIFFUSERS_FOLDER and _exists(index) else {},
        overrides=overrides,
        name=next((name for name, where in BUILT_IN.items() if where == place), None),
    )


def _read_overrides(
    components: Mapping[str, str | Path],
) -> tuple[dict[str, Path], dict[str, Component]]:
    """Return the places that the user gave, and the components found there."""
    overrides = {
        ALIASES.get(name, name): expand(where).absolute() for name, where in components.items()
    }
    given: dict[str, Component] = {}
    for name, where in overrides.items():
        found = _read_override(name, where)  # an encoder's folder may hold its tokenizer too
        given |= {key: part for key, part in found.items() if key == name or key not in overrides}
    return overrides, given


def _open_pt(place: Path, components: Mapping[str, str | Path]) -> Checkpoint:
    """Open the one pickle that the user named, with the components it lacks from elsewhere."""
    if not place.is_file():
        raise RequestError(
            "--allow-pt is for a single file", seen=place, allowed="a file written by torch.save"
        )
    overrides, given = _read_overrides(components)
    parts, adapters = read_deepgen_pt(place)
    if adapters and "vlm" in given:
        given["vlm"] = with_adapters(given["vlm"], adapters)
    return Checkpoint(
        path=place, layout=DEEPGEN_PT, components={**parts, **given}, overrides=overrides
    )


# --- diffusers folder ----------------------------------------------------------------------------

DIFFUSERS_FOLDER = "diffusers folder"


def _is_diffusers_folder(place: _Place) -> bool:
    folder = place.path
    if not _exists(folder / "model_index.json"):
        return all((folder / name / "config.json").is_file() for name in ("transformer", "vae"))
    return any((folder / name).is_dir() for name in ("transformer", "unet")) or not _loose(folder)


def _read_diffusers_folder(place: Path, elsewhere: frozenset[str]) -> _Contents:
    found = _Contents(components={})
    index = place / "model_index.json"
    table = read_json(index) if _exists(index) else {}
    for name, row in table.items():
        if name.startswith("_") or not isinstance(row, list) or len(row) != 2 or None in row:  # noqa: PLR2004
            continue
        library, class_name = map(str, row)
        if not re.fullmatch(r"\w+", name):
            raise CheckpointDamagedError("model_index.json names an odd component", seen=name)
        if name in elsewhere or not (place / name).is_dir():
            continue  # said when it is asked for: it may come from --component
        try:
            if _SMALL.search(class_name):
                found.components[name] = _small(name, place / name)
            else:
                style = "transformers" if library == "transformers" else "diffusers"
                found.components[name] = _network(name, style, place / name)
        except CheckpointError as error:
            found.broken[name] = error  # raised when it is asked for
    unlisted = [child for child in place.iterdir() if child.is_dir() and child.name not in table]
    _add_unlisted(found, sorted(unlisted), elsewhere)
    return found


def _add_unlisted(found: _Contents, folders: Iterable[Path], elsewhere: frozenset[str]) -> None:
    """Add what the index does not name, by what is in it: some pipelines load it on their own."""
    for folder in folders:
        name = folder.name
        if name in _TOKENIZERS and name not in elsewhere and _has_tokenizer(folder):
            found.components[name] = _small(name, folder)  # the folder's name says what it is
            continue
        try:
            for part in _read_part(folder, elsewhere):
                found.components.setdefault(part.name, part)
        except CheckpointError as error:
            found.broken[folder.name] = error


def _small(name: str, folder: Path) -> Component:
    kind = name.split("_", maxsplit=1)[0]  # tokenizer_2 has a tokenizer_config.json
    config = folder / f"{kind}_config.json"
    return Component(
        name=name,
        style="files",
        folder=folder,
        config=read_json(config) if _exists(config) else None,
    )


def _network(name: str, style: str, folder: Path, *, optional: bool = False) -> Component:
    """Return a network in a folder of its own; `optional`: whether it may lack a config."""
    files = _weight_files(name, folder)
    return Component(
        name=name,
        style=style,
        folder=folder,
        files=files,
        config=None if optional else read_json(folder / "config.json"),
    )


def _weight_files(name: str, folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder: those of its index, or the only ones."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    if indexes:
        return _indexed(name, folder, indexes[0])
    found = sorted(folder.glob("*.safetensors"), key=lambda path: (len(path.name), path.name))
    shards = [match for path in found if (match := _SHARD.match(path.name))]
    if shards:
        total = int(shards[0]["total"])
        wanted = [f"{shards[0]['stem']}-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
        return _all_there(name, folder, wanted)
    if found:
        return (found[0],)  # the shortest name: variants (model.fp16.safetensors) come after it
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsafeFileError(
            f"{name} is there only as a Python pickle, which can run code when it is opened",
            seen=pickles[0],
            allowed="safetensors files",
            hint="get the model's safetensors release",
        )
    raise CheckpointIncompleteError(
        f"{name} has no weights file", seen=folder, allowed="*.safetensors"
    )


def _indexed(name: str, folder: Path, index: Path) -> tuple[Path, ...]:
    table = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointDamagedError("the index of shards has no weight_map", seen=index)
    names = sorted(set(table.values()))
    if len(table) > MAX_TENSORS or len(names) > _MAX_SHARDS:
        raise CheckpointDamagedError(
            "the index of shards is too long",
            seen=f"{index}: {len(table)} tensors in {len(names)} files",
            allowed=f"{MAX_TENSORS} tensors in {_MAX_SHARDS} files",
        )
    if odd := [file for file in names if Path(file).name != file]:
        raise CheckpointDamagedError(
            "the index of shards names a file outside its folder", seen=f"{index}: {odd[0][:200]}"
        )
    if odd := [file for file in names if not file.endswith(_ENDINGS[:2])]:
        raise CheckpointDamagedError(
            "the index of shards names a file of another format",
            seen=f"{index}: {odd[0][:200]}",
            allowed="*.safetensors",
        )
    files = _all_there(name, folder, names)
    held: dict[str, str] = {}
    for path in files:
        held |= dict.fromkeys(open_tensors(path).entries, path.name)
        if len(held) > MAX_TENSORS:
            raise too_many_tensors(name, folder)
    wrong = sorted(tensor for tensor, file in table.items() if held.get(tensor) != file)
    if wrong:
        raise CheckpointIncompleteError(
            f"the shards of {name} do not hold what their index says",
            seen=f"{len(wrong)} tensors, the first is {wrong[0]} in {table[wrong[0]]}",
            hint="the shards are of different releases; download them again",
        )
    return files


def _all_there(name: str, folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    files = tuple(folder / file for file in names)
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointIncompleteError(
            f"{len(missing)} of {len(files)} weights files of {name} are missing",
            seen=f"{folder}: no {', '.join(missing)}",
            hint="the download is not complete; finish it",
        )
    return files


# --- loose files ---------------------------------------------------------------------------------

ALL_IN_ONE = "ComfyUI all-in-one file"
GGUF_FILES = "GGUF files"
COMFY_FILES = "ComfyUI files"
BFL_FILES = "BFL files"
SINGLE_FILES = "diffusers files"


def _is_all_in_one(place: _Place) -> bool:
    return any(beside for _, beside in place.transformers)


def _is_gguf(place: _Place) -> bool:
    return any(isinstance(open_tensors(part.files[0]), GgufFile) for part, _ in place.transformers)


def _is_comfy(place: _Place) -> bool:
    return any(part.prefix for part, _ in place.transformers)


def _is_bfl_files(place: _Place) -> bool:
    return any(part.style == "bfl" for part, _ in place.transformers)


def _is_single_files(place: _Place) -> bool:
    return bool(place.transformers)


def _read_loose(place: Path, elsewhere: frozenset[str]) -> _Contents:
    """Take the components in files and encoders' folders that lie side by side.

    Beside a file that was named, one that cannot be read may be of no concern; it is told if
    something is missing.
    """
    unread: dict[Path, CheckpointError] = {}
    folder = place if place.is_dir() else place.parent
    beside = [*_loose(folder), *sorted(child for child in folder.iterdir() if child.is_dir())]
    found: dict[str, list[Component]] = {}
    for path in beside:
        try:
            parts = _read_part(path, elsewhere)
        except CheckpointError as error:
            if not place.is_file() or path == place:
                raise
            unread[path] = error
            continue
        for part in parts:
            found.setdefault(part.name, []).append(part)
    if place.is_file():  # then what it holds is meant, whatever lies beside it
        found |= {part.name: [part] for part in _read_part(place, elsewhere)}
    for name, encoder in _ENCODER_OF.items():  # an encoder's own folder is its tokenizer's home
        homes = [part.folder for part in found.get(encoder, [])]
        if own := [part for part in found.get(name, []) if part.folder in homes]:
            found[name] = own
    networks_first = sorted(found, key=lambda name: name in _ENCODER_OF)
    components = {name: _only(name, found[name], folder) for name in networks_first}
    return _Contents(components=components, unread=unread)


def _only(name: str, parts: list[Component], folder: Path) -> Component:
    """Return the one candidate, or the only one in the BFL release's own names."""
    native = [part for part in parts if part.style == "bfl"]
    if len(native) == 1:
        return native[0]
    if len(parts) > 1:
        places = [str(part.files[0] if part.files else part.folder) for part in parts]
        raise CheckpointError(
            f"there is more than one {name} side by side",
            seen=f"{folder}: {', '.join(places)}",
            hint="name the file itself as --model_path"
            if name == "transformer"
            else f"say which: --component {name}=PLACE",
        )
    return parts[0]


# --- parts of any layout -------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    """Say whether anything has this name: what is no regular file is an error when it is read."""
    return os.path.lexists(path)


def _loose(place: Path) -> list[Path]:
    """Return the files of tensors lying directly at a place."""
    if place.is_file():
        return [place]
    return sorted(path for ending in _ENDINGS for path in place.glob(f"*{ending}"))


def _signature(tensors: Mapping[str, object]) -> tuple[str, str] | None:
    for component, style, names in SIGNATURES:
        if all(name in tensors for name in names):
            return component, style
    return None


def _read_part(path: Path, elsewhere: frozenset[str] = frozenset()) -> list[Component]:
    """Return the components a file or a flat folder holds; nothing if it is something else."""
    parts = _read_file(path) if path.is_file() else _read_folder(path, elsewhere)
    return [part for part in parts if part.name not in elsewhere]


def _embedded_config(file: TensorFile, name: str) -> dict[str, Any] | None:
    """Return a component's config from the file's own metadata, where danqing writes it."""
    text = file.metadata.get(f"{EMBEDDED}.{name}")
    if not isinstance(text, str):
        return None
    try:
        return parse_table(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise CheckpointDamagedError(
            f"the config of {name} in the file's metadata is not a JSON table",
            seen=f"{file.path}: {str(error)[:200]}",
        ) from error


def _read_file(path: Path) -> list[Component]:
    """Return the components in a file, told by the names of its tensors."""
    file = open_tensors(path)
    parts = []
    for prefix in PREFIXES:
        recognised = _signature(under(prefix, file.entries))
        if recognised is not None:
            name, style = recognised
            parts.append(_file_component(name, style, file, prefix))
    return parts


def _file_component(name: str, style: str, file: TensorFile, prefix: str) -> Component:
    folder = file.path.parent
    beside = folder / "config.json"
    config = _embedded_config(file, name)
    if config is None and not prefix and style in _WITH_CONFIG and _exists(beside):
        config = read_json(beside)
    return Component(
        name=name, style=style, folder=folder, files=(file.path,), config=config, prefix=prefix
    )


def _read_folder(path: Path, elsewhere: frozenset[str]) -> list[Component]:
    parts = [
        Component(name=name, style="files", folder=path)
        for name in _TOKENIZERS
        if _is_tokenizer(name, path)
    ]
    if _exists(path / "scheduler_config.json"):
        parts.append(_small("scheduler", path))
    has_config, has_weights = _exists(path / "config.json"), any(path.glob("*.safetensors*"))
    config = read_json(path / "config.json") if has_config else {}
    expected = _MODEL_TYPES.get(str(config.get("model_type")), "")
    if expected in elsewhere or not (expected or has_weights):
        return parts
    network = _network(expected or path.name, "transformers", path, optional=not has_config)
    recognised = _signature(network.entries)
    if recognised and (has_config or recognised[1] in _WITHOUT_CONFIG):
        parts.append(replace(network, name=recognised[0], style=recognised[1]))
    return parts


def _is_tokenizer(name: str, folder: Path) -> bool:
    """Say whether a folder holds such a tokenizer, by its files and never by a class's name."""
    files, kind = _TOKENIZERS[name]
    if all((folder / file).is_file() for file in files):
        return True
    if any(
        all((folder / file).is_file() for file in others)
        for other, (others, _) in _TOKENIZERS.items()
        if other != name
    ):
        return False
    return _vocabulary_kind(folder) == kind


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def _vocabulary_kind(folder: Path) -> str | None:
    """Return the kind of model in a folder's tokenizer.json; None if there is none."""
    path = folder / "tokenizer.json"
    if not _exists(path):
        return None
    model = read_json(path, MAX_TOKENIZER_BYTES).get("model")
    if not isinstance(model, dict):
        return None
    return str(model.get("type") or ("BPE" if "merges" in model else "Unigram"))


def _read_override(name: str, place: Path) -> dict[str, Component]:
    allowed = {row[0] for row in SIGNATURES} | set(_TOKENIZERS) | {"scheduler"}
    if name not in allowed:
        raise RequestError(
            "there is no such component",
            seen=name,
            allowed=", ".join(sorted(allowed | set(ALIASES))),
        )
    if not place.exists():
        raise CheckpointNotFoundError(f"there is nothing at the place of {name}", seen=place)
    if name == "scheduler":
        folder = place if place.is_dir() else place.parent
        config = read_json(folder / "scheduler_config.json")
        return {name: Component(name=name, style="files", folder=folder, config=config)}
    if place.is_dir() and not any(place.glob("*.safetensors*")) and name not in _TOKENIZERS:
        _weight_files(name, place)  # raises: says what is missing, or that it is a pickle
    parts = {part.name: part for part in _read_part(place)}
    if name not in parts:
        if name in _TOKENIZERS:
            raise _not_the_tokenizer(name, place)
        raise UnknownModelError(
            f"this is no {name}",
            seen=f"{place}: {', '.join(parts) or 'nothing that danqing recognises'}",
        )
    return {key: part for key, part in parts.items() if key in (name, _READERS.get(name))}


def _not_the_tokenizer(name: str, place: Path) -> UnknownModelError:
    files, kind = _TOKENIZERS[name]
    present = [file for file in _TOKENIZER_FILES if (place / file).is_file()]
    held = _vocabulary_kind(place) if place.is_dir() else None
    return UnknownModelError(
        f"this is not a {name}",
        seen=f"{place}: {', '.join(present) or 'none of its files'}"
        + (f", a vocabulary of the kind {held[:40]}" if held else ""),
        allowed=f"a folder with {' and '.join(files)}, or a tokenizer.json of the kind {kind}",
    )


def _nothing_recognised(place: Path) -> CheckpointError:
    if place.is_file():
        entries = open_tensors(place).entries  # raises if it is damaged or foreign
        refuse_foreign(entries)
        names = list(entries)
        parts = _read_file(place)
        if parts:
            return CheckpointIncompleteError(
                f"this file is only a {parts[0].name}, not a whole model",
                seen=place,
                hint="give the model's folder, and this file as "
                f"--component {parts[0].name}={place}",
            )
        return UnknownModelError(
            "the tensors are of no model danqing knows",
            seen=f"{place}: {len(names)} tensors, such as {', '.join(names[:3])}",
            allowed=", ".join(row.name for row in LAYOUTS),
        )
    if (place.parent / "model_index.json").is_file():
        return CheckpointIncompleteError(
            "this folder is one component of a model",
            seen=place,
            hint=f"give the folder above it: {place.parent}",
        )
    inside = sorted(path.name for path in place.iterdir())
    pickles = [path for pattern in _PICKLES for path in place.glob(pattern)]
    if pickles and not _loose(place):
        return UnsafeFileError(
            "the folder holds only Python pickles, which can run code when they are opened",
            seen=pickles[0],
            allowed="safetensors files",
        )
    return UnknownModelError(
        "nothing in this folder is laid out in a way danqing knows",
        seen=f"{place}: {', '.join(inside[:8]) or 'empty'}{' ...' if len(inside) > 8 else ''}",  # noqa: PLR2004
        allowed="; ".join(row.name for row in LAYOUTS),
        hint="a diffusers folder has a model_index.json; a BFL folder has flux1-*.safetensors",
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout(DIFFUSERS_FOLDER, _is_diffusers_folder, _read_diffusers_folder),
    Layout(ALL_IN_ONE, _is_all_in_one, _read_loose),
    Layout(GGUF_FILES, _is_gguf, _read_loose),
    Layout(COMFY_FILES, _is_comfy, _read_loose),
    Layout(BFL_FILES, _is_bfl_files, _read_loose),
    Layout(SINGLE_FILES, _is_single_files, _read_loose),
)
