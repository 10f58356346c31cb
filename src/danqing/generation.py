"""What came out: `Generation`, its images, their cost and provenance; no torch here."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from danqing.request import RECORD_SCHEMA
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from PIL.Image import Image

    from danqing.request import Request

StageName = Literal["load", "encode", "denoise", "decode"]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took.

    Attributes:
        name: `load`, `encode`, `denoise` or `decode`.
        seconds: wall time, the device synchronised before and after.
        peak_bytes: the most memory in use during the stage: the device allocator's peak, on a CPU
            the process's peak resident set; None where it cannot be known.
        pictures: how many pictures share this cost.
        steps: denoising steps inside, 0 in the other stages.
        component: which was read, in the stage `load`.
        reused: the stage was not run: its result for the same prompt was still there.
        compile_seconds: of its seconds, what torch.compile took.
    """

    name: StageName
    seconds: float
    peak_bytes: int | None
    pictures: int = 1
    steps: int = 0
    component: str = ""
    reused: bool = False
    compile_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a picture, so that it can be made again.

    Attributes:
        model: family, kind, layout, path, weights fingerprint, and the SHA-256 of files that were
            computed before (`danqing check --digest`).
        device: name, chip, driver, threads, and why this device.
        dtype: what the model computes in.
        dtypes: dtype of each component.
        dtype_reason: why.
        attention: the attention kernel's name, `auto` for torch's own choice.
        placement: where the components are while they are not needed.
        versions: of danqing, Python, and the libraries that computed.
        noise_sha256: digest of this picture's starting noise (float32, little endian).
        batch: pictures computed together and, for more than one, what that did to the bits.
        options: how the model ran, as `danqing.Options` takes it; the record has it at its top.
    """

    model: Mapping[str, Any]
    device: Mapping[str, Any]
    dtype: str
    dtypes: Mapping[str, str]
    dtype_reason: str
    attention: str
    placement: str
    versions: Mapping[str, str]
    noise_sha256: str
    batch: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture with everything known about it.

    Attributes:
        image: RGB, 8 bits.
        request: the resolved request that makes just this picture.
        index: its number among the pictures of the request it came from.
        stages: cost of each stage, in order.
        provenance: what made it.
        notes: what the user should know (a rounded size, a truncated prompt).
    """

    image: Image
    request: Request
    index: int
    stages: tuple[StageCost, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    @property
    def pixels_sha256(self) -> str:
        """Digest of the raw RGB bytes, row by row."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return everything but the pixels, as it is written into the file; JSON types only."""
        provenance = dataclasses.asdict(self.provenance)
        options = provenance.pop("options")
        return {
            "danqing": __version__,
            "schema": RECORD_SCHEMA,
            "ai_generated": True,
            "request": self.request.model_dump(),
            "picture": {
                "width": self.image.width,
                "height": self.image.height,
                "index": self.index,
                "pixels_sha256": self.pixels_sha256,
            },
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "options": options,
            "provenance": provenance,
            "notes": list(self.notes),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the picture with its record; see `danqing.pictures.save`."""
        from danqing.pictures import save

        return save(self.image, self.record(), path, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answer to one request.

    Attributes:
        pictures: as many as `request.num_images_per_prompt`, in the order of their seeds.
        request: the resolved request: what was asked, with every default filled in.
    """

    pictures: tuple[Picture, ...]
    request: Request

    @property
    def image(self) -> Image:
        """The first picture's pixels."""
        return self.pictures[0].image

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures' pixels."""
        return tuple(picture.image for picture in self.pictures)

    @property
    def stages(self) -> tuple[StageCost, ...]:
        """Cost of each stage of the first picture."""
        return self.pictures[0].stages

    @property
    def provenance(self) -> Provenance:
        """What made the first picture."""
        return self.pictures[0].provenance

    def save(self, path: str | Path, *, overwrite: bool = False) -> tuple[Path, ...]:
        """Write all pictures.

        Args:
            path: a file name; `{seed}`, `{index}` and `{model}` are filled in. The suffix chooses
                PNG, JPEG or WebP.
            overwrite: replace a file that is there; otherwise the next free name is taken.

        Returns:
            The names really used.
        """
        from danqing.pictures import fill_template

        return tuple(
            picture.save(
                fill_template(
                    str(path),
                    seed=picture.request.seed,
                    index=picture.index,
                    model=picture.provenance.model["name"],
                ),
                overwrite=overwrite,
            )
            for picture in self.pictures
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a long piece of work.

    Attributes:
        stage: which stage reports; `wait` while requests of other threads have the device.
        item: the component being loaded, the image being made, or the device waited for.
        done: bytes, steps or requests finished.
        total: bytes, steps or requests in all.
        unit: what is counted.
        seconds: since the item began.
        preview: what the picture will look like, as far as it can be told; of some steps only.
    """

    stage: StageName | Literal["wait"]
    item: str
    done: int
    total: int
    unit: Literal["bytes", "steps", "requests"]
    seconds: float = field(default=0.0, compare=False)
    preview: Image | None = field(default=None, compare=False)
