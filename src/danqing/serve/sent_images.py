"""Read the images that a client sends: judged by their headers, then decoded."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from danqing.errors import RequestError
from danqing.escaping import escape
from danqing.references import Reference, read_references

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 32_000_000
"""Of an image to edit: what a good camera makes; 96 MB when it is decoded."""
MAX_PIXELS_IN_ALL = 2 * MAX_PIXELS
"""Of all images of one request."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


def read_images(files: Sequence[bytes | memoryview]) -> list[Reference]:
    """Return the images to edit of one request.

    Raises:
        RequestError: naming the first that cannot be used.
    """
    found, pixels = [], 0
    for number, data in enumerate(files, start=1):
        name = f"image {number}"
        found.append(read_image(data, name, MAX_PIXELS_IN_ALL - pixels))
        pixels += found[-1].width * found[-1].height
    return found


def read_image(data: bytes | memoryview, name: str, most: int = MAX_PIXELS_IN_ALL) -> Reference:
    """Return an image that came in a request as upright RGB; it is judged before it is decoded.

    Args:
        data: of the file.
        name: for errors.
        most: pixels that other images of the request leave for it.

    Raises:
        RequestError: it is not a PNG, JPEG or WebP, too large, or broken.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    data = bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its metadata; its size is judged below
            image = Images.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            _judge(image, name, most)
            image.load()
            _check_end(image.format, data, name)
            return read_references(image)[0]
    except Images.DecompressionBombError as error:
        raise _bad(name, escape(str(error)[:200]), f"{MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise _bad(name, f"{len(data)} bytes of another format", "PNG, JPEG, WebP") from error
    except RequestError as error:
        if error.setting:
            raise
        raise _bad(name, str(error), "PNG, JPEG, WebP") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        seen = f"it is broken: {escape(str(error)[:200], one_line=True)}"
        raise _bad(name, seen, "PNG, JPEG, WebP") from error


def _judge(image: Image, name: str, most: int) -> None:
    """Refuse a picture by what its header says."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise _bad(name, f"{image.width}x{image.height}", f"{MAX_PIXELS} pixels in all")
    if pixels > most:
        raise _bad(
            name, f"{image.width}x{image.height}, beside the others",
            f"{MAX_PIXELS_IN_ALL} pixels in all images of a request",
        )  # fmt: skip
    if getattr(image, "n_frames", 1) > 1:
        raise _bad(name, "several frames", "one picture")


def _check_end(kind: str | None, data: bytes, name: str) -> None:
    """Refuse a file that is cut off, or that goes on as another after the picture.

    Pillow reads what is there; a JPEG may be followed by what phones put there.
    """
    whole = {
        "PNG": data.endswith(_PNG_END),
        "WEBP": len(data) - 8 in (int.from_bytes(data[4:8], "little") + odd for odd in (0, 1)),
        "JPEG": _JPEG_END in data,
    }
    if not whole.get(kind or "", False):
        raise _bad(name, f"{kind} that does not end where it says", "a whole file")


def _bad(name: str, seen: str, allowed: str) -> RequestError:
    return RequestError("invalid image", seen=seen, allowed=allowed, setting=name)
