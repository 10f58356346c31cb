"""A model: one architecture as three stages, encode, denoise and decode.

A family declares its slots and gives four methods; checking, reading, counting, the noise, the loop
of steps and decoding follow from its slots and from the kinds of its networks. The stages are
functions of modules and inputs and hold no state, so that an engine can place, time and repeat
them as it likes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from danqing.models import flow
from danqing.models.components import Components
from danqing.models.kinds import kl
from danqing.networks.hoisting import Hoisted, hoisted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from danqing.models.base import ModelSpec
    from danqing.models.kinds.base import Transformer
    from danqing.request import Resolved
    from danqing.weights import Checkpoint

    Modules = Mapping[str, Any]
    OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a request amounts to; memory, operations and usage follow from it.

    Attributes:
        text: tokens of the prompt that the denoiser reads.
        image: patches of latents of an image made.
        references: of the images to edit, together.
        encoders: tokens that each text encoder reads, where they matter for memory and time.
        rows: of the denoiser for each image; 2 under guidance away from a negative prompt.
        pixels_read: of the largest image that the autoencoder encodes.
    """

    text: int
    image: int
    references: int = 0
    encoders: Mapping[str, int] = field(default_factory=dict)
    rows: int = 1
    pixels_read: int = 0


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a prompt became; under guidance, the second row is the negative prompt's.

    Attributes:
        prompt_embeds: the context the denoiser reads, (rows, tokens, width), padding included.
        pooled_embeds: one vector for the whole prompt, (rows, width).
    """

    prompt_embeds: torch.Tensor
    pooled_embeds: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images computed together.

    Attributes:
        request: what is asked.
        drawn: from `Model.draw`, one entry an image.
        timesteps: of the steps, 1000 down to 0, float32, on the denoiser's device.
    """

    request: Resolved
    drawn: Sequence[Sequence[torch.Tensor]]
    timesteps: torch.Tensor

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.drawn)


