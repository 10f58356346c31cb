"""Counting the floating-point operations of a denoising step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.models.model import Model
    from danqing.request import Resolved


def count_flops(
    model: Model, modules: Mapping[str, Any], conditioning: Any, request: Resolved
) -> int:
    """Count the operations of denoising one image, by doing it.

    Those of matrix products and convolutions, a multiplication and an addition being two
    (torch.utils.flop_counter); attention counts as its two products.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from danqing.networks.kernels import attention

    counter = FlopCounterMode(display=False)
    drawn = [model.draw(request, request.seed)]
    # not all fused kernels are counted; the products they stand for are
    with torch.inference_mode(), attention("math"), counter:
        model.denoise(modules, conditioning, drawn, request, lambda _, latents, __: latents)
    return int(counter.get_total_flops())
