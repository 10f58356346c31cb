"""Image files and their records are untrusted: what they may start, open, cost and decide."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import time
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from danqing import pictures
from danqing.cli import app
from danqing.errors import OutputError, RequestError
from danqing.references import read_references
from tests.cli.test_terminal import NIGHT, RECORD, changed, image_with
from tests.conftest import run_danqing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REQUEST, WEIGHTS, OUTPUT = 2, 3, 7
SECONDS, BYTES = 10, 2**30


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.stderr, result.stderr
    assert "this is a bug" not in result.stderr, result.stderr
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DANQING_MODELS", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))


def record_of(*changes: tuple[str, object]) -> dict[str, Any]:
    """Return the record of an image of the pocket model with other fields, by dotted names."""
    record = RECORD
    for name, value in changes:
        record = changed(record, tuple(name.split(".")), value)
    return record


MODEL = "provenance.model"
ELSEWHERE = (
    (f"{MODEL}.path", "/etc/shadow"), (f"{MODEL}.fingerprint", "0" * 64),
)  # fmt: skip


# --- formats -------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` that records that it was started."""
    home, log = tmp_path / "bin", tmp_path / "started"
    home.mkdir()
    for name in ("gs", "gsc", "gswin64c"):
        stub = home / name
        stub.write_text(f'#!/bin/sh\necho "$0 $@" >> {log}\necho 10.0\nexit 0\n')
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.finding(4)
def test_eps_starts_no_ghostscript(ghostscript: Path, deepgen: Path, tmp_path: Path) -> None:
    cat = tmp_path / "cat.png"
    cat.write_bytes(EPS)
    images = [{"path": str(cat), "width": 8, "height": 8, "pixels_sha256": "0" * 64}]
    record = record_of((f"{MODEL}.path", str(deepgen)), ("request.image", images))
    image = image_with(record, tmp_path / "image.png")
    row = {"prompt": "x", "image": str(cat)}
    (tmp_path / "prompts").write_text(json.dumps(row))
    for command in (
        ("edit", cat, "x", "-m", deepgen, "--dry-run"),
        ("edit", NIGHT, "x", "--image", cat, "-m", deepgen, "--dry-run"),
        ("generate", "-m", deepgen, "--prompts-file", tmp_path / "prompts", "--dry-run"),
        ("generate", "--from", image),
        ("generate", "--from", image, "--trust"),
        ("generate", "--from", cat),
        ("show", cat),
    ):
        # in a process of its own: Pillow remembers whether there is a Ghostscript
        done = run_danqing(*command, cwd=tmp_path)
        assert done.returncode in (REQUEST, OUTPUT), (command, done.stderr)
        assert "bug" not in done.stderr
    assert not ghostscript.exists(), ghostscript.read_text()


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (40, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.finding(4)
@pytest.mark.parametrize(
    "kind", ["EPS", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI", "PDF", "AVIF", "IM"]
)
def test_other_formats_are_refused(kind: str, tmp_path: Path) -> None:
    try:
        data = saved(kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    with pytest.raises(RequestError) as error:
        read_references(write(tmp_path / "image.png", data))
    assert "PNG, JPEG, WEBP, TIFF, BMP, GIF" in str(error.value)
    with pytest.raises(OutputError):
        pictures.read_record(tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_named_formats_are_read(kind: str, tmp_path: Path) -> None:
    [reference] = read_references(write(tmp_path / "image", saved(kind)))
    assert (reference.width, reference.height) == (40, 30)


@pytest.mark.finding(4)
def test_a_benchmarks_row_with_eps_inside(ghostscript: Path, tmp_path: Path) -> None:
    from danqing.evalsets.rows import picture_of

    for data in (EPS, b"", b"\x89PNG\r\n\x1a\n", saved("PPM")):
        with pytest.raises(RequestError):
            picture_of({"bytes": data}, tmp_path)
    assert not ghostscript.exists()


# --- files that are none -------------------------------------------------------------------------


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.finding(12)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("trust", [False, True])
def test_a_pipe_blocks_nobody(trust: bool, deepgen: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    images = [{"path": str(pipe), "width": 8, "height": 8, "pixels_sha256": "0" * 64}]
    record = record_of((f"{MODEL}.path", str(deepgen)), ("request.image", images))
    image = image_with(record, tmp_path / "image.png")
    model = image_with(record_of((f"{MODEL}.path", str(pipe))), tmp_path / "model.png")
    more = ("--trust",) if trust else ()
    commands: list[tuple[object, ...]] = [
        ("generate", "--from", image, *more),
        ("generate", "--from", model, "--dry-run", *more),
    ]
    if trust:
        commands += [
            ("show", pipe),
            ("generate", "--from", pipe),
            ("edit", pipe, "x", "-m", deepgen),
            ("verify", "traces", pipe, pipe),
            ("report", "--views", pipe),
            ("eval-set", "gedit", "--prompts", pipe, "--out", tmp_path / "out", "-m", deepgen),
        ]
    for command in commands:
        code, _, text = invoke(*command)
        assert code in (REQUEST, WEIGHTS, OUTPUT, 10) or model in command, text


# --- bombs and nonsense --------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2, pixels: bytes = b""
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = b"".join(chunks)
    data = chunk(b"IDAT", pixels or zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + data + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    data = bytearray(saved("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(saved("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def scans(number: int) -> bytes:
    """Return a progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000), 100).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def tiff(*tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    """Return a TIFF of one directory with these tags: number, type, count, value."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    rows = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (
            struct.pack(f"{order}HH", value, 0)
            if kind == 3 and count == 1
            else struct.pack(f"{order}I", value)
        )
        for tag, kind, count, value in sorted(tags)
    )
    return head + struct.pack(f"{order}IH", 8, len(tags)) + rows + b"\0" * 4 + b"\0" * 200


PLAIN_TIFF = (
    (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
    (273, 4, 1, 200), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64),
)  # fmt: skip


def tiff_with(*tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    kept = {tag[0]: tag for tag in (*PLAIN_TIFF, *tags)}
    return tiff(*kept.values(), order=order)


def text_chunk(text: bytes, kind: bytes = b"iTXt", packed: bool = False) -> bytes:
    if kind == b"tEXt":
        return chunk(kind, b"danqing\0" + text)
    if kind == b"zTXt":
        return chunk(kind, b"danqing\0\0" + zlib.compress(text))
    body = zlib.compress(text) if packed else text
    return chunk(kind, b"danqing\0" + bytes([packed, 0]) + b"\0\0" + body)


ZEROS = b" " * 100_000_000
PLAIN_PIXELS = zlib.compress(b"\0" * (3 * 8 + 1) * 8)

BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of huge sides": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG of 60,000 x 60,000": lambda: png(60_000, 60_000),
    "PNG of no width": lambda: png(0, 10),
    "PNG of no height": lambda: png(10, 0),
    "PNG of 99 million pixels of zeros": lambda: png(
        9999, 9900, color=6, pixels=zlib.compress(b"\0" * (9999 * 4 + 1) * 1000)
    ),
    "PNG without pixels": lambda: png(8, 8)[:33],
    "PNG of nothing": lambda: b"\x89PNG\r\n\x1a\n",
    "PNG with two headers": lambda: png(8, 8, png(60_000, 60_000)[8:33]),
    "PNG with a chunk of 2 GB": lambda: png(8, 8, chunk(b"iTXt", b"danqing\0", 2**31 - 1)),
    "PNG with a million chunks": lambda: png(8, 8, chunk(b"prVt", b"") * 1_000_000),
    "record of 100 MB": lambda: png(8, 8, text_chunk(ZEROS), pixels=PLAIN_PIXELS),
    "record of 100 MB, packed": lambda: png(8, 8, text_chunk(ZEROS, packed=True)),
    "record of 100 MB, zTXt": lambda: png(8, 8, text_chunk(ZEROS, b"zTXt")),
    "record that unpacks to nothing": lambda: png(8, 8, chunk(b"iTXt", b"danqing\0\1\0\0\0xx")),
    "record in a cut iTXt": lambda: png(8, 8, chunk(b"iTXt", b"danqing\0\1")),
    "record nested deep": lambda: png(8, 8, text_chunk(b"[" * 500_000)),
    "record nested a little too deep": lambda: png(8, 8, text_chunk(b'{"a":' * 90 + b"1" + b"}" * 90)),
    "record of infinity": lambda: png(8, 8, text_chunk(b'{"request": {"seed": 1e999}}')),
    "record of NaN": lambda: png(8, 8, text_chunk(b'{"schema": NaN}')),
    "record of a long number": lambda: png(8, 8, text_chunk(b'{"schema": ' + b"9" * 100_000 + b"}")),
    "record that is a list": lambda: png(8, 8, text_chunk(b"[1, 2]")),
    "record of no text": lambda: png(8, 8, text_chunk(b"\xff\xfe\x80")),
    "profile of 100 MB": lambda: png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(ZEROS))),
    "GIF of huge sides": lambda: gif(65_535, 65_535),
    "GIF of no sides": lambda: gif(0, 0),
    "GIF of a million frames": lambda: gif(40, 30)[:-1] + gif(40, 30)[-30:-1] * 1_000_000 + b";",
    "BMP of huge sides": lambda: bmp(2**31 - 1, 2**31 - 1),
    "BMP of negative sides": lambda: bmp(-5, -(2**31)),
    "JPEG of huge sides": lambda: jpeg(65_535, 65_535),
    "JPEG of no sides": lambda: jpeg(0, 0),
    "JPEG of 3,000 scans": lambda: scans(3000),
    "JPEG cut short": lambda: saved("JPEG")[:300],
    "WebP cut short": lambda: saved("WEBP")[:30],
    "WebP of huge sides": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f\0\0\0\0\0\0\0\0",
    "TIFF of huge sides": lambda: tiff_with((256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1)),
    "TIFF of huge sides, big-endian": lambda: tiff_with((256, 4, 1, 2**31), order=">"),
    "TIFF with huge tables": lambda: tiff_with((273, 4, 20_000_000, 8)) + b"\1" * 90_000_000,
    "TIFF with huge tiles": lambda: tiff_with((322, 4, 1, 2**30), (323, 4, 1, 2**30), (324, 4, 1, 8)),
    "TIFF with many tags": lambda: tiff(*((n, 3, 1, 1) for n in range(60_000))),
    "TIFF that refers to itself": lambda: tiff_with()[:-204] + struct.pack("<I", 8) + b"\0" * 200,
    "TIFF with a directory nowhere": lambda: b"II*\0\xff\xff\xff\x7f",
    "TIFF of an unknown compression": lambda: tiff_with((259, 3, 1, 34_712)),
    "BigTIFF of nothing": lambda: b"II+\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "text": lambda: b"hello",
    "nothing": lambda: b"",
}  # fmt: skip


WATCHED = """
import re, sys, time
from pathlib import Path
from danqing.errors import OutputError, RequestError
from danqing.pictures import read_record
from danqing.references import read_references
for place in sys.argv[1:]:
    for read in (read_record, read_references):
        start = time.monotonic()
        try:
            read(place)
        except (OutputError, RequestError) as error:
            str(error)
        seconds = time.monotonic() - start
        peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
        print(f"{seconds:.2f} {peak} {read.__name__} {Path(place).name}")
"""


@pytest.mark.finding(11)
def test_bombs_and_nonsense(tmp_path: Path) -> None:
    """Each is read, or a documented error, in 10 s and 1 GiB; without a decoder for `show`."""
    import subprocess
    import sys

    places = [write(tmp_path / name, make()) for name, make in BOMBS.items()]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, places)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(BOMBS)
    for line in lines:
        seconds, peak, _ = line.split(" ", 2)
        assert float(seconds) < SECONDS, line
        assert int(peak) * 1024 < BYTES, line


@pytest.mark.finding(11)
@pytest.mark.parametrize("case", ["PNG of 60,000 x 60,000", "GIF of huge sides"])
def test_huge_sides_are_no_bug(case: str, tmp_path: Path) -> None:
    image = write(tmp_path / "image.png", BOMBS[case]())
    for command in (("show", image), ("show", image, "--json"), ("generate", "--from", image)):
        code, _, text = invoke(*command)
        assert code == OUTPUT, text


# --- records -------------------------------------------------------------------------------------

NONSENSE: tuple[object, ...] = (
    None, True, -1, 0, 10**30, 1.5, 1e300, "", "x", "\0", "~nobody/x", "\ud800", "a" * 100_000,
    [], [[]], [None], {}, {"a": 1}, {"path": "x"},
)  # fmt: skip
USED = (
    "schema", "request", "request.prompt", "request.seed", "request.height", "request.image",
    "request.num_images_per_prompt", "request.guidance_scale", "picture", "picture.pixels_sha256",
    "provenance", MODEL, f"{MODEL}.path", f"{MODEL}.fingerprint", f"{MODEL}.components",
    f"{MODEL}.layout", "provenance.device", "provenance.device.name", "provenance.device.threads",
    "provenance.device.tile", "provenance.device.fused", "provenance.device.deterministic",
    "provenance.device.compiled", "provenance.device.quantised", "provenance.dtype",
    "provenance.attention", "provenance.batch", "provenance.batch.size",
    "provenance.batch.position",
)  # fmt: skip


@pytest.mark.parametrize("field", USED)
def test_a_field_of_another_type_is_no_bug(field: str, tmp_path: Path) -> None:
    for value in NONSENSE:
        record = changed(record_of(*ELSEWHERE), tuple(field.split(".")), value)
        data = png(8, 8, text_chunk(json.dumps(record).encode()))
        image = write(tmp_path / "image.png", data)
        for more in ((), ("--trust",)):
            code, _, text = invoke("generate", "--from", image, "--dtype", "float32", *more)
            assert code in (REQUEST, WEIGHTS, 4, OUTPUT), (value, text)


@pytest.mark.finding(11)
def test_an_infinite_batch_is_no_bug(tmp_path: Path) -> None:
    text = json.dumps(record_of(("provenance.batch.size", 12345))).replace("12345", "1e999")
    image = write(tmp_path / "image.png", png(8, 8, text_chunk(text.encode())))
    assert invoke("generate", "--from", image)[0] == OUTPUT
    assert invoke("show", image)[0] == OUTPUT


@pytest.mark.finding(11)
def test_a_setting_named_self_is_no_bug(tmp_path: Path) -> None:
    image = image_with(record_of(("request.self", 1)), tmp_path / "image.png")
    assert invoke("generate", "--from", image)[0] == REQUEST
    write(tmp_path / "prompts", b'{"prompt": "x", "self": 1}\n')
    assert invoke("generate", "--prompts-file", tmp_path / "prompts")[0] == REQUEST
    write(tmp_path / "prompts", b'{"prompt": "x", "output_image": "a\\u0000.png"}\n')
    assert invoke("generate", "--prompts-file", tmp_path / "prompts")[0] == REQUEST


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are opened, and of those whose state is asked."""
    import sys

    names: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            names.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    yield names
    watching = False


TRAP = {"path": "TRAP", "width": 8, "height": 8, "pixels_sha256": "0" * 64}
NAMING: dict[str, tuple[str, object, str]] = {
    "model": (f"{MODEL}.path", "TRAP", "-m PATH"),
    "component": (f"{MODEL}.components", {"vae": "TRAP"}, "--component NAME=PATH"),
    "image": ("request.image", [TRAP], "--image FILE"),
}


@pytest.mark.finding(13)
@pytest.mark.parametrize("case", NAMING)
def test_a_file_that_only_the_record_names_is_not_opened(
    case: str, tmp_path: Path, opened: list[str]
) -> None:
    field, value, flag = NAMING[case]
    trap = write(tmp_path / "secret", b"\0" * 100)
    value = json.loads(json.dumps(value).replace("TRAP", str(trap)))
    record = record_of((f"{MODEL}.fingerprint", "0" * 64), (f"{MODEL}.path", "/nowhere"))
    image = image_with(changed(record, tuple(field.split(".")), value), tmp_path / "image.png")
    opened.clear()
    code, _, text = invoke("generate", "--from", image)
    assert code == REQUEST
    assert str(trap) in text
    assert flag in text
    assert "--trust" in text
    assert str(trap) not in opened
    code, _, text = invoke("generate", "--from", image, "--trust")
    assert code in (REQUEST, WEIGHTS)
    assert f"taken from the record: {'' if case == 'model' else 'model /nowhere, '}" in text
    assert str(trap) in opened or case != "model"


@pytest.mark.finding(13)
def test_options_are_not_taken_without_trust(tmp_path: Path) -> None:
    record = record_of(
        ("provenance.device.name", "npu:3"), ("provenance.dtype", "float32"),
        ("provenance.device.tile", 64), ("provenance.device.compiled", "inductor"),
        ("provenance.device.deterministic", True), ("provenance.device.threads", 7),
    )  # fmt: skip
    image = image_with(record, tmp_path / "image.png")
    code, out, text = invoke("generate", "--from", image, "--json", "-o", "again.png")
    assert code == 0, text
    listed = next(line for line in text.splitlines() if "not taken from the record" in line)
    for option in ("device=npu:3", "dtype=float32", "tile=64", "compile=inductor", "deterministic"):
        assert option in listed
    assert "--trust" in listed
    assert "made with 7 threads" in text
    made = json.loads(out)
    assert made["provenance"]["device"]["tile"] in (0, None)
    assert made["request"]["prompt"] == RECORD["request"]["prompt"]
    assert made["request"]["seed"] == RECORD["request"]["seed"]


@pytest.mark.finding(13)
def test_a_model_is_found_by_name_and_fingerprint(schnell: Path, tmp_path: Path) -> None:
    """As in the README: `-m models/NAME`, and then `--from` alone, in another folder too."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "FLUX.1-schnell").symlink_to(schnell)
    arguments = ("--size", "64x64", "--device", "cpu", "-o", "boat.png", "-q")
    assert invoke("generate", "a boat", "-m", "models/FLUX.1-schnell", *arguments)[0] == 0
    code, out, text = invoke("generate", "--from", "boat.png", "-o", "again.png", "--json")
    assert (code, json.loads(out)["identical"]) == (0, True), text
    # the path in the record is not followed: the model is looked up again
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    code, _, text = invoke("generate", "--from", "boat.png")
    assert (code, "-m PATH" in text) == (REQUEST, True)
    os.environ["DANQING_MODELS"] = str(tmp_path / "elsewhere")
    code, out, text = invoke("generate", "--from", "boat.png", "-o", "third.png", "--json")
    assert (code, json.loads(out)["identical"]) == (0, True), text


@pytest.mark.finding(13)
def test_values_on_the_command_line_need_no_trust(schnell: Path, tmp_path: Path) -> None:
    record = record_of(*ELSEWHERE, (f"{MODEL}.components", {"vae": "/etc/shadow"}))
    image = image_with(record, tmp_path / "image.png")
    code, _, text = invoke("generate", "--from", image, "-m", schnell, "--dry-run")
    assert code == 0, text
    assert "not opened" in text
    assert "vae=/etc/shadow" in text
    # other weights than those that made the image are still told
    assert invoke("generate", "--from", image, "-m", schnell)[0] == WEIGHTS


def test_trust_alone_has_no_effect() -> None:
    code, _, text = invoke("generate", "x", "--trust")
    assert (code, "no effect without --from" in text) == (REQUEST, True)


def test_an_image_of_the_gallery_needs_no_trust(tmp_path: Path) -> None:
    code, _, text = invoke("generate", "--from", NIGHT, "-o", tmp_path / "night.png", "-q")
    assert code == 0, text


# --- mutations -----------------------------------------------------------------------------------


def mutated(data: bytes, random: random.Random) -> bytes:
    """Change a few bytes, cut, repeat, or put in numbers that are often at fault."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 6)):
        place = random.randrange(len(changed) + 1)
        kind = random.randrange(5)
        if kind == 0 and changed:
            changed[place % len(changed)] = random.randrange(256)
        elif kind == 1:
            del changed[place : place + random.randrange(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + random.randrange(1, 40)]
        elif kind == 3:
            number = random.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 65_535))
            changed[place : place + 4] = struct.pack(random.choice(("<I", ">I")), number)
        else:
            changed[place:] = b"" if random.random() < 0.3 else changed[place:]
    return bytes(changed)


def seeds() -> list[bytes]:
    text = json.dumps(RECORD).encode()
    images = [saved(kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")]
    images += [saved("TIFF", compression="tiff_lzw"), saved("TIFF", "RGBA"), saved("PNG", "P")]
    images += [saved("JPEG", progressive=True), saved("PNG", "I;16"), saved("JPEG", "CMYK")]
    images += [
        pictures.encode(Image.new("RGB", (8, 8)), RECORD, kind) for kind in ("PNG", "JPEG", "WEBP")
    ]
    return [*images, png(8, 8, text_chunk(text, packed=True)), png(8, 8, text_chunk(text, b"zTXt"))]


def attack(data: bytes, place: Path) -> int:
    """Read an image as everything that may read it; return how many read it as sound."""
    from danqing.cli.records import read_recorded

    place.write_bytes(data)
    sound = 0
    for read in (read_references, pictures.read_record, read_recorded):
        start = time.monotonic()
        try:
            read(str(place))
            sound += 1
        except (OutputError, RequestError) as error:
            str(error)
        assert time.monotonic() - start < SECONDS, data[:100]
    return sound


def mutated_record(random: random.Random, fields: list[tuple[Any, ...]]) -> bytes:
    """Return an image whose record has other values, in text that may be damaged too."""
    record = RECORD
    for _ in range(random.randint(1, 3)):
        field = random.choice(fields)
        value = random.choice((*NONSENSE, "1e999", HUGE, [[[[]]]]))
        field = field[: random.randint(1, len(field))]
        try:
            record = changed(record, field, value)
        except (TypeError, KeyError, IndexError):
            continue
    text = json.dumps(record).replace('"1e999"', "1e999").encode()
    return png(8, 8, text_chunk(mutated(text, random) if random.random() < 0.3 else text))


HUGE = {str(number): [number] for number in range(1000)}


@pytest.mark.parametrize(
    "cases", [100, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_mutations_are_documented_errors(cases: int, tmp_path: Path) -> None:
    from tests.cli.test_terminal import FIELDS

    chance = random.Random(19)
    begun = seeds()
    for number in range(cases):
        if number % 3 == 0:
            data = mutated_record(chance, FIELDS)
        else:
            data = mutated(begun[number % len(begun)], chance)
        attack(data, tmp_path / "image")
        if number % 25 == 0:
            for command in (
                ("show", tmp_path / "image"),
                ("generate", "--from", tmp_path / "image", "--size", "0x0"),
            ):
                code, _, text = invoke(*command)
                assert code in (0, REQUEST, OUTPUT), text


def test_a_copied_record_is_not_believed(schnell: Path, tmp_path: Path) -> None:
    """Another folder of the same name has another fingerprint, and is not taken for the model."""
    (tmp_path / "models").mkdir()
    shutil.copytree(schnell, tmp_path / "models" / "shadow")
    record = record_of((f"{MODEL}.path", "/etc/shadow"), (f"{MODEL}.fingerprint", "0" * 64))
    image = image_with(record, tmp_path / "image.png")
    assert invoke("generate", "--from", image)[0] == REQUEST