class Model(Components):
    """One opened model; its weights are read by `build`, component by component.

    Attributes:
        encode_reads: settings of a request that its conditioning depends on.
        conditioning: dataclass of what `encode` gives: tensors, and tuples of tensors. The first is
            the context the denoiser reads; latents are computed in its dtype.
    """

    encode_reads: ClassVar[tuple[str, ...]]
    conditioning: ClassVar[type] = Conditioning

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Keep what is needed to make the networks; nothing is read."""
        super().__init__(checkpoint, spec)
        self._hoisted = Hoisted()

    # --- what a family says ----------------------------------------------------------------------

    @abstractmethod
    def count(self, request: Resolved) -> Tokens:
        """Return what a request amounts to."""

    @abstractmethod
    def encode(self, modules: Modules, request: Resolved) -> tuple[Any, tuple[str, ...]]:
        """Turn the prompt into conditioning; return it with notes for the user.

        Under guidance a second row of the context is the negative prompt's.
        """

    @abstractmethod
    def predictor(self, modules: Modules, conditioning: Any, batch: Batch) -> flow.Predictor:
        """Return what predicts velocities for a batch of images.

        Args:
            modules: the stage's components, all on one device.
            conditioning: from `encode`, on that device.
            batch: the images.
        """

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents in the form in which the denoiser takes them."""
        return latents

    def unpack(self, latents: torch.Tensor, request: Resolved) -> torch.Tensor:  # noqa: ARG002
        """Undo `pack`."""
        return latents

    def forget(self) -> None:
        """Drop the kept outputs of the modulating layers."""
        self._hoisted = Hoisted()

    # --- sizes -----------------------------------------------------------------------------------

    @property
    def _decoder(self) -> str:
        return self.role("decoder")[0]

    @property
    def _transformer(self) -> Transformer:
        return cast("Transformer", self.kind(self._denoiser))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape of the latents of an image of this size, in pixels."""
        config = self.library_config(self._decoder)
        per = kl.per_latent(config)
        return 1, int(config.latent_channels), height // per, width // per

    def image_tokens(self, height: int, width: int) -> int:
        """Return the denoiser's tokens of an image of this size, in pixels."""
        _, _, rows, columns = self.latent_shape(height, width)
        return rows * columns // self._transformer.patch(self.library_config(self._denoiser)) ** 2

    def tokens(self, request: Resolved) -> tuple[int, int, int]:
        """Return the tokens of the prompt, of the images to edit, and of an image made."""
        tokens = self.count(request)
        return tokens.text, tokens.references, tokens.image

    def conditioning_size(self, request: Resolved) -> int:
        """Return how many numbers `encode` gives for this request, without running it."""
        tokens, config = self.count(request), self.library_config(self._denoiser)
        return tokens.rows * self._transformer.conditioning_size(config, tokens.text)

    def activations(
        self, request: Resolved, images: int, itemsizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Return the bytes that each stage needs beside its weights, at their most.

        Args:
            request: what is asked; benchmarks/predicted_peak.py compares with runs.
            images: computed together.
            itemsizes: bytes of a number of each component.
        """
        tokens = self.count(request)
        read = {**tokens.encoders, **dict.fromkeys(self.role("image encoder"), tokens.pixels_read)}
        rows = images * tokens.rows * (tokens.text + tokens.references + tokens.image)

        def most(counts: Mapping[str, int]) -> int:
            sizes = (
                count * self.kind(name).numbers(self.library_config(name)) * itemsizes[name]
                for name, count in counts.items()
            )
            return max(sizes, default=0)

        return {
            "encode": most(read),
            "denoise": most(dict.fromkeys(self.role("denoiser"), rows)),
            "decode": most({self._decoder: images * request.height * request.width}),
        }

    def flops(self, request: Resolved, images: int) -> dict[str, float]:
        """Return the operations of each stage, roughly; of `denoise` those of one step."""
        tokens = self.count(request)
        seen = tokens.text + tokens.references + tokens.image

        def one(name: str, count: int) -> float:
            outline = self.outline(name)
            return self.kind(name).flops(outline.config, outline.block_elements, count)

        return {
            "encode": sum(one(name, count) for name, count in tokens.encoders.items()),
            "denoise": images * tokens.rows * one(self._denoiser, seen),
            "decode": images * one(self._decoder, request.height * request.width),
        }

    # --- stages ----------------------------------------------------------------------------------

    def draw(self, request: Resolved, seed: int) -> list[torch.Tensor]:
        """Draw everything random of one image: on the CPU, float32, from this seed alone.

        Returns:
            The initial latents first, then whatever else the model samples.
        """
        return flow.draw(seed, [self.latent_shape(request.height, request.width)])

    def _schedule_of(self, request: Resolved, device: torch.device) -> Any:
        tokens = self.image_tokens(request.height, request.width)
        return self.schedule(request.num_inference_steps, tokens=tokens, device=device)

    def denoise(
        self,
        modules: Modules,
        conditioning: Any,
        drawn: Sequence[Sequence[torch.Tensor]],
        request: Resolved,
        on_step: flow.OnStep,
    ) -> torch.Tensor:
        """Run all steps for a batch of images.

        Args:
            modules: the stage's components, all on one device.
            conditioning: from `encode`.
            drawn: from `draw`, one entry an image; moved and cast here.
            request: what is asked.
            on_step: called after each step with the number of steps done, the latents, and the
                velocity that led to them; it returns the latents to go on with.

        Returns:
            Latents, (images, channels, rows, columns).
        """
        denoiser, kind = modules[self._denoiser], self._transformer
        moved = _moved(conditioning, denoiser.device)
        context = next(iter(vars(moved).values()))
        noise = torch.cat([first for first, *_ in drawn]).to(context.dtype)
        latents = self.pack(noise).to(denoiser.device)
        scheduler = self._schedule_of(request, denoiser.device)
        batch = Batch(request=request, drawn=drawn, timesteps=scheduler.timesteps)
        predictor = self.predictor(modules, moved, batch)
        velocity = predictor.velocity
        if len(context) > 1:
            velocity = flow.guided(velocity, request.guidance_scale)
        # 1. The layers that see only the step and the pooled prompt, for all steps.
        with hoisted(
            denoiser,
            predictor.embed,
            embedder=kind.embedder,
            layers=kind.once(denoiser),
            steps=len(scheduler.timesteps),
            kept=self._hoisted,
        ) as at_step:
            # 2. The steps.
            latents = flow.sample(velocity, latents, scheduler, at_step, on_step)
        return self.unpack(latents, request)

    def glimpse(
        self, latents: torch.Tensor, velocity: torch.Tensor, step: int, request: Resolved
    ) -> torch.Tensor:
        """Return the latents that the flow would end in if it went on straight from here.

        Goes from x(sigma) = data + sigma velocity to the data.

        Args:
            latents: after a step, as `on_step` is shown them.
            velocity: that led to them.
            step: the number of steps done.
            request: what is asked.

        Returns:
            As `denoise`.
        """
        schedule = self._schedule_of(request, torch.device("cpu"))
        return self.unpack(latents - float(schedule.sigmas[step]) * velocity, request)

    def decode(self, modules: Modules, latents: torch.Tensor, request: Resolved) -> torch.Tensor:  # noqa: ARG002
        """Turn latents into pixels: undo their scaling and run the autoencoder's decoder.

        Returns:
            (images, 3, height, width), nominally -1 to 1, not clipped, in the decoder's dtype.
        """
        vae = modules[self._decoder]
        scale, shift = kl.factors(vae.config)
        scaled = (latents / scale + shift).to(vae.device, vae.dtype)
        pixels: torch.Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels


def prompts_of(request: Resolved) -> list[str]:
    """Return the prompt and, where guidance leads away from it, the negative prompt."""
    guided = request.guidance_scale > 1
    return [request.prompt, request.negative_prompt] if guided else [request.prompt]


def _moved(conditioning: Any, device: torch.device) -> Any:
    """Return conditioning with its tensors on a device."""
    changes = {}
    for entry in fields(conditioning):
        value = getattr(conditioning, entry.name)
        if isinstance(value, tuple):
            changes[entry.name] = tuple(tensor.to(device) for tensor in value)
        else:
            changes[entry.name] = value.to(device)
    return replace(conditioning, **changes)
