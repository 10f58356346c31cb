"""T5 v1.1's encoder, and what its tokenizer cannot read."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.models import config_tables
from danqing.models.kinds.base import NetworkKind, count, side
from danqing.networks.loading import Row, identity_rows
from danqing.networks.of_transformers import make_encoder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danqing.weights import Component

TIED = ("shared.weight", "encoder.embed_tokens.weight")
_EXTRAS = ("decoder.", "lm_head.", "spiece_model")
_SHOWN = 100
_SHOWN_WORDS = 8
_SPELLED = 2
"""Letters; a short word may be spelled and yet be known."""
_READS_LETTERS = 10_000
"""Pieces; a vocabulary so large has learned from spelled words too, such as T5's 32,100."""
_WORD_START = "\u2581"
"""How sentencepiece writes the space before a word."""


class T5(NetworkKind):
    """The encoder alone; names of transformers, or of llama.cpp as GGUF files have them."""

    table: ClassVar[config_tables.Kind] = config_tables.T5_ENCODER
    library: ClassVar[str] = "transformers"
    class_name: ClassVar[str] = "T5EncoderModel"
    counted: ClassVar[tuple[str, ...]] = ("num_layers",)
    wide_tensors: ClassVar[str] = "T5's wo in float32: it may overflow in float16"

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config of a v1.1 encoder that the shapes tell."""
        own = llama_name if part.style == "llama.cpp" else str
        block = "encoder.block.0.layer"
        embedding = next((own(name) for name in TIED if own(name) in part.entries), own(TIED[0]))
        vocabulary, hidden = (side(part, embedding, axis) for axis in (0, 1))
        bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
        buckets, heads = (side(part, own(bias), axis) for axis in (0, 1))
        inner = side(part, own(f"{block}.0.SelfAttention.q.weight"), 0)
        layers = "enc.blk." if part.style == "llama.cpp" else "encoder.block."
        return {
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": hidden,
            "d_kv": inner // max(heads, 1),
            "d_ff": side(part, own(f"{block}.1.DenseReluDense.wi_0.weight"), 0),
            "num_layers": count(part, layers),
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make transformers' T5EncoderModel."""
        from transformers import T5Config, T5EncoderModel

        return make_encoder(T5EncoderModel, T5Config, values)

    def rows(
        self,
        part: Component,
        values: Mapping[str, Any],  # noqa: ARG002
        shapes: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Match names; files keep the tied embedding under one name, the other, or both."""
        if part.style == "llama.cpp":
            return [Row(llama_name(name), (name,)) for name in shapes]
        held = next((name for name in TIED if name in part.entries), TIED[0])
        return [Row(held if name in TIED else name, (name,)) for name in shapes]

    def published(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        """Keep the tied embedding once."""
        return identity_rows(name for name in shapes if name != TIED[1])

    def ignored(self, name: str) -> bool:
        """Ignore the decoder, and a second copy of the embedding."""
        return name.startswith(_EXTRAS) or name in TIED

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep `wo` in float32 where all else is float16."""
        return torch.float32 if ".wo." in name and dtype is torch.float16 else dtype

    def numbers(self, config: Any) -> int:
        """Return what a gated perceptron holds for a token."""
        return int(config.d_ff) * 4


# --- names of llama.cpp --------------------------------------------------------------------------


def llama_name(name: str) -> str:
    """Return what llama.cpp, and so GGUF files, call a tensor of T5's encoder."""
    if name in _LLAMA:
        return _LLAMA[name]
    found = _T5_LAYER.fullmatch(name)
    if found is None:
        return name
    return f"enc.blk.{found['number']}.{_LLAMA_LAYER[found['rest']]}.weight"


_LLAMA = {
    "shared.weight": "token_embd.weight",
    "encoder.embed_tokens.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
}
_LLAMA_LAYER = {
    **{f"0.SelfAttention.{part}": f"attn_{part}" for part in "qkvo"},
    "0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "0.layer_norm": "attn_norm",
    "1.DenseReluDense.wi_0": "ffn_gate",
    "1.DenseReluDense.wi_1": "ffn_up",
    "1.DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}
_T5_LAYER = re.compile(
    r"encoder\.block\.(?P<number>\d+)\.layer\."
    rf"(?P<rest>{'|'.join(map(re.escape, _LLAMA_LAYER))})\.weight"
)


# --- what is not read ----------------------------------------------------------------------------


def reading_notes(tokenizer: Any, prompt: str, limit: int) -> tuple[str, ...]:
    """Return notes for the user on the words of a prompt that T5 does not read.

    Args:
        tokenizer: T5's.
        prompt: the user's words.
        limit: tokens that are read.
    """
    return (
        *_truncation_note(tokenizer, prompt, limit), *_vocabulary_note(tokenizer, prompt)
    )  # fmt: skip


def _truncation_note(tokenizer: Any, prompt: str, limit: int) -> tuple[str, ...]:
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(ids) <= limit:
        return ()
    lost = tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
    if len(lost) > 2 * _SHOWN:
        lost = f"{lost[:_SHOWN]} ... {lost[-_SHOWN:]}"
    return (f"the prompt has {len(ids)} tokens and only {limit} are read; not read: {lost!r}",)


def _vocabulary_note(tokenizer: Any, prompt: str) -> tuple[str, ...]:
    """Say which words the text encoder cannot read: it was never taught such pieces."""
    words = re.findall(r"\w+|[^\w\s]", prompt)
    unread = [word for word in words if not _can_read(tokenizer, word)]
    if not unread:
        return ()
    known = [piece[1:] for piece in tokenizer.get_vocab() if piece[:1] == _WORD_START]
    shown = []
    for word in list(dict.fromkeys(unread))[:_SHOWN_WORDS]:
        near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)
        shown.append(f"{word!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return (f"not in this model's vocabulary: {', '.join(shown)}",)


def _can_read(tokenizer: Any, word: str) -> bool:
    """Say whether a word has pieces of its own, rather than being spelled letter by letter."""
    pieces = tokenizer.tokenize(word)
    if tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(pieces):
        return False
    if len(tokenizer) >= _READS_LETTERS or not word.isascii():
        return True
    letters = [letter for piece in pieces if (letter := piece.lstrip(_WORD_START))]
    return len(letters) <= _SPELLED or any(len(piece) > 1 for piece in letters)
