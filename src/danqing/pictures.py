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
import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.atomic import sync, sync_folder, temporary_file
from danqing.errors import OutputError, RequestError
from danqing.files import expand

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Exif, Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("seed", "index", "model")
RECORD_KEY = "danqing"
MAX_NAMES = 100_000

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
        return expand(template.format(**values))
    except (ValueError, TypeError) as error:
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
    """Return the record a picture carries.

    Raises:
        OutputError: there is no such picture, or it has no record.
    """
    from PIL import Image, UnidentifiedImageError

    path = expand(path)
    try:
        with Image.open(path) as image:
            text = image.info.get(RECORD_KEY) or _user_comment(image.getexif())
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = "there is no such picture" if not path.exists() else "this is not a whole picture"
        raise OutputError(reason, seen=path) from error
    try:
        record = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise OutputError(
            "the picture carries no danqing record",
            seen=path,
            hint="it was made by another program, or its metadata was stripped on the way",
        ) from error
    if not isinstance(record, dict):
        raise OutputError("the picture's record is damaged", seen=path)
    return record


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


def _user_comment(exif: Exif) -> str | None:
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNDEFINED_CODE):
        return None
    return comment[len(_UNDEFINED_CODE) :].decode("utf-8", "replace")


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
