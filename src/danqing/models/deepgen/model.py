"""DeepGen-1.0 as three stages, over the networks of transformers and diffusers and a connector."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from danqing.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    RequestError,
    TensorMismatchError,
)
from danqing.models import flow, tokenizers
from danqing.models.deepgen import SLOTS, configs, fitted_size, language, prompts
from danqing.models.deepgen.connector import ConnectorKind
from danqing.models.deepgen.transformer import predict
from danqing.models.kinds import kl
from danqing.models.model import Model, Tokens, prompts_of
from danqing.weights.deepgen_pt import LAYOUT as DEEPGEN_PT
from danqing.weights.json_file import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from danqing.models.kinds.base import NetworkKind
    from danqing.models.model import Batch, Modules
    from danqing.models.slots import Slot
    from danqing.references import Reference
    from danqing.request import Resolved

PAD = "<|endoftext|>"
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False,
}  # fmt: skip
"""Of SD3.5-medium, for weights that came without one."""
MAX_SHIFT = 1.16
"""Upper end of the line that the released code takes the shift by resolution from."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What prompt, negative prompt and pictures became; row 0 is the prompt's.

    Attributes:
        context: (rows, tokens, joint width); the second row, if there is guidance, the negative's.
        pooled: (rows, pooled width).
        means: of each picture's encoding, (1, channels, height/8, width/8).
        deviations: of the same.
    """

    context: torch.Tensor
    pooled: torch.Tensor
    means: tuple[torch.Tensor, ...]
    deviations: tuple[torch.Tensor, ...]


class DeepGenModel(Model):
    """A DeepGen of any size."""

    slots: ClassVar[tuple[Slot, ...]] = SLOTS
    own_kinds: ClassVar[Mapping[str, NetworkKind]] = {"deepgen_connector": ConnectorKind()}
    known_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {"scheduler": SCHEDULE}
    conditioning: ClassVar[type] = Conditioning
    encode_reads: ClassVar[tuple[str, ...]] = (
        "prompt", "negative_prompt", "image", "resize", "height", "width", "guidance_scale",
    )  # fmt: skip

    # --- checks ----------------------------------------------------------------------------------

    def check_part(self, name: str) -> None:
        """Compare a part with its files; the prompt template belongs to the tokenizer."""
        if name == "vlm":
            self._check_vlm()
        super().check_part(name)
        if name == "tokenizer":
            _ = self.template

    def fits(self) -> Iterable[tuple[str, str, int, int]]:
        """Yield the widths that must agree, those of the connector on both of its sides."""
        config = self.library_config
        connector, text, wanted = (
            config("connector"),
            config("vlm").text_config,
            config("transformer"),
        )
        stacked = len(language.depths(text.num_hidden_layers)) * text.hidden_size
        context, pooled = connector["joint_attention_dim"], connector["pooled_projection_dim"]
        yield "vlm", "states", text.hidden_size, connector["query_size"]
        yield "vlm", "stacked states", stacked, connector["input_size"]
        yield "connector", "pooled", pooled, wanted.pooled_projection_dim
        yield "connector", "context", context, wanted.joint_attention_dim
        yield "vae", "latent", config("vae").latent_channels, wanted.in_channels

    def _check_vlm(self) -> None:
        if "vlm" not in self.checkpoint.components:
            if "vlm" in self.checkpoint.broken:
                raise self.checkpoint.broken["vlm"]
            raise CheckpointIncompleteError(
                "the checkpoint has no vlm",
                seen=f"{self.checkpoint.path}: {', '.join(self.checkpoint.components)}",
                hint="DeepGen's language model is fine-tuned: stock Qwen2.5-VL does not replace "
                "it. Releases before March 2026 lack the folder vlm/: get the newer one",
            )
        vlm = self.checkpoint.component("vlm")
        if configs.looks_stock(vlm):
            raise CheckpointError(
                "the vlm is stock Qwen2.5-VL, and DeepGen's is fine-tuned: with the stock one it "
                "paints other pictures",
                seen=f"{vlm.folder}: saved by transformers {vlm.config['transformers_version']}"
                if vlm.config
                else vlm.folder,
                allowed="the vlm of DeepGen-1.0-diffusers, or stock with a .pt that holds adapters",
                hint="get the folder vlm/ of the release of March 2026 or later",
            )

    def assumptions(self) -> tuple[str, ...]:
        """Say what the files left open."""
        found = []
        if "scheduler" not in self.checkpoint.components:
            found.append("the schedule is SD3.5-medium's (shift 3); the weights have no config")
        if self.checkpoint.component("connector").config is None:
            heads = self.config_of("connector")["num_attention_heads"]
            found.append(f"the connector has {heads} heads of 64; it came without a config")
        vlm = self.checkpoint.component("vlm")
        if vlm.adapters:
            found.append(
                f"{len(vlm.adapters)} adapters of the .pt are merged into {vlm.folder}, taken for "
                "stock Qwen2.5-VL"
            )
        elif self.checkpoint.layout == DEEPGEN_PT:
            found.append(f"the .pt holds no adapters: {vlm.folder} is taken for a merged vlm")
        if self.checkpoint.component("transformer").config is None:
            found.append("the transformer's config is read off its shapes; the .pt has none")
        if not os.path.lexists(self._template_file):
            found.append("the prompt template is the released one; the weights have none")
        return (*found, *super().assumptions())

    def trim(self, component: str, module: torch.nn.Module) -> torch.nn.Module:
        """Drop the last layer of the language model and its norm: nothing depends on them."""
        if component == "vlm":
            language.trim(module)
        return module

    # --- stages ----------------------------------------------------------------------------------

    def encode(self, modules: Modules, request: Resolved) -> tuple[Conditioning, tuple[str, ...]]:
        """Read prompt, negative prompt and pictures once; rows are padded to the longest.

        Padding is part of the result, as in the original: the connector and the transformer attend
        to it, so the negative prompt's length counts even where there is no guidance.
        """
        vlm, connector = modules["vlm"], modules["connector"]
        weight = connector.projector_1.weight
        pictures = [self._pixels(image, request) for image in request.image]
        seen = [language.see(vlm, picture.to(weight.dtype)) for picture in pictures]
        features, grids = [one for one, _ in seen], [grid for _, grid in seen]
        counts = [rows * columns for rows, columns in grids]
        texts = [request.prompt, request.negative_prompt]
        rows = [self._row(text, counts) for text in texts]
        width = max(len(ids) for ids in rows) + len(connector.meta_queries)
        self.check_ids("vlm", torch.cat(rows))
        image_token = self._image_token if counts else -1
        queries = connector.meta_queries.to(vlm.device)
        read = []
        for ids in rows[: len(prompts_of(request))]:
            embeds = language.embed(vlm, ids, image_token, features, queries)
            places = prompts.positions(ids, image_token, grids, len(connector.meta_queries))
            read.append(language.states(vlm, embeds, places))
        padding = None
        if any(states.shape[1] < width for states in read):
            padding = language.padding_states(vlm, self._pad_token)
        stacked = torch.cat([language.padded(states, width, padding) for states in read])
        pooled, context = connector(stacked.to(weight.device))
        encoded = [_posterior(modules["vae"], picture) for picture in pictures]
        conditioning = Conditioning(
            context=context,
            pooled=pooled,
            means=tuple(mean for mean, _ in encoded),
            deviations=tuple(deviation for _, deviation in encoded),
        )
        return conditioning, ()

    def count(self, request: Resolved) -> Tokens:
        """Count what the language model reads and learns, and patches of latents."""
        sizes = self._sizes(request)
        counts = [language.tokens_of(*one) for one in sizes]
        texts = [request.prompt, request.negative_prompt]
        text = max(len(self._row(words, counts)) for words in texts)
        text += int(self.config_of("connector")["num_queries"])
        return Tokens(
            text=text,
            image=self.image_tokens(request.height, request.width),
            references=sum(self.image_tokens(*size) for size in sizes),
            encoders={"vlm": text},
            rows=len(prompts_of(request)),
            pixels_read=max((height * width for height, width in sizes), default=0),
        )

    def conditioning_size(self, request: Resolved) -> int:
        """Count the encodings of the images as well: mean and deviation."""
        latents = sum(math.prod(self.latent_shape(*size)) for size in self._sizes(request))
        return super().conditioning_size(request) + 2 * latents

    def draw(self, request: Resolved, seed: int) -> list[torch.Tensor]:
        """Draw (1, channels, height/8, width/8), then the same of each picture to edit.

        The original samples the encodings of the pictures to edit from the global generator, so
        that its edits differ from run to run; here they come from the seed too.
        """
        sizes = [(request.height, request.width)]
        if request.reference_latent == "sample":
            sizes += self._sizes(request)
        return flow.draw(seed, [self.latent_shape(*size) for size in sizes])

    def predictor(
        self, modules: Modules, conditioning: Conditioning, batch: Batch
    ) -> flow.Predictor:
        """Call the transformer with latents, and the images to edit as more tokens."""
        transformer = modules["transformer"]
        context = flow.in_rows(conditioning.context, batch.size)
        pooled = flow.in_rows(conditioning.pooled, batch.size)
        references = [self._reference_latents(conditioning, draws) for _, *draws in batch.drawn]
        references *= len(conditioning.context)
        times = [timestep.float().expand(len(context)) for timestep in batch.timesteps]

        def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
            rows = predict(transformer, [*latents], references, [*context], pooled, times[step])
            return torch.stack(rows)

        def embed(step: int) -> torch.Tensor:
            embedded: torch.Tensor = transformer.time_text_embed(times[step], pooled)
            return embedded

        return flow.Predictor(velocity, embed)

    def shift(self, config: Any, tokens: int) -> float:  # noqa: ARG002
        """Return mu from the released code's own line, whatever the config says."""
        return flow.resolution_shift(tokens, max_shift=MAX_SHIFT)

    # --- pictures to edit ------------------------------------------------------------------------

    def _sizes(self, request: Resolved) -> list[tuple[int, int]]:
        """Return height and width in which each image to edit is read."""
        return [fitted_size(image, request) for image in request.image]

    def _pixels(self, image: Reference, request: Resolved) -> torch.Tensor:
        """Return a picture in its working size: (1, 3, height, width), float32, -1 to 1."""
        from PIL import Image

        height, width = fitted_size(image, request)
        resized = image.image.resize((width, height), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
        return values.float() / 255 * 2 - 1

    def _reference_latents(
        self, conditioning: Conditioning, draws: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the latents of each picture to edit, (channels, height/8, width/8).

        They are samples of its encoding where there are draws, and its mode where there are none.
        """
        scale, shift = kl.factors(self.library_config("vae"))
        latents = list(conditioning.means)
        for place, draw in enumerate(draws):
            mean, deviation = latents[place], conditioning.deviations[place]
            latents[place] = mean + deviation * draw.to(mean.device, mean.dtype)
        return [((one - shift) * scale).to(conditioning.context.dtype)[0] for one in latents]

    # --- text ------------------------------------------------------------------------------------

    @cached_property
    def template(self) -> prompts.Template:
        """The words around a prompt: those that came with the weights, or the released ones."""
        place = self._template_file
        return prompts.template_from(read_json(place) if os.path.lexists(place) else {}, place)

    @property
    def _template_file(self) -> Any:
        path = self.checkpoint.path
        return (path if path.is_dir() else path.parent) / "prompt_template.json"

    def _row(self, text: str, counts: Sequence[int]) -> torch.Tensor:
        """Return the tokens of a prompt in its template.

        Raises:
            RequestError: the prompt itself holds the word that stands for a picture.
        """
        ids = self._ids(self.template.row(text, counts))
        if counts and int((ids == self._image_token).sum()) != sum(counts):
            raise RequestError(
                "the prompt holds the word that stands for a picture",
                seen=self.template.image_token,
                hint="leave it out: the pictures are put before the prompt",
            )
        return ids

    def _ids(self, text: str) -> torch.Tensor:
        encoded = tokenizers.encode(self.tokenizer("vlm"), text, return_tensors="pt")
        ids: torch.Tensor = encoded.input_ids[0]
        return ids

    @cached_property
    def _image_token(self) -> int:
        return self._single_token(self.template.image_token)

    @cached_property
    def _pad_token(self) -> int:
        return self._single_token(PAD)

    def _single_token(self, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1:
            raise TensorMismatchError(
                "the tokenizer is of another model",
                seen=f"{text} is {len(ids)} tokens",
                allowed="the tokenizer of Qwen2.5-VL",
            )
        return int(ids[0])


def _posterior(vae: Any, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of a picture's encoding."""
    found = vae.encode(picture.to(vae.device, vae.dtype)).latent_dist
    return found.mean, found.std
