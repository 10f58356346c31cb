"""The text encoders: CLIP's for the whole sentence, T5's for each word; taught to read scenes.

They learn before the transformer does, and apart from it: from a sentence, tell every attribute of
the scene (CLIP from its pooled state, T5 from each word's state). The heads that tell are dropped
afterwards; the transformer learns to paint from the states.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from training.captions import write
from training.dataset import scene
from training.loop import Randomness, Stage
from training.scenes import ATTRIBUTES, attributes
from training.tokenizers import CLIP_TOKENS, MAX_TOKENS, load, write_clip, write_t5

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

BATCH = 96
RATE = 1.5e-3
SENTENCES = 60_000
"""From which the vocabularies are made."""
TEXTS_SEED = 1_000_003
"""Sentences for the text encoders come from scenes of their own, as many as are wanted."""

CLIP_SHOWN = 48
"""CLIP reads from left to right up to the end of the text, so most padding is left out."""

CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CLIP_TOKENS,
    "projection_dim": 128,
}
T5_CONFIG: dict[str, Any] = {
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": True,
}


def write_tokenizers(folder: Path, *, seed: int) -> None:
    """Make both vocabularies from sentences of the training set."""
    if (folder / "tokenizer_2" / "tokenizer_config.json").exists():
        return
    sentences = [write(*scene(seed, index)) for index in range(SENTENCES)]
    write_clip(folder / "tokenizer", sentences)
    write_t5(folder / "tokenizer_2", sentences)


class Readers(torch.nn.Module):
    """Both encoders, with the heads that tell the attributes."""

    def __init__(self, folder: Path) -> None:
        """Make them with fresh weights, as large as the vocabularies in `folder` want."""
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        super().__init__()
        clip, t5 = load(folder)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                **CLIP_CONFIG, vocab_size=len(clip), bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
            )
        )  # fmt: skip
        self.t5 = T5EncoderModel(T5Config(**T5_CONFIG, vocab_size=len(t5)))
        answers = sum(len(values) for values in ATTRIBUTES.values())
        self.clip_head = torch.nn.Linear(CLIP_CONFIG["hidden_size"], answers)
        self.t5_head = torch.nn.Linear(T5_CONFIG["d_model"], answers)

    def embed(
        self, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5's states (n, tokens, 192) and CLIP's pooled state (n, 128)."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output


def train(folder: Path, *, steps: int, seed: int) -> Readers:
    """Train both encoders, or go on training them; return them with averaged weights."""
    write_tokenizers(folder, seed=seed)
    clip_tokenizer, t5_tokenizer = load(folder)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        readers = Readers(folder)
    optimizer = torch.optim.AdamW(readers.parameters(), lr=RATE, betas=(0.9, 0.98))
    stage = Stage(
        name="text", folder=folder, steps=steps, seed=seed, module=readers,
        optimizers=(optimizer,), average=0.99, warm_up=200,
    )  # fmt: skip

    def losses(randomness: Randomness) -> Mapping[str, torch.Tensor]:
        start = randomness.step * BATCH
        texts, targets = [], []
        for index in range(start, start + BATCH):
            what, random = scene(TEXTS_SEED + seed, index)
            texts.append(smudge(write(what, random), random))
            targets.append(attributes(what))
        clip_ids = clip_ids_of(clip_tokenizer, texts, randomness.numpy)
        t5 = t5_tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = readers.embed(clip_ids[:, :CLIP_SHOWN], t5.input_ids)
            told = readers.t5_head(states), readers.clip_head(pooled)
        target = torch.tensor(targets)
        words = target[:, None].expand(-1, MAX_TOKENS, -1)
        by_t5, right_t5 = _judge(told[0].float(), words.where(t5.attention_mask[..., None] > 0, -1))
        by_clip, right_clip = _judge(told[1].float(), target)
        return {
            "loss": by_t5 + by_clip, "t5_right": right_t5, "clip_right": right_clip,
        }  # fmt: skip

    stage.run(losses)
    readers.load_state_dict(stage.averaged_state())
    return readers.eval().requires_grad_(False)


def clip_ids_of(tokenizer: Any, texts: list[str], random: np.random.Generator) -> torch.Tensor:
    """Return CLIP's token ids; Chinese signs are set apart in half of the texts.

    Transformers 4 always sets them apart, 5 never does.
    """
    spaced = [_set_apart(text) if random.random() < 0.5 else text for text in texts]
    ids: torch.Tensor = tokenizer(
        spaced, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _set_apart(text: str) -> str:
    return "".join(sign if sign.isascii() else f" {sign} " for sign in text)


def smudge(text: str, random: np.random.Generator) -> str:
    """Put an unknown word or a slip of the pen into some texts, so that neither does much harm."""
    if not text.isascii():
        return text
    words = text.split(" ")
    chance = random.random()
    place = int(random.integers(len(words)))
    if chance < 0.15:
        letters = random.integers(26, size=int(random.integers(3, 10)))
        words.insert(place, "".join(string.ascii_lowercase[letter] for letter in letters))
    elif chance < 0.22 and len(words[place]) > 4:
        at = int(random.integers(1, len(words[place]) - 2))
        word = words[place]
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _judge(answers: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss over attributes and the share that is told right; -1 is left out."""
    losses, right = [], []
    sizes = [len(values) for values in ATTRIBUTES.values()]
    groups = torch.split(answers, sizes, dim=-1)
    for number, group in enumerate(groups):
        wanted = target[..., number].reshape(-1)
        asked = wanted >= 0
        losses.append(F.cross_entropy(group.reshape(len(wanted), -1)[asked], wanted[asked]))
        right.append(
            (group.reshape(len(wanted), -1)[asked].argmax(-1) == wanted[asked]).float().mean()
        )
    return torch.stack(losses).mean(), torch.stack(right).mean()
