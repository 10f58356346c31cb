"""Small real tokenizers, made from the sentences of the training set.

Both are written in the files that every version of transformers reads: sentencepiece's model for
T5, vocab.json and merges.txt for CLIP.
"""

from __future__ import annotations

import io
import json
import math
import re
import string
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CLIP_PIECES = 1100
_LAST_LATIN = 0x24F
MAX_TOKENS = 40
"""Longer than 99 in 100 of the sentences; a longer prompt is cut, and danqing says so."""
CLIP_TOKENS = 77
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP divides a text into words."""


def write_t5(folder: Path, sentences: Sequence[str]) -> None:
    """Write T5's spiece.model: a unigram model whose pieces are whole words, and letters.

    The trainer of sentencepiece would cut some of so few words into parts ("th", "ree"); so it only
    makes the frame (normalisation, special pieces), and the pieces are counted here.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir(parents=True, exist_ok=True)
    frame = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences[:1000]),
        model_writer=frame,
        vocab_size=100,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(frame.getvalue())
    del model.pieces[3:]
    counts = Counter(piece for sentence in sentences for piece in _pieces(sentence))
    total = sum(counts.values())
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    for piece in [*letters, "\u2581"]:
        counts.setdefault(piece, 1)
    for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        # a letter costs more than any word, so that a known word is never spelled out
        score = math.log(count / total) if len(piece) > 1 or ord(piece) > _LAST_LATIN else -20.0
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "model_max_length": MAX_TOKENS,
            "extra_ids": 0,
            "additional_special_tokens": [],
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    )


def _pieces(sentence: str) -> Iterator[str]:
    """Yield a sentence's words, each with the mark of the space before it, and Chinese signs."""
    text = unicodedata.normalize("NFKC", sentence).lower()
    for word in re.findall(r"[a-z]+|[^\x00-\x7f]|[,.]", text):
        yield f"\u2581{word}" if word.isascii() and word.isalpha() else word


def write_clip(folder: Path, sentences: Sequence[str]) -> None:
    """Train byte-level merges and write them as CLIP's vocab.json and merges.txt."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_PIECES, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((text for text in sentences if text.isascii()), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = list(dict.fromkeys([*merges, *_chinese_merges(sentences)]))
    words = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    words += [first + second for first, second in merges]
    words = list(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    _write(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_TOKENS,
            "unk_token": "<|endoftext|>",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def _chinese_merges(sentences: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the merges that make each Chinese sign one token, within a word and at its end.

    Transformers 4 puts spaces between Chinese signs before it looks for merges, 5 does not.
    """
    symbols = bytes_to_unicode()
    for sign in sorted({sign for text in sentences for sign in text if not sign.isascii()}):
        first, second, third = (symbols[byte] for byte in sign.encode("utf-8"))
        yield first, second
        yield first + second, third
        yield first + second, f"{third}</w>"


def bytes_to_unicode() -> dict[int, str]:
    """Return the sign that byte-level tokenizers write for each byte (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


def _write(place: Path, value: Any) -> None:
    place.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def load(folder: Path) -> tuple[Any, Any]:
    """Return CLIP's and T5's tokenizer as danqing loads them."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2", local_files_only=True),
    )
