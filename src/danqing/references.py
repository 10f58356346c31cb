"""Reference images: the pictures an edit begins with, read into plain RGB whatever they were."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import RequestError
from danqing.files import expand, open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
"""Formats that are read, by Pillow's names. Others may start a program: EPS starts Ghostscript."""
MAX_PIXELS = 100_000_000
"""Of a reference image; beyond it the file is a mistake, or an attack on the memory."""
MAX_PIXELS_HELD = 40_000_000
"""The same for decoders that keep several copies of it: WebP and progressive JPEG."""
MAX_FILE_BYTES = 320 * 2**20
"""Of an image file: `MAX_PIXELS` of RGB, uncompressed."""
MAX_SCANS = 64
"""Of a progressive JPEG, which usually has ten; each goes over the whole image."""
MAX_TIFF_TAGS, MAX_TIFF_VALUES, MAX_TILE_SIDE = 1000, 200_000, 8192
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
"""The last two are no TIFF's, but Pillow reads them."""
_TIFF_TILE_SIDES = (322, 323)
_TIFF_NUMBERS = {3: "H", 4: "I", 16: "Q"}
_TIFF_BYTES = (1, 2, 6, 7)
"""Types of one byte, which Pillow leaves as they are: profiles, texts."""
_ORIENTATION = 0x0112
_STRIP_PIXELS = 2**22
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""Entropy-coded data has 0 or a restart marker after 0xFF."""
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
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
        digest = hashlib.sha256(f"{self.image.width}x{self.image.height}:".encode())
        for top, bottom in _strips(self.image):
            digest.update(self.image.crop((0, top, self.image.width, bottom)).tobytes())
        object.__setattr__(self, "pixels_sha256", digest.hexdigest())

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
        return _plain_from_memory(given)
    raise RequestError(
        "this is no reference image",
        seen=type(given).__name__,
        allowed="the name of a picture file, or a PIL image",
    )


def _plain_from_memory(image: Image) -> Reference:
    """Return a reference from a PIL image, which may not be decoded yet."""
    try:
        return _plain(image, None)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(
            "the reference image cannot be read", seen=f"an image: {str(error)[:200]}"
        ) from error


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
    try:
        with open_regular(path) as file:
            return _from_stream(file, path)
    except FileNotFoundError as error:
        raise RequestError("reference image not found", seen=path) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            "the reference image cannot be read", seen=f"{path}: {reason}"
        ) from error


def from_bytes(data: bytes) -> Reference:
    """Return a reference from the bytes of an image file.

    Raises:
        RequestError: they are not an image, or it is too large.
    """
    return _from_stream(io.BytesIO(data), None)


def _from_stream(file: BinaryIO, path: Path | None) -> Reference:
    from PIL import Image, UnidentifiedImageError

    name = path or "an image"
    try:
        _judge_file(file, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(file, formats=FORMATS) as image:
                return _plain(image, path)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except UnidentifiedImageError as error:
        raise RequestError(
            "the reference image is of no format that can be read",
            seen=name,
            allowed=", ".join(FORMATS),
        ) from error
    except MemoryError as error:
        raise _too_large(path, "it does not fit into memory") from error
    except Exception as error:
        # Pillow raises many kinds for damaged files: OSError, SyntaxError, struct.error, ...
        raise RequestError(
            "the reference image cannot be read", seen=f"{name}: {str(error)[:200]}"
        ) from error


def _judge_file(file: BinaryIO, path: Path | None) -> None:
    """Refuse a file that a decoder would spend too much on before it knows the size.

    Raises:
        RequestError: it is too large.
        ValueError: it is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise _too_large(path, f"{size} bytes", f"{MAX_FILE_BYTES} bytes")
    file.seek(0)
    start = file.read(4)
    if start in _TIFF_STARTS:
        _judge_tiff(file, start, path)
    elif start.startswith(b"\xff\xd8"):
        file.seek(0)
        _judge_jpeg(file.read(), path)
    file.seek(0)


