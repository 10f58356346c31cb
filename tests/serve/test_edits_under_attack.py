"""Images sent to `/v1/images/edits`, decoded: each is an image, or a documented 4xx.

The seeds are files of every kind that people have; mutators change bytes, chunks and lengths.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import struct
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.conftest import Running

pytestmark = pytest.mark.enable_socket
EDITS = "/v1/images/edits"
DOCUMENTED = {200, 400, 413, 429}
SLOWEST_SECONDS = 10.0
MOST_BYTES = 1 << 30
QUICK, FULL = 120, 2400


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one chunk more, after its header."""
    plain = saved(Image.new("RGB", (8, 8), "red"), "PNG")
    return plain[:33] + chunk(kind, data) + plain[33:]


def png_of(width: int, height: int, depth: int = 8, color: int = 2, rows: bytes = b"x") -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def seeds() -> dict[str, bytes]:
    """Return images that can be used, of many kinds."""
    dice = random.Random(1)
    color = Image.frombytes("RGB", (24, 16), dice.randbytes(24 * 16 * 3))
    alpha = Image.frombytes("RGBA", (16, 24), dice.randbytes(16 * 24 * 4))
    palette = color.quantize(8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a" * 2000
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "png": saved(color, "PNG"),
        "png interlaced": saved(color, "PNG", optimize=True, dpi=(72, 72)),
        "png rgba": saved(alpha, "PNG"),
        "png palette": saved(palette, "PNG", transparency=3),
        "png palette of bytes": saved(palette, "PNG", transparency=bytes(range(0, 256, 32))),
        "png gray": saved(color.convert("L"), "PNG", transparency=7),
        "png 1 bit": saved(color.convert("1"), "PNG"),
        "png 16 bit": saved(Image.new("I;16", (16, 16), 40_000), "PNG"),
        "png gray alpha": saved(alpha.convert("LA"), "PNG"),
        "png exif icc": saved(color, "PNG", exif=exif, icc_profile=profile),
        "jpeg": saved(color, "JPEG"),
        "jpeg progressive": saved(color, "JPEG", progressive=True, quality=30),
        "jpeg gray": saved(color.convert("L"), "JPEG"),
        "jpeg cmyk": saved(color.convert("CMYK"), "JPEG"),
        "jpeg exif icc": saved(color, "JPEG", exif=exif, icc_profile=profile),
        "webp": saved(color, "WEBP"),
        "webp lossless": saved(alpha, "WEBP", lossless=True),
        "webp exif icc": saved(color, "WEBP", exif=exif, icc_profile=profile),
    }


