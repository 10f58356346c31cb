"""Picture files: PNG, JPEG and WebP that carry their record, written whole or not at all.

Where the record lies: PNG in an iTXt chunk named `danqing`; JPEG and WebP in the EXIF UserComment.
Every file is also marked as machine-made for other programs: EXIF Software, and in XMP the IPTC
digital source type `trainedAlgorithmicMedia`
(https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia).
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import string
import struct
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.atomic import sync, sync_folder, temporary_file
from danqing.errors import OutputError, RequestError
from danqing.files import expand, open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("seed", "index", "model")
RECORD_KEY = "danqing"
MAX_NAMES = 100_000
MAX_RECORD_BYTES = 2**20
"""Of a record; the longest prompts make less than a tenth of it."""
MAX_SIDE = 16384
"""Pixels of a side of an image that danqing writes."""
MAX_DEPTH = 16
"""Tables and lists inside each other in a record; danqing's own have 5."""
_MAX_CHUNKS = 10_000
_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"

_SOFTWARE, _DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x0131, 0x010E, 0x8769, 0x9286
_UNDEFINED_CODE = (
    b"\0" * 8
)  # EXIF 2.3, 4.6.5 UserComment: character code "undefined"; ours is UTF-8
_XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    " Iptc4xmpExt:DigitalSourceType="
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
)


def fill_template(template: str, **values: object) -> Path:
    """Fill `{seed}`, `{index}` and `{model}` in an output name.

    Raises:
        RequestError: another field is named, or a brace is unbalanced.
    """
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise RequestError(
            "the output name has an unbalanced brace", seen=template, hint="write {{ for a brace"
        ) from error
    if unknown := [field for field in fields if field not in FIELDS]:
        raise RequestError(
            "the output name has an unknown field",
            seen="{" + unknown[0] + "}",
            allowed=" ".join("{" + field + "}" for field in FIELDS),
        )
    try:
        path = expand(template.format(**values))
        os.fsencode(path)
        if "\0" not in str(path):
            return path
        msg = "a null character"
        raise ValueError(msg)  # noqa: TRY301
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise RequestError("the output name cannot be filled in", seen=template) from error


def check_target(path: Path, *, pixels: int) -> None:
    """Fail before the work if this picture could not be written after it.

    Creates the parent folder when it is missing.

    Args:
        path: where the picture is to go.
        pixels: of the picture, to see whether the disk has room for it.

    Raises:
        RequestError: the suffix is of no format danqing writes.
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    _format_of(path)
    folder = path.parent
    try:
        is_folder = path.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise _write_error(path, error) from error
    if is_folder:
        raise OutputError("the output name is a folder", seen=path, hint=f"try {path}/{{seed}}.png")
    if free_bytes < 4 * pixels:
        raise OutputError(
            "the disk has no room for the picture",
            seen=f"{free_bytes} bytes free in {folder}",
            allowed=f"at least {4 * pixels} bytes (four for each pixel)",
        )


def save(
    image: Image, record: Mapping[str, Any], path: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a picture with its record; after a crash there is a whole file or none.

    Args:
        image: the pixels.
        record: JSON types only; read back by `read_record`.
        path: the suffix chooses the format.
        overwrite: replace an existing file; otherwise `name-1.png`, `name-2.png`, ... is taken.

    Returns:
        The name really used.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    data = encode(image, record, _format_of(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _write_whole(data, path, overwrite=overwrite)
    except OSError as error:
        raise _write_error(path, error) from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record that an image file carries.

    No decoder sees the file: only its chunks are walked, so its pixels cannot do anything.

    Raises:
        OutputError: the image is not found, is damaged, or it has no record.
    """
    path = expand(path)
    try:
        with open_regular(path) as file:
            text = _record_text(file)
    except FileNotFoundError as error:
        raise OutputError("image not found", seen=path) from error
    except OSError as error:
        raise OutputError(
            "the image cannot be read", seen=f"{path}: {error.strerror or error}"
        ) from error
    except Exception as error:  # Pillow raises many kinds for damaged EXIF data
        raise OutputError(
            "this is not a whole picture",
            seen=f"{path}: {str(error)[:200]}",
            allowed=", ".join(dict.fromkeys(FORMATS.values())),
        ) from error
    return _parsed(text, path)


