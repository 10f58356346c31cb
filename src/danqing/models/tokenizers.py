"""Tokenizers: their files as data, checked, and what transformers makes of a copy of them.

A tokenizer.json is a program: a pipeline with regular expressions that may never end on some text.
danqing knows the pipelines of its three kinds of tokenizer, so patterns are compared with those,
and vocabularies are taken as data. transformers opens a folder with checked copies alone: no class
name, no chat template and no file that was not looked at reaches it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from danqing.atomic import temporary_folder
from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError, OutputError
from danqing.files import read_regular
from danqing.models.config_tables import (
    FLAG,
    Field,
    Kind,
    choice,
    either,
    optional,
    read_config,
    several,
    text,
    whole,
)
from danqing.networks.of_transformers import load_tokenizer, sentencepiece_proto
from danqing.weights.json_file import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, parse_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MAX_TOKENS = 1_000_000
"""Entries of a vocabulary; Qwen2.5's has 151,665."""
MAX_ADDED = 10_000
MAX_PIECE = 512
"""Characters of one entry; Qwen2.5 has blanks of 128."""
MAX_EXPANSION = 256
"""Bytes that a character map may write for one character; 33 in Unicode's own."""
MAX_SENTENCEPIECE_BYTES = 16 << 20
_MAX_STEPS = 12
_MAX_LITERAL = 32

_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({
    _CLIP_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _CLIP_WORDS, _QWEN_WORDS, r"\s+", r" {2,}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
})  # fmt: skip
"""Regular expressions of the released tokenizers of CLIP, Qwen2, T5 and GPT-2: each is linear in
the text, or takes milliseconds for the longest prompt."""


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """A kind of tokenizer.

    Attributes:
        title: for messages.
        class_name: of transformers' class.
        model: type of its model in tokenizer.json.
        file_sets: sets of files, one of which it needs.
    """

    title: str
    class_name: str
    model: str
    file_sets: tuple[tuple[str, ...], ...]


CLIP = TokenizerKind(
    title="CLIP's",
    class_name="CLIPTokenizer",
    model="BPE",
    file_sets=(("tokenizer.json",), ("vocab.json", "merges.txt")),
)
QWEN2 = TokenizerKind(
    title="Qwen2's",
    class_name="Qwen2TokenizerFast",
    model="BPE",
    file_sets=(("tokenizer.json",), ("vocab.json", "merges.txt")),
)
T5 = TokenizerKind(
    title="T5's",
    class_name="T5TokenizerFast",
    model="Unigram",
    file_sets=(("tokenizer.json",), ("spiece.model",)),
)

KINDS = {"clip_tokenizer": CLIP, "t5_tokenizer": T5, "qwen2_tokenizer": QWEN2}
"""By the names that slots use."""

