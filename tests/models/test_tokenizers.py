"""Tokenizers: known by their files whatever class saved them, and no pattern runs away."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

import danqing
from danqing import models
from danqing.errors import CheckpointError, TensorMismatchError, UnknownModelError
from danqing.models import tokenizers
from danqing.request import MAX_PROMPT_CHARACTERS
from tests import deepgen_toys, toys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS = {"clip": tokenizers.CLIP, "t5": tokenizers.T5, "qwen": tokenizers.QWEN2}
CLASSES = (
    "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2TokenizerFast", "LlamaTokenizer",
    "evil.Tokenizer", None,
)  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tokenizers")
    toys.write_clip_tokenizer(home / "clip")
    toys.write_t5_tokenizer(home / "t5")
    deepgen_toys.write_tokenizer(home / "qwen")
    return home


@pytest.fixture(scope="module")
def saved(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers' own `save_pretrained` writes them."""
    from transformers import CLIPTokenizerFast, Qwen2TokenizerFast, T5TokenizerFast

    home = tmp_path_factory.mktemp("saved")
    for name, kind in (
        ("clip", CLIPTokenizerFast), ("t5", T5TokenizerFast), ("qwen", Qwen2TokenizerFast),
    ):  # fmt: skip
        kind.from_pretrained(originals / name).save_pretrained(home / name)
    return home


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def ids(kind: str, folder: Path, text: str) -> list[int]:
    found = tokenizers.read_tokenizer(KINDS[kind], folder, "tokenizer")
    opened = tokenizers.open_tokenizer(KINDS[kind], found)
    return list(tokenizers.encode(opened, text).input_ids)


def rename(folder: Path, name: str | None) -> None:
    """Let the config name another class, and leave tokenizer.json alone, as newer saves do."""
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table.pop("tokenizer_class", None)
    if name is not None:
        table["tokenizer_class"] = name
    path.write_text(json.dumps(table))
    for file in ("vocab.json", "merges.txt", "spiece.model", "added_tokens.json"):
        (folder / file).unlink(missing_ok=True)


# --- by contents ---------------------------------------------------------------------------------

PROMPT = "A cat's 3 boats\n  on   the water, 水 ümlaut ﬁ"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(originals: Path, kind: str) -> None:
    import transformers

    own = getattr(transformers, KINDS[kind].class_name).from_pretrained(originals / kind)
    assert ids(kind, originals / kind, PROMPT) == own(PROMPT).input_ids


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_any_class_gives_the_same_tokens(
    originals: Path, copy: Path, kind: str, class_name: str | None
) -> None:
    rename(copy / kind, class_name)
    assert ids(kind, copy / kind, PROMPT) == ids(kind, originals / kind, PROMPT)


def test_a_tokenizer_of_another_kind_is_named(copy: Path, schnell: Path) -> None:
    for kind in KINDS:
        rename(copy / kind, "PreTrainedTokenizerFast")
    with pytest.raises(UnknownModelError, match=r"json, a vocabulary of the kind Unigram"):
        models.open_checkpoint(schnell, {"tokenizer": copy / "t5"})
    with pytest.raises(CheckpointError, match="Unigram, as T5's"):
        tokenizers.read_tokenizer(tokenizers.T5, copy / "qwen", "tokenizer_2")


def test_a_vocabulary_beyond_the_encoders_is_of_another_model(
    schnell: Path, originals: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(originals / "clip", tmp_path / "clip")
    table = json.loads((folder / "vocab.json").read_text("utf-8"))
    (folder / "vocab.json").write_text(json.dumps({**table, "more": 9000}))
    checkpoint = models.open_checkpoint(schnell, {"tokenizer": folder})
    with pytest.raises(TensorMismatchError, match="token ids up to 9000") as caught:
        models.open_model(checkpoint, models.identify(checkpoint))
    assert caught.value.allowed == "token ids up to 513, the vocabulary of the text_encoder"


# --- patterns ------------------------------------------------------------------------------------

CATASTROPHES = (
    r"(a+)+$", r"(a|aa)+$", r"(a|a)*b", r"(?=(a+))*b", r"(?:(?:(?:a{1000}){1000}){1000})",
    r"(a{1000}){1000}", r"(.*)*x", r"\s+\s+\s+\s+\s+\s+x", r"(?<!a{1,1000})b", "(", "a" * 10**6,
)  # fmt: skip


def pipelines(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}
    return [
        ("pre_tokenizer", split),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}),
        ("normalizer", replace),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace]}),
        ("decoder", replace),
        ("decoder", {"type": "Sequence", "decoders": [replace]}),
    ]


