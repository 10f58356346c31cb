"""Reference images: the pictures an edit begins with, read into plain RGB whatever they were."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import RequestError
from danqing.files import expand

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""Of a reference image; beyond it the file is a mistake, or an attack on the memory."""
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_WHOLE, _BYTE = 65535, 255


@dataclass(frozen=True)
class Reference:
    """One reference image.

    Attributes:
        image: RGB, 8 bits, upright, nothing transparent.
        path: where it was read from; None if it came from memory.
        notes: what was done to make it plain RGB.
    """

    image: Image = field(compare=False, repr=False)
    path: Path | None
    notes: tuple[str, ...] = ()
    pixels_sha256: str = ""

    def __post_init__(self) -> None:
        """Take the digest of size and pixels; two references with the same are equal."""
        size = f"{self.image.width}x{self.image.height}:".encode()
        digest = hashlib.sha256(size + self.image.tobytes()).hexdigest()
        object.__setattr__(self, "pixels_sha256", digest)

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.image.width

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.image.height

    @cached_property
    def name(self) -> str:
        """What it is called in messages."""
        return self.path.name if self.path else "the image given"

    def record(self) -> dict[str, Any]:
        """Return what is kept of it in a picture's record; JSON types only."""
        return {
            "path": None if self.path is None else tilde(self.path.absolute()),
            "width": self.width,
            "height": self.height,
            "pixels_sha256": self.pixels_sha256,
        }


def read_references(given: Any) -> tuple[Reference, ...]:
    """Return references from paths, PIL images, records, or a list of such.

    Raises:
        RequestError: one of them is no picture, or too large.
    """
    several = given if isinstance(given, (list, tuple)) else [given]
    return tuple(_read(one) for one in several)


def _read(given: Any) -> Reference:
    if isinstance(given, Reference):
        return given
    if isinstance(given, Mapping):
        return _from_record(given)
    if isinstance(given, (str, Path)):
        return _from_file(expand(given))
    from PIL.Image import Image

    if isinstance(given, Image):
        return _plain(given, None)
    raise RequestError(
        "this is no reference image",
        seen=type(given).__name__,
        allowed="the name of a picture file, or a PIL image",
    )


def _from_record(record: Mapping[str, Any]) -> Reference:
    place, wanted = record.get("path"), record.get("pixels_sha256")
    if not isinstance(place, str):
        raise RequestError(
            "the reference image was given from memory, so it cannot be found again",
            hint="name it: --image FILE",
        )
    found = _from_file(expand(place))
    if found.pixels_sha256 != wanted:
        raise RequestError(
            "the reference image is not the one the picture was made from",
            seen=f"{place}: pixels {found.pixels_sha256[:16]}",
            allowed=f"pixels {str(wanted)[:16]}",
            hint="name the right one: --image FILE",
        )
    return found


def _from_file(path: Path) -> Reference:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(path) as image:
                return _plain(image, path)
    except FileNotFoundError as error:
        raise RequestError("there is no such reference image", seen=path) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except UnidentifiedImageError as error:
        raise RequestError(
            "the reference image is of no format that can be read",
            seen=path,
            allowed="PNG, JPEG, WebP, TIFF, BMP, GIF and others that Pillow reads",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise RequestError(
            "the reference image cannot be read", seen=f"{path}: {str(error)[:200]}"
        ) from error


def _too_large(path: Path | None, seen: str) -> RequestError:
    return RequestError(
        "the reference image is too large",
        seen=f"{path or 'an image'}: {seen}",
        allowed=f"{MAX_PIXELS} pixels",
        hint="the model reads about 512x512 of them: scale it down first",
    )


def _plain(image: Image, path: Path | None) -> Reference:
    """Return the image upright, in RGB, on white; with notes of all that was done to it."""
    from PIL import ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path, f"{image.width}x{image.height}")
    if not image.width * image.height:
        raise RequestError("the reference image has no pixels", seen=path or "an image")
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"it has {frames} frames: the first is read")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
        notes.append("it was turned upright, as its EXIF orientation says")
    return Reference(_to_rgb(upright, notes), path, tuple(notes))


def _to_rgb(image: Image, notes: list[str]) -> Image:
    from PIL import Image as Images

    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        notes.append("its 16 bits were scaled to 8")
        return _from_sixteen_bit(image)
    if image.mode == "F":
        raise RequestError(
            "the reference image has floating point values, whose white is not known",
            seen=f"mode {image.mode}",
            allowed="8 or 16 bits",
            hint="save it as PNG first",
        )
    if image.has_transparency_data:
        notes.append("it is transparent: it was laid on white")
        layer = image.convert("RGBA")
        ground = Images.new("RGBA", layer.size, "white")
        return Images.alpha_composite(ground, layer).convert("RGB")
    if image.mode == "CMYK":
        notes.append("it is in CMYK: converted without a colour profile")
    return image.convert("RGB")


def _from_sixteen_bit(image: Image) -> Image:
    """Scale 0..65535 to 0..255, rounded to nearest; Pillow alone would cut at 255."""
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _WHOLE:
        raise RequestError(
            "the reference image has values beyond 16 bits",
            seen=f"{values.min()} to {values.max()}",
            allowed=f"0 to {_WHOLE}",
        )
    scaled = ((values * _BYTE + _WHOLE // 2) // _WHOLE).astype(np.uint8)
    return Images.fromarray(scaled).convert("RGB")


def tilde(path: Path) -> str:
    """Shorten the home folder to `~`: a shared picture need not name its maker's account."""
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the user is in no list of users
        return str(path)
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
