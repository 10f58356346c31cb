"""A plan in words, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from danqing.plan.plan import Plan
    from danqing.request import Resolved


def plan_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a plan as labelled lines."""
    yield "model", f"{plan.title}, {plan.layout}, {plan.path}"
    yield "device", f"{plan.device} ({plan.chip}); {plan.device_reason}"
    yield "dtype", f"{plan.dtype}: {plan.dtype_reason}"
    yield "attention", f"{plan.attention}: {plan.attention_reason}"
    if plan.deterministic:
        yield "kernels", "deterministic ones only"
    if plan.fused:
        yield "fused", ", ".join(plan.fused)
    if plan.compiled != "off":
        yield "compile", f"the denoiser's blocks, with {plan.compiled}, at the first step"
    yield "placement", f"{plan.placement}: {plan.placement_reason}"
    for part in plan.components:
        how = "mapped from disk" if part.mapped else "in memory"
        if part.placement == "streamed":
            how = f"streamed, {len(part.staying)} of {part.blocks} blocks stay"
            how += f" in {part.arithmetic} and compute so" if part.arithmetic else ""
            how += " as they are stored" if part.compact and part.staying else ""
        reason = f"; {part.reason}" if part.reason else ""
        where = f" on {part.device}" if part.device else ""
        yield f"  {part.name}", f"{size(part.bytes)} {part.dtype}, {how}{where}{reason}"
    if plan.tile:
        yield "tiles", f"of {plan.tile} pixels, for decoding whole would not fit, or as asked"
    yield "memory", f"{size(plan.predicted_peak_bytes)} at the most, for {plan.picture}"
    if plan.seconds:
        stages = ", ".join(f"{name} {_time(value)}" for name, value in plan.seconds.items())
        yield "time", f"{_time(sum(plan.seconds.values()))} expected: {stages}"
    for text in plan.assumptions:
        yield "assumed", text


def describe_work(request: Resolved, pictures: int) -> str:
    """Return size, steps and batch in a few words."""
    steps = f"{request.num_inference_steps} steps"
    together = f", {pictures} pictures together" if pictures > 1 else ""
    return f"{request.height}x{request.width} in {steps}{together}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004