def odd_images() -> dict[str, bytes]:
    """Return images that are right and unusual: whatever comes, it is documented."""
    gray = Image.new("L", (16, 16), 9)
    broken = Image.Exif()
    broken[0x0112] = 99
    return {
        "strip down": saved(Image.new("RGB", (1, 100_000), "red"), "PNG"),
        "strip across": saved(Image.new("RGB", (100_000, 1), "red"), "PNG"),
        "one pixel": saved(Image.new("RGB", (1, 1), "red"), "PNG"),
        "jpeg strip": saved(Image.new("RGB", (1, 65_000), "red"), "JPEG"),
        "webp strip": saved(Image.new("RGB", (16_383, 1), "red"), "WEBP"),
        "exif of no orientation": saved(gray, "JPEG", exif=broken),
        "exif of nonsense": saved(
            gray, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60_000
        ),
        "exif loop": saved(gray, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08"),
        "icc of nonsense": saved(gray, "PNG", icc_profile=b"\xff" * 100_000),
        "xmp of nonsense": saved(gray, "JPEG", xmp=b"<" * 60_000),
    }


def bad_files() -> dict[str, bytes]:
    """Return files none of which is a usable image."""
    color, frames = (
        Image.new("RGB", (8, 8), "red"),
        [Image.new("RGB", (8, 8), c) for c in ("red", "blue")],
    )
    png, jpeg, webp = saved(color, "PNG"), saved(color, "JPEG"), saved(color, "WEBP")
    bomb = zlib.compress(bytes(80 << 20), 9)
    other = {
        kind: saved(color, kind)
        for kind in ("TIFF", "BMP", "GIF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF")
    }
    raw = {
        "empty": b"", "zero bytes": bytes(5000), "text": b"no image at all",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x08\0\0\0\x08\0\x08\0\3" + bytes(12),
        "animated png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "animated webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "mpo": saved(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "png and zip": png + b"PK\x03\x04" + bytes(60), "pdf and png": b"%PDF-1.7\n" + png,
        "gif and png": b"GIF89a" + png, "webp and more": webp + bytes(100), "half png": png[:-9],
        "half jpeg": jpeg[:-20], "half webp": webp[:-9], "png head": png[:33], "jpeg head": jpeg[:30],
        "png of no width": png_of(0, 10), "png of no height": png_of(10, 0),
        "png of all": png_of(2**31 - 1, 2**31 - 1), "png of more": png_of(2**32 - 1, 2**32 - 1),
        "png of 3 bits": png_of(8, 8, depth=3), "png of color 5": png_of(8, 8, color=5),
        "png bomb": png_of(50_000, 50_000, rows=bytes(1 << 20)),
        "png just too large": png_of(8000, 4001), "png without rows": png_of(5600, 5700, rows=b""),
        "png with too many rows": png_of(8, 8, rows=bytes(50 << 20))[:-1],
        "zTXt bomb": with_chunk(b"zTXt", b"a\0\0" + bomb), "iCCP bomb": with_chunk(b"iCCP", b"a\0\0" + bomb),
        "iTXt bomb": with_chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        "many zTXt": png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 200 + png[33:],
        "chunk of no end": png[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + png[33:],
    }  # fmt: skip
    return {**other, **raw}


def mutated(dice: random.Random, seed: bytes) -> bytes:
    """Return a file with a few bytes, lengths or pieces changed."""
    data = bytearray(seed)
    for _ in range(dice.choice([1, 1, 2, 4, 16])):
        place = dice.randrange(len(data))
        what = dice.randrange(7)
        if what == 0:
            data[place] = dice.randrange(256)
        elif what == 1:
            data[place] ^= 1 << dice.randrange(8)
        elif what == 2:
            del data[place : place + dice.randint(1, 40)]
        elif what == 3:
            data[place:place] = dice.randbytes(dice.randint(1, 40))
        elif what == 4:
            data[place : place + 4] = dice.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\1\0\0"]
            )
        elif what == 5:
            data[place:place] = data[dice.randrange(len(data)) :][: dice.randint(1, 200)]
        else:
            del data[dice.randint(len(data) // 2, len(data) - 1) + 1 :]
        data = data or bytearray(b"\0")
    return _with_right_sums(bytes(data)) if dice.random() < 0.5 else bytes(data)


def _with_right_sums(data: bytes) -> bytes:
    """Return a PNG whose checksums are right again, so that its chunks are read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    found, place = data[:8], 8
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size > len(data) - place - 12:
            break
        found += chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + size])
        place += 12 + size
    return found + data[place:]


def mutants(seed: int, count: int) -> Iterator[bytes]:
    dice, files = random.Random(seed), list(seeds().values())
    for _ in range(count):
        yield mutated(dice, dice.choice(files))


class Attack:
    """What came of many files."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0
        self.faults: list[str] = []
        self.most_bytes = 0

    async def send(self, files: list[tuple[str, bytes]], at_once: int = 4) -> None:
        gate = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=self.server.address, timeout=120) as client:

            async def one(name: str, data: bytes) -> None:
                asked = {"prompt": "x", "size": "64x64", "num_inference_steps": "1"}
                async with gate:
                    start = time.perf_counter()
                    answer = await client.post(EDITS, data=asked, files={"image": ("a.png", data)})
                    seconds = time.perf_counter() - start
                    self.note(name, data, answer, seconds)

            await asyncio.gather(*(one(*row) for row in files))

    def note(self, name: str, data: bytes, answer: httpx.Response, seconds: float) -> None:
        self.statuses[answer.status_code] += 1
        self.slowest = max(self.slowest, seconds)
        pages = Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]
        self.most_bytes = max(self.most_bytes, int(pages) * os.sysconf("SC_PAGE_SIZE"))
        wrong = answer.status_code not in DOCUMENTED or "bug" in answer.text[:2000]
        if answer.status_code >= 400:
            wrong |= set(answer.json()["error"]) != {"message", "type", "param", "code"}
            wrong |= "/tmp" in answer.text or ".py" in answer.text
        if wrong or seconds > SLOWEST_SECONDS:
            self.faults.append(
                f"{name}: {answer.status_code}, {seconds:.1f} s: {answer.text[:300]}, {data[:80]!r}"
            )


def attack(server: Running, files: list[tuple[str, bytes]]) -> Attack:
    found = Attack(server)
    first = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    before = int(first) * os.sysconf("SC_PAGE_SIZE")
    asyncio.run(found.send(files))
    print(
        dict(found.statuses),
        f"slowest {found.slowest:.2f} s",
        f"{found.most_bytes - before >> 20} MiB more",
    )
    assert found.faults == []
    assert found.most_bytes - before < MOST_BYTES
    assert httpx.get(f"{server.address}/readyz", timeout=30).status_code == 200
    return found


def test_every_kind_of_image_is_edited(deepgen_server: Running) -> None:
    found = attack(deepgen_server, list(seeds().items()))
    assert found.statuses == {200: len(seeds())}


def test_files_that_cannot_be_used_are_refused(deepgen_server: Running) -> None:
    found = attack(deepgen_server, list(bad_files().items()))
    assert found.statuses == {400: len(bad_files())}


def test_unusual_images_are_edited_or_refused(deepgen_server: Running) -> None:
    attack(deepgen_server, list(odd_images().items()))


@pytest.mark.parametrize(
    "count", [QUICK, pytest.param(FULL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_changed_images_are_edited_or_refused(count: int, deepgen_server: Running) -> None:
    files = [(f"mutant {number}", data) for number, data in enumerate(mutants(count, count))]
    found = attack(deepgen_server, files)
    assert sum(found.statuses.values()) == count
    assert found.statuses[400]
    assert found.statuses[200]