def _record_text(file: BinaryIO) -> str:
    """Return the text of the record, or nothing.

    Raises:
        ValueError: the file is of another format, or damaged.
    """
    start = file.read(12)
    file.seek(0)
    if start.startswith(_PNG):
        return _png_text(file)
    if start.startswith(b"\xff\xd8\xff"):
        return _exif_text(_jpeg_exif(file))
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return _exif_text(_webp_exif(file))
    msg = "neither PNG, JPEG nor WebP"
    raise ValueError(msg)


def _png_text(file: BinaryIO) -> str:
    """Return the text of the chunk with the record, which stands before the pixels."""
    file.seek(len(_PNG))
    for number in range(_MAX_CHUNKS):
        length, kind = struct.unpack(">I4s", _exactly(file, 8))
        if (number == 0) != (kind == b"IHDR"):
            msg = "its header is not where it belongs"
            raise ValueError(msg)
        if kind in (b"IDAT", b"IEND"):
            return ""
        if kind not in (b"IHDR", b"iTXt", b"zTXt", b"tEXt") or length > MAX_RECORD_BYTES:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        data = _exactly(file, length)
        if zlib.crc32(kind + data) != int.from_bytes(_exactly(file, 4), "big"):
            msg = f"its {kind.decode()} chunk is damaged"
            raise ValueError(msg)
        if kind == b"IHDR":
            _check_sides(*struct.unpack(">II", data[:8]))
        elif data.startswith(RECORD_KEY.encode() + b"\0"):
            return _chunk_text(kind, data[len(RECORD_KEY) + 1 :])
    msg = f"it has more than {_MAX_CHUNKS} chunks before its pixels"
    raise ValueError(msg)


def _check_sides(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        msg = f"it is {width}x{height} pixels"
        raise ValueError(msg)


def _chunk_text(kind: bytes, data: bytes) -> str:
    """Return a text chunk's text (PNG 3, 11.3.3), at most `MAX_RECORD_BYTES` of it."""
    if kind == b"tEXt":
        return data.decode("latin-1")
    packed, encoding = kind == b"zTXt", "latin-1"
    if kind == b"iTXt":
        packed, encoding = data[:1] == b"\1", "utf-8"
        data = data[2:].split(b"\0", 2)[2]  # language, translated keyword
    else:
        data = data[1:]
    if packed:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(data, MAX_RECORD_BYTES)
        if unpacker.unconsumed_tail:
            msg = f"its record is larger than {MAX_RECORD_BYTES} bytes"
            raise ValueError(msg)
    return data.decode(encoding, "replace")


def _jpeg_exif(file: BinaryIO) -> bytes:
    """Return the EXIF data of a JPEG, or nothing."""
    file.seek(2)
    for _ in range(_MAX_CHUNKS):
        marker, kind = _exactly(file, 2)
        while kind == 0xFF:  # noqa: PLR2004 - fill bytes
            (kind,) = _exactly(file, 1)
        if marker != 0xFF or kind in (0, 0xD9):  # noqa: PLR2004
            break
        if kind == 0xDA:  # noqa: PLR2004 - the pixels begin
            return b""
        length = int.from_bytes(_exactly(file, 2), "big") - 2
        if kind == 0xE1 and length > len(_EXIF):  # noqa: PLR2004
            data = _exactly(file, length)
            if data.startswith(_EXIF):
                return data
        elif length < 0:
            break
        else:
            file.seek(length, os.SEEK_CUR)
    msg = "its segments are damaged"
    raise ValueError(msg)


def _webp_exif(file: BinaryIO) -> bytes:
    """Return the EXIF data of a WebP file, or nothing."""
    file.seek(12)
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if not head:
            return b""
        kind, length = struct.unpack("<4sI", head)
        if kind == b"EXIF":
            if length > MAX_RECORD_BYTES:
                break
            return _exactly(file, length)
        file.seek(length + length % 2, os.SEEK_CUR)
    msg = "its chunks are damaged"
    raise ValueError(msg)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        msg = "it is cut short"
        raise ValueError(msg)
    return data


def _exif_text(data: bytes) -> str:
    """Return the text of EXIF's UserComment, if it is in the form danqing writes."""
    from PIL import Image

    exif = Image.Exif()
    exif.load(data)
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNDEFINED_CODE):
        return ""
    return comment[len(_UNDEFINED_CODE) :].decode("utf-8", "replace")