def _judge_jpeg(data: bytes, path: Path | None) -> None:
    """Refuse a JPEG with very many scans: a few bytes each, and each goes over all pixels."""
    place, scans = 2, 0
    while marker := _JPEG_MARKER.search(data, place):
        kind = data[marker.end() - 1]
        if kind == _JPEG_END:
            return
        scans += kind == _JPEG_SCAN
        if scans > MAX_SCANS:
            raise _too_large(path, f"more than {MAX_SCANS} scans", f"{MAX_SCANS} scans")
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _judge_tiff(file: BinaryIO, start: bytes, path: Path | None) -> None:
    """Refuse a TIFF whose first directory has tables that are absurd for an image."""
    order = "<" if start.startswith(b"II") else ">"
    big = b"+" in start
    file.seek(8 if big else 4)
    offset, count = ("Q", "Q") if big else ("I", "H")
    (place,) = _unpack(file, order + offset)
    file.seek(place)
    (entries,) = _unpack(file, order + count)
    if entries > MAX_TIFF_TAGS:
        raise _too_large(path, f"{entries} tags", f"{MAX_TIFF_TAGS} tags")
    for _ in range(entries):
        tag, kind, number = _unpack(file, f"{order}HH{offset}")
        value = file.read(struct.calcsize(order + offset))
        if kind not in _TIFF_BYTES and number > MAX_TIFF_VALUES:
            raise _too_large(path, f"a tag of {number} values", f"{MAX_TIFF_VALUES} values")
        if tag in _TIFF_TILE_SIDES:
            form = f"{order}{_TIFF_NUMBERS.get(kind, offset)}"
            (side,) = struct.unpack_from(form, value)
            if side > MAX_TILE_SIDE:
                raise _too_large(path, f"tiles of {side} pixels", f"{MAX_TILE_SIDE} pixels")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _too_large(path: Path | None, seen: str, allowed: str = "") -> RequestError:
    return RequestError(
        "the reference image is too large",
        seen=f"{path or 'an image'}: {seen}",
        allowed=allowed or f"{MAX_PIXELS} pixels",
        hint="the model reads about 512x512 of them: scale it down first",
    )


def _plain(image: Image, path: Path | None) -> Reference:
    """Return the image upright, in RGB, on white; with notes of all that was done to it."""
    from PIL import ImageOps

    # these decoders keep several copies of the whole image
    held = image.format == "WEBP" or "progressive" in image.info
    most = MAX_PIXELS_HELD if held else MAX_PIXELS
    if image.width * image.height > most:
        raise _too_large(path, f"{image.width}x{image.height}", f"{most} pixels")
    if not image.width * image.height:
        raise RequestError("the reference image has no pixels", seen=path or "an image")
    notes = []
    if getattr(image, "is_animated", False):  # counting the frames would read all of them
        notes.append("it has several frames: the first is read")
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        notes.append("it was turned upright, as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    return Reference(_to_rgb(image, notes), path, tuple(notes))


def _to_rgb(image: Image, notes: list[str]) -> Image:
    """Return the image in RGB; in strips, so that only one more copy of it is needed."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        notes.append("its 16 bits were scaled to 8")
        return _in_strips(image, _from_sixteen_bit)
    if image.mode == "F":
        raise RequestError(
            "the reference image has floating point values, whose white is not known",
            seen=f"mode {image.mode}",
            allowed="8 or 16 bits",
            hint="save it as PNG first",
        )
    if image.has_transparency_data:
        notes.append("it is transparent: it was laid on white")
        return _in_strips(image, _on_white)
    if image.mode == "CMYK":
        notes.append("it is in CMYK: converted without a colour profile")
    return _in_strips(image, lambda strip: strip.convert("RGB"))


def _in_strips(image: Image, convert: Callable[[Image], Image]) -> Image:
    from PIL import Image as Images

    whole = Images.new("RGB", image.size)
    for top, bottom in _strips(image):
        whole.paste(convert(image.crop((0, top, image.width, bottom))), (0, top))
    return whole


def _strips(image: Image) -> Iterator[tuple[int, int]]:
    """Yield the rows of strips of about `_STRIP_PIXELS`."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)


def _on_white(strip: Image) -> Image:
    from PIL import Image as Images

    layer = strip.convert("RGBA")
    ground = Images.new("RGBA", layer.size, "white")
    return Images.alpha_composite(ground, layer).convert("RGB")


def _from_sixteen_bit(strip: Image) -> Image:
    """Scale 0..65535 to 0..255, rounded to nearest; Pillow alone would cut at 255."""
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(strip).astype(np.int64)
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
