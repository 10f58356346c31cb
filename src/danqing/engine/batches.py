"""Making a batch of images, and measuring once for each shape what that does to their bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from danqing.engine.finish import compare_bits
from danqing.engine.probe import Look
from danqing.engine.provenance import noise_digest
from danqing.generation import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from PIL.Image import Image

    from danqing.engine.active import ActiveRequest
    from danqing.engine.stages import Stages
    from danqing.generation import Provenance, StageCost
    from danqing.models.model import Model


class Batches:
    """Makes the images of a request, some of them together."""

    def __init__(self, model: Model, stages: Stages, origin: Callable[[], Provenance]) -> None:
        """Keep the parts.

        Args:
            model: draws the noise.
            stages: turn it into images.
            origin: what all images have in common, for their records.
        """
        self._model = model
        self._stages = stages
        self._origin = origin
        self._bits: dict[tuple[int, ...], dict[str, Any]] = {}

    def paint(
        self, work: ActiveRequest, indexes: Sequence[int], before: Sequence[StageCost]
    ) -> list[Picture]:
        """Make some pictures together; `before` is what was spent on them until here."""
        requests = [work.request.single(index) for index in indexes]
        drawn = [self._model.draw(request, request.seed) for request in requests]
        drawn[0] = [work.look(f"draw/{number}", one) for number, one in enumerate(drawn[0])]
        costs = list(before)
        images = self._stages.render(work, drawn, indexes, costs)
        bits = self._compare_with_single(work, drawn, images, indexes)
        return [
            Picture(
                image=image,
                request=request.request,
                index=index,
                stages=tuple(costs),
                provenance=replace(
                    self._origin(),
                    noise_sha256=noise_digest(draws[0]),
                    batch={**bits, "position": index - indexes[0]},
                ),
                notes=work.notes,
            )
            for index, request, draws, image in zip(indexes, requests, drawn, images, strict=True)
        ]

    def _compare_with_single(
        self,
        work: ActiveRequest,
        drawn: Sequence[Sequence[torch.Tensor]],
        images: Sequence[Image],
        indexes: Sequence[int],
    ) -> dict[str, Any]:
        """Measure, once for each shape of batch, what computing together does to the bits.

        The batch's last picture is made once more, alone.
        """
        if len(drawn) == 1:
            return {"size": 1}
        shape = (len(drawn), work.request.height, work.request.width)
        if shape not in self._bits:
            quiet = replace(work, listen=None, look=Look(None))
            alone = self._stages.render(quiet, drawn[-1:], indexes[-1:], [])[0]
            self._bits[shape] = {"size": len(drawn), **compare_bits(alone, images[-1])}
        return self._bits[shape]