def assert_refused_quickly(kind: str, folder: Path, words: str) -> None:
    """Refused, or harmless: then the longest prompt takes less than a second."""
    started = time.process_time()
    with pytest.raises(CheckpointError, match=words):
        tokenizers.read_tokenizer(KINDS[kind], folder, "tokenizer")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_that_no_released_tokenizer_has_are_refused(copy: Path, kind: str) -> None:
    path = copy / kind / "tokenizer.json"
    table = json.loads(path.read_text("utf-8"))
    for pattern in CATASTROPHES:
        for step, value in pipelines(pattern):
            path.write_text(json.dumps({**table, step: value}))
            assert_refused_quickly(kind, copy / kind, "the pattern")


def test_a_pattern_in_a_model_is_refused_before_it_is_compiled(
    deepgen: Path, copy: Path, tmp_path: Path
) -> None:
    """Through DeepGen's whole road, whose tokenizer transformers 4 reads with its patterns."""
    folder = shutil.copytree(deepgen, tmp_path / "deepgen")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(copy / "qwen", folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    table = json.loads(path.read_text("utf-8"))
    table["pre_tokenizer"] = pipelines(r"(a|aa)+$")[0][1]
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"\(a\|aa\)\+\$"), danqing.open(folder) as engine:
        engine.generate("a" * 4000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_prompt_takes_less_than_a_second(
    originals: Path, saved: Path, kind: str
) -> None:
    for home in (originals, saved):
        found = tokenizers.read_tokenizer(KINDS[kind], home / kind, "tokenizer")
        opened = tokenizers.open_tokenizer(KINDS[kind], found)
        for letters in ("a", " ", "\n", "a ", "'", "水", "\u0301", "é'", " \n", "ﷺ", "1"):
            text = (letters * MAX_PROMPT_CHARACTERS)[: MAX_PROMPT_CHARACTERS - 1] + "b"
            started = time.process_time()
            tokenizers.encode(opened, text)
            assert time.process_time() - started < 1, repr(letters)


def many_rows(table: dict[str, Any]) -> None:
    rows = [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 10**6
    table["post_processor"] = {
        "type": "TemplateProcessing", "single": rows, "pair": [], "special_tokens": {},
    }  # fmt: skip


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a template of a million rows": many_rows,
    "a long template": lambda table: table.update(
        post_processor={"type": "TemplateProcessing", "single": [{"x": 1}] * 1000}
    ),
    "an unknown step": lambda table: table.update(normalizer={"type": "Evil"}),
    "deep sequences": lambda table: table.update(
        normalizer=json.loads('{"type":"Sequence","normalizers":[' * 50 + "]}" * 50)
    ),
    "many steps": lambda table: table.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10**4}
    ),
    "a long literal": lambda table: table.update(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}
    ),
    "an empty literal": lambda table: table.update(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "b"}
    ),
    "a long prefix": lambda table: table.update(
        normalizer={"type": "Prepend", "prepend": "b" * 10**6}
    ),
    "a map that is none": lambda table: table.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA" * 100}
    ),
    "a map that is no base64": lambda table: table.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "\u2028"}
    ),
    "many added tokens": lambda table: table.update(
        added_tokens=[{"id": i, "content": f"<{i}>"} for i in range(20_000)]
    ),
    "an added token without text": lambda table: table.update(
        added_tokens=[{"id": 1, "content": ""}]
    ),
    "a long added token": lambda table: table.update(
        added_tokens=[{"id": 1, "content": "a" * 10**6}]
    ),
    "an added token far away": lambda table: table.update(
        added_tokens=[{"id": 2**40, "content": "a"}]
    ),
    "dropout": lambda table: table["model"].update(dropout=0.5),
    "an unknown key of the model": lambda table: table["model"].update(evil=1),
    "no model": lambda table: table.pop("model"),
    "no vocabulary": lambda table: table["model"].pop("vocab"),
    "a long piece": lambda table: table["model"].update(
        vocab=[["a" * 10**5, 0.0]]
        if isinstance(table["model"]["vocab"], list)
        else {"a" * 10**5: 0}
    ),
    "odd ids": lambda table: table["model"].update(
        vocab=[["a", "b"]] if isinstance(table["model"]["vocab"], list) else {"a": -1}
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_else_a_tokenizer_may_not_say(copy: Path, what: str) -> None:
    for kind in KINDS:
        path = copy / kind / "tokenizer.json"
        table = json.loads(path.read_text("utf-8"))
        HOSTILE[what](table)
        path.write_text(json.dumps(table))
        assert_refused_quickly(kind, copy / kind, "not usable")


def test_padding_and_truncation_of_the_file_are_not_used(copy: Path) -> None:
    for kind in KINDS:
        before = ids(kind, copy / kind, PROMPT)
        path = copy / kind / "tokenizer.json"
        table = json.loads(path.read_text("utf-8"))
        table["padding"] = {
            "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
        }  # fmt: skip
        table["truncation"] = {
            "max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right",
        }  # fmt: skip
        path.write_text(json.dumps(table))
        assert ids(kind, copy / kind, PROMPT) == before


# --- sentencepiece -------------------------------------------------------------------------------


def test_a_damaged_sentencepiece_model_is_an_error_or_harmless(
    originals: Path, tmp_path: Path
) -> None:
    """Hundreds of damages; each ends as an error or as a tokenizer that reads the longest prompt."""
    import random

    sound = (originals / "t5" / "spiece.model").read_bytes()
    folder = shutil.copytree(originals / "t5", tmp_path / "t5")
    chance = random.Random(5)
    refused = 0
    for number in range(150):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            place = int(chance.random() ** 2 * len(data)) % max(len(data), 1)
            what = chance.randrange(4)
            if what == 0:
                data[place] ^= 1 << chance.randrange(8)
            elif what == 1:
                del data[place:]
            elif what == 2:
                data[place:place] = chance.randbytes(chance.randint(1, 64))
            else:
                data[place : place + 4] = b"\xff\xff\xff\x7f"
        (folder / "spiece.model").write_bytes(data)
        started = time.process_time()
        try:
            found = tokenizers.read_tokenizer(tokenizers.T5, folder, "tokenizer_2")
            if number % 5 == 0:
                opened = tokenizers.open_tokenizer(tokenizers.T5, found)
                tokenizers.encode(opened, PROMPT * 20)
        except CheckpointError:
            refused += 1
        assert time.process_time() - started < 5
    assert refused > 75


def test_a_character_map_may_not_lead_out_of_itself(originals: Path) -> None:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString((originals / "t5" / "spiece.model").read_bytes())
    sound = proto.normalizer_spec.precompiled_charsmap
    tokenizers._check_map(sound)
    length = int.from_bytes(sound[:4], "little")
    texts = sound[4 + length :]
    evil = ((2**22 - 1) << 10).to_bytes(4, "little")
    for data in (
        sound[:-1000], sound[:100], length.to_bytes(4, "little"), sound[:4] + evil + sound[8:],
        sound[: 4 + length], sound[: 4 + length] + b"\xff" * len(texts),
        sound[: 4 + length] + b"a" * len(texts), (2**32 - 4).to_bytes(4, "little") + sound[4:],
        sound[:4] + evil * (length // 4) + texts,
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"map|trie"):
            tokenizers._check_map(data)


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_chat_templates_are_never_rendered(deepgen: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 1}
    with danqing.open(deepgen, device="cpu") as engine:
        wanted = engine.generate("a cat", **settings).image.tobytes()
    folder = shutil.copytree(deepgen, tmp_path / "deepgen")
    written = tmp_path / "written"
    template = (
        "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"
        "{{ raise_exception('rendered') }}{{ 1 // 0 }}"
        "{{ cycler.__init__.__globals__.os.system('touch WRITTEN') }}"
    ).replace("WRITTEN", str(written))
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    (folder / "tokenizer" / "chat_template.json").write_text(
        json.dumps({"chat_template": template})
    )
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with danqing.open(folder, device="cpu") as engine:
        assert engine.generate("a cat", **settings).image.tobytes() == wanted
    assert not written.exists()