_TOKEN = either(
    text(MAX_PIECE),
    Field(lambda value: isinstance(value, dict) and _is_token(value), "a token's table"),
)
_TOKEN_LIST = several(_TOKEN, 0, MAX_ADDED)
_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip
_CONFIG = Kind(
    fields={
        **dict.fromkeys(_SPECIAL, optional(_TOKEN)),
        "additional_special_tokens": optional(_TOKEN_LIST),
        "extra_special_tokens": either(
            optional(_TOKEN_LIST),
            Field(
                lambda value: isinstance(value, dict)
                and len(value) <= MAX_ADDED
                and all(_TOKEN.accepts(item) for item in value.values()),
                "a table of tokens",
            ),
        ),
        "added_tokens_decoder": Field(
            lambda value: isinstance(value, dict)
            and len(value) <= MAX_ADDED
            and all(
                re.fullmatch(r"\d{1,7}", key) and isinstance(item, dict) and _is_token(item)
                for key, item in value.items()
            ),
            f"a table of at most {MAX_ADDED} tokens by id",
        ),
        "model_max_length": Field(
            lambda value: type(value) in (int, float) and value >= 1, "1 or more"
        ),
        "extra_ids": whole(0, 1000),
        "add_prefix_space": optional(FLAG), "do_lower_case": optional(FLAG),
        "errors": choice("replace", "strict", "ignore"),
        "padding_side": choice("right", "left"), "truncation_side": choice("right", "left"),
        "clean_up_tokenization_spaces": optional(FLAG), "split_special_tokens": optional(FLAG),
        "legacy": optional(FLAG), "add_bos_token": optional(FLAG), "add_eos_token": optional(FLAG),
    },
    fixed={"sp_model_kwargs": ({}, None)},
    unused=frozenset({
        "backend", "chat_template", "is_local", "local_files_only", "max_length",
        "model_input_names", "model_specific_special_tokens", "name_or_path", "pad_to_multiple_of",
        "pad_token_type_id", "processor_class", "special_tokens_map_file", "stride",
        "tokenizer_class", "tokenizer_file", "truncation_strategy", "use_fast", "vocab_file",
        "merges_file", "tokenizer_type", "from_slow", "image_token", "video_token", "extra_kwargs",
    }),
)  # fmt: skip
"""tokenizer_config.json: what it may say. Its chat template is a program, and is not used."""
_MODEL_KEYS = frozenset({
    "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges", "vocab", "merges", "unk_id",
})  # fmt: skip
_SIMPLE_STEPS = frozenset({
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer",
    "ByteLevel", "Metaspace", "WhitespaceSplit", "Whitespace", "Punctuation", "Digits",
    "BertPreTokenizer", "Fuse", "ByteFallback", "WordPiece", "BPEDecoder", "CTC",
})  # fmt: skip
"""Steps of a pipeline that hold no pattern of their own."""
_CLIP_FILES = ("vocab.json", "merges.txt")
_NAMES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer's files, checked.

    Attributes:
        name: of the component.
        folder: where they were read.
        contents: by file name, as they may be given to transformers.
        highest: the highest id of a token.
        notes: what was ignored, and why.
    """

    name: str
    folder: Path
    contents: Mapping[str, bytes] = field(repr=False)
    highest: int
    notes: tuple[str, ...] = ()


def read_tokenizer(kind: TokenizerKind, folder: Path, name: str) -> TokenizerFiles:
    """Read and check the files of a tokenizer, whatever class its config names.

    Args:
        kind: what it has to be.
        folder: with its files.
        name: of its component.

    Raises:
        CheckpointIncompleteError: it has no vocabulary.
        CheckpointDamagedError: a file is damaged, of another kind, or has an unknown pattern.
    """
    contents = {file: data for file in _NAMES if (data := _read(folder / file, name)) is not None}
    if not any(all(file in contents for file in files) for files in kind.file_sets):
        raise CheckpointIncompleteError(
            f"the {name} has no vocabulary",
            seen=f"{folder}: {', '.join(contents) or 'none of its files'}",
            allowed=" or ".join(" with ".join(files) for files in kind.file_sets),
        )
    return _Checker(kind, folder, name, contents).checked()


def open_tokenizer(kind: TokenizerKind, files: TokenizerFiles) -> Any:
    """Return transformers' tokenizer, made of a copy of the checked files.

    Raises:
        CheckpointDamagedError: transformers cannot make one of them.
    """
    import transformers

    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(temporary_folder())
            for name, data in files.contents.items():
                (scratch / name).write_bytes(data)
        except OSError as error:
            raise OutputError(
                "no temporary file can be written for the tokenizer",
                seen=f"{error.filename or 'TMPDIR'} ({error.strerror or error})",
                hint="set TMPDIR to a folder that can be written",
            ) from error
        try:
            return load_tokenizer(getattr(transformers, kind.class_name), scratch)
        except BaseException as error:
            if not is_parser_error(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise CheckpointDamagedError(
                f"the {files.name} cannot be loaded",
                seen=f"{files.folder}: {type(error).__name__}: {first[:200]}",
                hint="its vocabulary files are damaged, or of a newer transformers version",
            ) from error


def encode(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
    """Call a tokenizer.

    Raises:
        CheckpointDamagedError: its files make it fail on this text.
    """
    try:
        return tokenizer(*arguments, **options)
    except BaseException as error:
        if not is_parser_error(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointDamagedError(
            "the tokenizer fails on this prompt",
            seen=f"{type(error).__name__}: {first[:200]}",
            hint="its files are damaged: get them again from the model's release",
        ) from error


def is_parser_error(error: BaseException) -> bool:
    """Say whether an exception comes from a parser: a panic of Rust is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _read(path: Path, name: str) -> bytes | None:
    try:
        return read_regular(path, MAX_TOKENIZER_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointDamagedError(
            f"a file of the {name} cannot be read", seen=f"{path}: {error.strerror or error}"
        ) from error


class _Checker:
    """Checks one tokenizer's files."""

    def __init__(
        self, kind: TokenizerKind, folder: Path, name: str, contents: Mapping[str, bytes]
    ) -> None:
        self._kind = kind
        self._folder = folder
        self._name = name
        self._contents = contents
        self._highest = -1
        self._notes: list[str] = []

    def checked(self) -> TokenizerFiles:
        """Return the files as they may be given to transformers."""
        out: dict[str, bytes] = {}
        checks: Mapping[str, Callable[[bytes], bytes | None]] = {
            "tokenizer.json": self._whole,
            "vocab.json": self._vocabulary,
            "merges.txt": self._merges,
            "spiece.model": self._sentencepiece,
            "tokenizer_config.json": self._config,
            "special_tokens_map.json": self._config,
            "added_tokens.json": self._added,
        }
        for file, data in self._contents.items():
            if self._kind.model == "Unigram" and file in ("vocab.json", "merges.txt"):
                continue
            if self._kind.model == "BPE" and file == "spiece.model":
                continue
            try:
                checked = checks[file](data)
            except _UnusableError as error:
                raise self._damaged(file, str(error), error.allowed) from error
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise self._damaged(file, f"{str(error)[:200]}") from error
            if checked is not None:
                out[file] = checked
        if self._kind is CLIP and "tokenizer.json" in out and not out.keys() >= {*_CLIP_FILES}:
            out |= self._clip_files(json.loads(out["tokenizer.json"]))
        return TokenizerFiles(
            name=self._name,
            folder=self._folder,
            contents=out,
            highest=self._highest,
            notes=tuple(self._notes),
        )

    def _damaged(self, file: str, seen: str, allowed: str | None = None) -> CheckpointDamagedError:
        return CheckpointDamagedError(
            f"{file} of the {self._name} is not usable",
            seen=f"{self._folder / file}: {seen}",
            allowed=allowed,
            hint=f"get the files of {self._kind.title} tokenizer from the model's release",
        )

    # --- small files -----------------------------------------------------------------------------

    def _config(self, data: bytes) -> bytes:
        table = parse_table(data, MAX_CONFIG_BYTES)
        found = read_config(_CONFIG, table, name=self._name, place=self._folder)
        for key in found.values.get("added_tokens_decoder", {}):
            self._highest = max(self._highest, int(key))
        self._notes += found.notes
        return _written(found.values)

    def _added(self, data: bytes) -> bytes:
        table = parse_table(data, MAX_CONFIG_BYTES)
        self._check_vocabulary(table, MAX_ADDED)
        return _written(table)

    def _vocabulary(self, data: bytes) -> bytes:
        table = parse_table(data, MAX_TOKENIZER_BYTES)
        self._check_vocabulary(table, MAX_TOKENS)
        return _written(table)

    def _check_vocabulary(self, table: Mapping[str, Any], most: int) -> None:
        _require(len(table) <= most, f"{len(table)} tokens", f"at most {most}")
        for piece, number in table.items():
            if (
                type(number) is not int
                or not 0 <= number < 2 * MAX_TOKENS
                or len(piece) > MAX_PIECE
            ):
                raise _UnusableError(
                    f"{piece[:80]!r}: {str(number)[:80]}",
                    f"pieces of at most {MAX_PIECE} characters with their ids",
                )
        self._highest = max(self._highest, *table.values(), -1)

    def _merges(self, data: bytes) -> bytes:
        lines = data.decode("utf-8").split("\n")
        _require(len(lines) <= MAX_TOKENS, f"{len(lines)} lines", f"at most {MAX_TOKENS}")
        longest = max(lines, key=len, default="")
        _require(
            len(longest) <= 2 * MAX_PIECE + 1,
            f"a line of {len(longest)} characters",
            f"at most {2 * MAX_PIECE + 1}",
        )
        return data

    # --- tokenizer.json --------------------------------------------------------------------------

    def _whole(self, data: bytes) -> bytes:
        table = parse_table(data, MAX_TOKENIZER_BYTES)
        model = table.get("model")
        if not isinstance(model, dict):
            raise _UnusableError("it has no model", "a table named model")
        kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
        _require(
            kind == self._kind.model,
            f"a vocabulary of the kind {str(kind)[:40]}",
            f"{self._kind.model}, as {self._kind.title}",
        )
        _require(
            model.keys() <= _MODEL_KEYS,
            f"unknown: {', '.join(sorted(model.keys() - _MODEL_KEYS)[:5])[:200]}",
            ", ".join(sorted(_MODEL_KEYS)),
        )
        self._check_model(model, kind)
        added = table.get("added_tokens") or []
        self._check_added(added)
        steps = {
            step: table.get(step)
            for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        }
        for step, value in steps.items():
            if step == "post_processor":
                _check_post_processor(value)
            else:
                _check_steps(step, value)
        return _written(
            {
                "version": "1.0",
                "truncation": None,  # set with each call
                "padding": None,
                "added_tokens": added,
                **steps,
                "model": model,
            }
        )

    def _check_model(self, model: Mapping[str, Any], kind: str) -> None:
        for key, values in (
            ("dropout", (None, 0, 0.0)),
            ("byte_fallback", (None, False)),
            ("continuing_subword_prefix", (None, "")),
            ("end_of_word_suffix", (None, "", "</w>")),
            ("fuse_unk", (None, False, True)),
            ("ignore_merges", (None, False, True)),
        ):
            _require(
                any(model.get(key) == one for one in values),
                f"{key} is {str(model.get(key))[:80]}",
                ", ".join(map(str, values)),
            )
        vocabulary = model.get("vocab")
        if kind == "BPE":
            _require(isinstance(vocabulary, dict), "vocab is not a table", "a table of ids")
            self._check_vocabulary(vocabulary, MAX_TOKENS)  # type: ignore[arg-type]
            _check_pairs(model.get("merges"))
            return
        _require(isinstance(vocabulary, list) and bool(vocabulary), "vocab is not a list", "a list")
        pieces: list[Any] = vocabulary  # type: ignore[assignment]
        _require(len(pieces) <= MAX_TOKENS, f"{len(pieces)} tokens", f"at most {MAX_TOKENS}")
        for row in pieces:
            if not (
                isinstance(row, list)
                and len(row) == 2  # noqa: PLR2004
                and isinstance(row[0], str)
                and len(row[0]) <= MAX_PIECE
                and _is_score(row[1])
            ):
                raise _UnusableError(
                    f"an entry {str(row)[:80]}",
                    f"a piece of at most {MAX_PIECE} characters with its score",
                )
        self._highest = max(self._highest, len(pieces) - 1)
        unknown = model.get("unk_id")
        _require(
            unknown is None or (type(unknown) is int and 0 <= unknown < len(pieces)),
            f"unk_id is {str(unknown)[:80]}",
            f"0 to {len(pieces) - 1}",
        )

    def _clip_files(self, table: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the two files that transformers 4 reads in place of tokenizer.json."""
        vocabulary = {row["content"]: row["id"] for row in table["added_tokens"]}
        merges = [
            row if isinstance(row, str) else " ".join(row) for row in table["model"]["merges"]
        ]
        texts = (
            _written({**vocabulary, **table["model"]["vocab"]}),
            "\n".join(["#version: 0.2", *merges, ""]).encode(),
        )
        return dict(zip(_CLIP_FILES, texts, strict=True))

    def _check_added(self, added: object) -> None:
        _require(
            isinstance(added, list) and len(added) <= MAX_ADDED,
            "added_tokens",
            f"a list of at most {MAX_ADDED}",
        )
        rows: list[Any] = added  # type: ignore[assignment]
        for row in rows:
            _require(
                isinstance(row, dict) and _is_token(row) and type(row.get("id")) is int,
                f"an added token {str(row)[:80]}",
                f"a text of at most {MAX_PIECE} characters with its id",
            )
            _require(0 <= row["id"] < 2 * MAX_TOKENS, f"the id {row['id']}", "an id in range")
            self._highest = max(self._highest, row["id"])

    # --- spiece.model ----------------------------------------------------------------------------

    def _sentencepiece(self, data: bytes) -> bytes | None:
        """Check a sentencepiece model, read by protobuf's own reader alone."""
        if "tokenizer.json" in self._contents:
            return None  # the other file says it all
        _require(
            len(data) <= MAX_SENTENCEPIECE_BYTES,
            f"{len(data)} bytes",
            f"at most {MAX_SENTENCEPIECE_BYTES}",
        )
        proto = _parse_sentencepiece(data)
        pieces = proto.pieces
        _require(
            0 < len(pieces) <= MAX_TOKENS, f"{len(pieces)} pieces", f"1 to {MAX_TOKENS} pieces"
        )
        _require(
            proto.trainer_spec.model_type == 1,
            f"a model of type {proto.trainer_spec.model_type}",
            "1, Unigram",
        )
        for row in pieces:
            if not 0 < len(row.piece) <= MAX_PIECE or not _is_score(row.score):
                raise _UnusableError(
                    f"an entry {row.piece[:80]!r}, {row.score}",
                    f"a piece of 1 to {MAX_PIECE} characters with its score",
                )
        unknown = proto.trainer_spec.unk_id
        _require(0 <= unknown < len(pieces), f"unk_id is {unknown}", f"0 to {len(pieces) - 1}")
        _check_map(proto.normalizer_spec.precompiled_charsmap)
        self._highest = max(self._highest, len(pieces) - 1)
        return data


class _UnusableError(ValueError):
    """A file says something that is not allowed."""

    def __init__(self, seen: str, allowed: str) -> None:
        super().__init__(seen)
        self.allowed = allowed


def _require(holds: bool, seen: str, allowed: str) -> None:  # noqa: FBT001
    if not holds:
        raise _UnusableError(seen, allowed)


def _written(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, ensure_ascii=False).encode()


def _is_token(row: Mapping[str, Any]) -> bool:
    content = row.get("content")
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return (
        isinstance(content, str)
        and 0 < len(content) <= MAX_PIECE
        and row.keys() <= {"id", "content", "__type", *flags}
        and all(type(row.get(flag, False)) is bool for flag in flags)
        and row.get("__type", "AddedToken") == "AddedToken"
    )


def _is_score(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) < 1e9  # noqa: PLR2004
    )


def _check_pairs(merges: object) -> None:
    _require(
        isinstance(merges, list) and len(merges) <= MAX_TOKENS,
        "merges",
        f"a list of at most {MAX_TOKENS}",
    )
    rows: list[Any] = merges  # type: ignore[assignment]
    for row in rows:
        parts = row.split(" ") if isinstance(row, str) else row
        if not (
            isinstance(parts, list)
            and len(parts) == 2  # noqa: PLR2004
            and all(isinstance(part, str) and len(part) <= MAX_PIECE for part in parts)
        ):
            raise _UnusableError(f"a merge {str(row)[:80]}", "two pieces")


def _check_steps(name: str, value: object) -> None:
    """See that every step of a pipeline is one that ends, with a known pattern if it has one."""
    if value is None:
        return
    for step in _flat(name, value):
        kind = step.get("type")
        if kind in ("Replace", "Split"):
            _check_pattern(name, step.get("pattern"))
            _check_literal(name, step.get("content", ""))
        elif kind == "Precompiled":
            encoded = step.get("precompiled_charsmap")
            _require(isinstance(encoded, str), f"{name}: a character map", "base64")
            try:
                _check_map(base64.b64decode(str(encoded), validate=True))
            except binascii.Error as error:
                raise _UnusableError(f"{name}: a character map: {error}", "base64") from error
        elif kind == "Prepend":
            _check_literal(name, step.get("prepend"))
        else:
            _require(
                kind in _SIMPLE_STEPS,
                f"{name}: {str(kind)[:80]}",
                f"one of {', '.join(sorted(_SIMPLE_STEPS))}",
            )
            _check_options(name, step)


def _flat(name: str, value: object) -> list[dict[str, Any]]:
    """Return the steps of a pipeline, of sequences within sequences too."""
    found: list[dict[str, Any]] = []
    waiting: list[object] = [value]
    while waiting:
        step = waiting.pop()
        _require(isinstance(step, dict), f"{name}: {str(step)[:80]}", "a step with its type")
        row: dict[str, Any] = step  # type: ignore[assignment]
        if row.get("type") == "Sequence":
            inner = [row[key] for key in ("normalizers", "pretokenizers", "decoders") if key in row]
            _require(len(inner) == 1 and isinstance(inner[0], list), f"{name}: Sequence", "a list")
            waiting += inner[0]
        else:
            found.append(row)
        _require(
            len(found) + len(waiting) <= _MAX_STEPS, f"{name}: many steps", f"{_MAX_STEPS} steps"
        )
    return found


def _check_options(name: str, step: Mapping[str, Any]) -> None:
    for key, value in step.items():
        _require(
            value is None
            or type(value) in (bool, int)
            or (isinstance(value, str) and len(value) <= _MAX_LITERAL),
            f"{name}: {key[:80]} is {str(value)[:80]}",
            "true, false, a whole number or a short text",
        )


def _check_literal(name: str, value: object) -> None:
    _require(
        isinstance(value, str) and len(value) <= _MAX_LITERAL,
        f"{name}: {str(value)[:80]!r}",
        f"a text of at most {_MAX_LITERAL} characters",
    )


def _check_pattern(name: str, pattern: object) -> None:
    """Accept a plain text, or a regular expression of a released tokenizer."""
    if isinstance(pattern, dict) and pattern.keys() == {"String"}:
        literal = pattern["String"]
        _check_literal(name, literal)
        _require(bool(literal), f"{name}: an empty pattern", "a text")
        return
    expression = pattern.get("Regex") if isinstance(pattern, dict) else pattern
    _require(
        isinstance(expression, str) and expression in PATTERNS,
        f"{name}: the pattern {str(expression)[:120]!r}",
        "a regular expression of the released tokenizers of CLIP, Qwen2, T5 or GPT-2",
    )


def _check_post_processor(value: object) -> None:
    """See that a post-processor is a short template."""
    if value is None:
        return
    _require(isinstance(value, dict), f"post_processor: {str(value)[:80]}", "a table")
    table: dict[str, Any] = value  # type: ignore[assignment]
    kind = table.get("type")
    if kind == "Sequence":
        inner = table.get("processors")
        _require(
            isinstance(inner, list) and len(inner) <= _MAX_STEPS,
            "post_processor: Sequence",
            f"at most {_MAX_STEPS} steps",
        )
        for step in inner or []:
            _require(
                not (isinstance(step, dict) and step.get("type") == "Sequence"),
                "post_processor: a sequence in a sequence",
                "one sequence",
            )
            _check_post_processor(step)
        return
    _require(
        kind in ("ByteLevel", "RobertaProcessing", "BertProcessing", "TemplateProcessing"),
        f"post_processor: {str(kind)[:80]}",
        "ByteLevel, RobertaProcessing, BertProcessing or TemplateProcessing",
    )
    size = len(json.dumps(table, ensure_ascii=False))
    _require(size <= _MAX_TEMPLATE, f"post_processor: {size} characters", f"{_MAX_TEMPLATE}")


_MAX_TEMPLATE = 4000


def _parse_sentencepiece(data: bytes) -> Any:
    proto = sentencepiece_proto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's own kinds of error differ from version to version
        seen = f"not a sentencepiece model: {str(error)[:200]}"
        raise _UnusableError(seen, "spiece.model") from error
    return proto


def _check_map(data: bytes) -> None:
    """Check a sentencepiece character map: a trie as a double array, then the texts it writes.

    Format: https://github.com/google/sentencepiece, normalizer.cc: four bytes with the trie's
    length, the trie in units of four bytes, and texts that end in zero.
    """
    if not data:
        return
    length = int.from_bytes(data[:4], "little")
    _require(
        len(data) >= 8 and length % 4 == 0 and 4 <= length <= len(data) - 4,  # noqa: PLR2004
        f"a character map of {len(data)} bytes with a trie of {length}",
        "a whole map",
    )
    texts = data[4 + length :]
    longest = max((len(piece) for piece in texts.split(b"\0")), default=0)
    _require(
        longest <= MAX_EXPANSION,
        f"a character map that writes {longest} bytes for a character",
        f"at most {MAX_EXPANSION} bytes",
    )
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        raise _UnusableError("a character map that writes no text", "UTF-8") from error
    _check_trie(data[4 : 4 + length], texts)


def _check_trie(trie: bytes, texts: bytes) -> None:
    """See that every way through the trie stays within it and within the texts.

    A unit has a label in its low byte, a flag that a value follows in bit 8, bit 9 whether the
    offset is scaled by 256, and the offset from bit 10; a value's unit has bit 31 set.
    """
    import numpy as np

    units = np.frombuffer(trie, dtype="<u4").astype(np.int64)
    count = len(units)
    shift = (units & (1 << 9)) >> 6
    offsets = (units >> 10) << shift
    labels = units & (1 << 31 | 0xFF)
    seen = np.zeros(count, dtype=bool)
    nodes = np.array([int(offsets[0])], dtype=np.int64)
    letters = np.arange(1, 256, dtype=np.int64)
    letters_of_texts = np.frombuffer(texts, dtype=np.uint8)
    while len(nodes):
        _require(bool((nodes < count).all()), "a trie that leads beyond its end", "a whole trie")
        children = (nodes[:, None] ^ letters).reshape(-1)
        wanted = np.tile(letters, len(nodes))
        inside = children < count
        # a child beyond the end is looked up too: readers do not check
        _require(bool(inside.all()), "a trie that leads beyond its end", "a whole trie")
        hit = labels[children] == wanted
        children = np.unique(children[hit])
        children = children[~seen[children]]
        seen[children] = True
        targets = children ^ offsets[children]
        leaves = targets[(units[children] & (1 << 8)) != 0]
        _require(bool((leaves < count).all()), "a trie that leads beyond its end", "a whole trie")
        values = units[leaves] & ((1 << 31) - 1)
        _require(
            bool((values < len(texts)).all()), "a trie that points beyond its texts", "a whole trie"
        )
        _require(
            bool(((letters_of_texts[values] & 0xC0) != 0x80).all()),  # noqa: PLR2004
            "a trie that points into the middle of a character",
            "a whole trie",
        )
        nodes = np.unique(targets)
