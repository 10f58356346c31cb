"""What made an image, for its record."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING

from danqing import devices, weights
from danqing.generation import Provenance
from danqing.references import tilde
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from danqing.models.model import Model
    from danqing.options import Options
    from danqing.plan import Plan

_LIBRARIES = (
    "torch", *devices.BACKENDS.values(), "diffusers", "transformers", "accelerate", "einops",
    "safetensors", "tokenizers", "numpy", "pillow",
)  # fmt: skip
"""Recorded in every image with their versions, where installed."""


def origin_of(
    model: Model,
    plan: Plan,
    device: devices.Device,
    places: Mapping[str, devices.Device],
    *,
    options: Options,
) -> Provenance:
    """Return what all images of an engine have in common."""
    spec, checkpoint = model.spec, model.checkpoint
    memory = device.memory()
    return Provenance(
        model={
            "name": spec.name,
            "family": spec.family,
            "kind": spec.kind,
            "title": spec.title,
            "layout": checkpoint.layout,
            "path": checkpoint.name or tilde(checkpoint.path),
            "components": {name: tilde(path) for name, path in checkpoint.overrides.items()},
            "fingerprint": checkpoint.fingerprint,
            "sha256": weights.known_digests(checkpoint),
        },
        device={
            "name": device.name,
            "chip": device.chip,
            "driver": device.driver,
            "software": dict(device.software()),
            "memory_bytes": memory.total_bytes if memory else None,
            "threads": device.threads,
            "deterministic": plan.deterministic,
            "compiled": plan.compiled,
            "fused": list(plan.fused),
            "tile": plan.tile,
            "quantised": {p.name: p.arithmetic for p in plan.components if p.arithmetic},
            "places": {name: other.name for name, other in places.items()},
            "reason": plan.device_reason,
        },
        dtype=plan.dtype,
        dtypes={part.name: part.dtype for part in plan.components},
        dtype_reason=plan.dtype_reason,
        attention=plan.attention,
        placement=plan.placement,
        versions=_versions(),
        noise_sha256="",
        batch={},
        options=plan.followed(options).recorded(),
    )


def noise_digest(noise: torch.Tensor) -> str:
    """Return the SHA-256 of noise, little endian."""
    data = noise.numpy()
    if sys.byteorder == "big":
        data = data.byteswap()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"danqing": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    versions["torch"] = str(devices.import_torch().__version__)  # with its build: +cpu, +cu128
    return versions