def _parsed(text: str, path: Path) -> dict[str, Any]:
    if not text:
        raise _no_record(path)
    try:
        record = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _no_record(path) from error
    if not isinstance(record, dict) or not _is_flat(record):
        raise OutputError("the picture's record is damaged", seen=path)
    return record


def _no_record(path: Path) -> OutputError:
    return OutputError(
        "the picture carries no danqing record",
        seen=path,
        hint="it was made by another program, or its metadata was stripped on the way",
    )


def _refuse(text: str) -> float:
    msg = f"{text[:40]} is not a finite number"
    raise ValueError(msg)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _is_flat(record: Any) -> bool:
    """Say whether a record is nested no deeper than those who print it can follow."""
    level = [record]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return not level


def _format_of(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise RequestError(
            "the output name has no known picture suffix",
            seen=path.name,
            allowed=" ".join(FORMATS),
        ) from None


def encode(
    image: Image, record: Mapping[str, Any], file_format: str, *, quality: int | None = None
) -> bytes:
    """Return a picture file with its record.

    Args:
        image: the pixels.
        record: JSON types only.
        file_format: PNG, JPEG or WebP, in any case.
        quality: 0 to 100, of JPEG and WebP; 95 if it is left out.
    """
    from PIL import Image as Images
    from PIL.PngImagePlugin import PngInfo

    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # a file name that is not UTF-8 has surrogates, which JSON can only escape
    text = text.encode("utf-8", "backslashreplace").decode()
    exif = Images.Exif()
    exif[_SOFTWARE] = f"danqing {record.get('danqing', '')} (AI-generated)"
    exif[_DESCRIPTION] = "AI-generated picture"
    options: dict[str, Any] = {}
    file_format = file_format.upper()
    if file_format == "PNG":
        info = PngInfo()
        info.add_itxt(RECORD_KEY, text)
        info.add_itxt("XML:com.adobe.xmp", _XMP)
        options["pnginfo"] = info
    else:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNDEFINED_CODE + text.encode()
        options |= {"quality": 95 if quality is None else quality, "xmp": _XMP.encode()}
        if file_format == "JPEG":
            options["subsampling"] = 0
    buffer = io.BytesIO()
    image.save(buffer, file_format, exif=exif, **options)
    return buffer.getvalue()


def _write_whole(data: bytes, path: Path, *, overwrite: bool) -> Path:
    with temporary_file(path.parent) as (file, temporary):
        file.write(data)
        sync(file)
        name = _publish(temporary, path, overwrite=overwrite)
    sync_folder(path.parent)
    return name


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> Path:
    """Give the finished file its name; a hard link never replaces what is there."""
    if overwrite:
        temporary.replace(path)
        return path
    for number in range(MAX_NAMES):
        name = path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            os.link(temporary, name)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            if name.exists():  # this file system has no hard links
                continue
            temporary.rename(name)
        return name
    raise OutputError("no free name is left", seen=path, hint="choose another, or --overwrite")


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
    errno.EACCES: "the folder may not be written",
    errno.EPERM: "the folder may not be written",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the output name is too long",
    errno.ENOTDIR: "a part of the output path is a file, not a folder",
    errno.EEXIST: "a part of the output path is a file, not a folder",
}


def _write_error(path: Path, error: OSError) -> OutputError:
    what = _REASONS.get(error.errno or 0, "the picture cannot be written")
    return OutputError(what, seen=f"{path} ({error.strerror or error})")
