"""The targets: one for each parser and each body, at its public entry point."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import struct
import uuid
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzz.engine import HERE, FindingError, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ANSWER_SECONDS = 8.0
SERVER_ERROR = 500
_CONFIGS = (
    "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    "text_encoder_2/config.json", "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json",
)  # fmt: skip
_VOCABULARIES = (
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model",
    "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
)  # fmt: skip
_ROWS = (".jsonl", ".json", ".csv", ".txt", ".parquet")


# --- weights -------------------------------------------------------------------------------------


def safetensors(data: bytes, folder: Path) -> None:
    """Read the header of a safetensors file, and its tensors."""
    from danqing.weights.safetensors_file import SafetensorsFile

    _read_tensors(SafetensorsFile(_file(folder, "a.safetensors", data)))


def gguf(data: bytes, folder: Path) -> None:
    """Read the header of a GGUF file, and its tensors."""
    from danqing.weights.gguf_file import GgufFile

    _read_tensors(GgufFile(_file(folder, "a.gguf", data)))


def pickle(data: bytes, folder: Path) -> None:
    """Read the one pickle that may be opened."""
    from danqing.models import open_checkpoint

    open_checkpoint(_file(folder, "model.pt", data), allow_pt=True)


def _read_tensors(file: Any) -> None:
    try:
        for entry in list(file.entries.values())[:10]:
            if entry.size_bytes < 1 << 20:
                file.read(entry)
    finally:
        file.close()


def index(data: bytes, folder: Path) -> None:
    """Read the index of a sharded network."""
    from danqing.models import open_checkpoint

    copy = _pocket_with(folder, {"transformer/diffusion_pytorch_model.safetensors": None})
    _file(copy, "transformer/diffusion_pytorch_model.safetensors.index.json", data)
    checkpoint = open_checkpoint(copy)
    for part in checkpoint.components.values():
        _ = part.entries


def configs(data: bytes, folder: Path) -> None:
    """Check a checkpoint one of whose configs is the input."""
    _check(_pocket_with(folder, {_CONFIGS[_choice(data, _CONFIGS)]: data[1:]}))


def tokenizers(data: bytes, folder: Path) -> None:
    """Check a checkpoint one of whose vocabularies is the input."""
    _check(_pocket_with(folder, {_VOCABULARIES[_choice(data, _VOCABULARIES)]: data[1:]}))


def _check(folder: Path) -> None:
    from danqing.models import open_checkpoint
    from danqing.models.preflight import preflight

    checkpoint = open_checkpoint(folder)
    preflight(checkpoint)
    checkpoint.close()


def _pocket_with(folder: Path, changes: Mapping[str, bytes | None]) -> Path:
    """Return a copy of the pocket model, by links, with some files replaced or left out."""
    import shutil

    from danqing.weights import POCKET
    from danqing.weights.places import find

    source, copy = find(POCKET), folder / "model"
    shutil.rmtree(copy, ignore_errors=True)
    for path in source.rglob("*"):
        name = str(path.relative_to(source))
        if path.is_file() and name not in changes:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to(path)
    for name, data in changes.items():
        if data is not None:
            _file(copy, name, data)
    return copy


# --- images, traces, reports, rows ---------------------------------------------------------------


def images(data: bytes, folder: Path) -> None:
    """Read an image to edit."""
    from danqing.references import read_references

    read_references([str(_file(folder, "a.png", data))])


def images_sent(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Read an image that a client sent."""
    from danqing.serve.sent_images import read_image

    read_image(data, "image")


def records(data: bytes, folder: Path) -> None:
    """Read the record of an image, and the request in it."""
    from danqing.pictures import read_record
    from danqing.request import request_from_record

    place = _file(folder, "a.png", _png_with(data))
    request_from_record(read_record(place))


def record_files(data: bytes, folder: Path) -> None:
    """Read the record of a file that may be no image."""
    from danqing.pictures import read_record

    read_record(_file(folder, "a.png", data))


def traces(data: bytes, folder: Path) -> None:
    """Open a trace and read its tensors."""
    from danqing.verify.trace import read_trace

    trace = read_trace(_file(folder, "a.trace", data))
    for name in list(trace.joints)[:10]:
        trace.read(name)


def reports(data: bytes, folder: Path) -> None:
    """Read a report, and write its pages."""
    from danqing.report.document import read_report
    from danqing.report.views import markdown, page

    for name in ("text-to-image", "text-to-image-reference", "text-to-image-difference"):
        _file(folder, f"{name}.png", _png_with(b"{}"))
    report = read_report(_file(folder, "report.json", data))
    markdown(report, "en")
    page(report, folder)


def rows(data: bytes, folder: Path) -> None:
    """Read the rows of an evaluation set."""
    from danqing.evalsets.rows import read_rows

    read_rows(_file(folder, f"rows{_ROWS[_choice(data, _ROWS)]}", data[1:]))


def prompts(data: bytes, folder: Path) -> None:
    """Read a file of prompts, and make requests of its lines."""
    from danqing.cli.prompts import read_prompts
    from danqing.request import Request

    for _, settings in read_prompts(str(_file(folder, "prompts", data))):
        Request(**{str(key): value for key, value in settings.items() if key != "image"})


def words(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Read sizes, amounts of memory and names of outputs as they are typed or sent."""
    from danqing.cli.options import read_pairs
    from danqing.cli.prompts import read_size
    from danqing.escaping import escape
    from danqing.options import Options
    from danqing.pictures import fill_template
    from danqing.serve import bodies

    text = data.decode("utf-8", "surrogateescape")
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_size(text, {}),
        lambda: bodies.read_size(text, 4096),
        lambda: Options(memory=text),
        lambda: read_pairs([text], "--component", "NAME=PATH"),
        lambda: fill_template(text, seed=1, index=0, model="x"),
    )
    for read in readers:
        _documented(read)
    if any((ord(c) < 32 and c not in "\n\t") or 126 < ord(c) < 160 for c in escape(text)):
        raise FindingError("a control character was not escaped")


def _documented(read: Callable[[], object]) -> None:
    from danqing.errors import DanqingError

    try:
        read()
    except DanqingError as error:
        str(error)


# --- the server ----------------------------------------------------------------------------------


def journal(data: bytes, folder: Path) -> None:
    """Start a service whose journal has a row of foreign making."""
    from danqing.serve.journal import Journal
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_service

    place = folder / "journal.db"
    for path in folder.glob("journal.db*"):
        path.unlink()
    Journal(place).close()
    row = json.loads(data)
    base = sqlite3.connect(place)
    try:
        names = ("id", "client", "idempotency", "digest", "asked", "accepted", "state", "error")
        values = [row.get(name) for name in names]
        marks = ", ".join("?" * len(names))
        base.execute(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})", values)  # noqa: S608
        base.commit()
    except (sqlite3.Error, OverflowError, ValueError, AttributeError):
        return  # the database itself refuses it
    finally:
        base.close()
    kept = Journal(place)
    make_service(FakeRunner(), journal=kept).close()


def generations(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Send a JSON body."""
    _send("POST", "/v1/images/generations", {"content-type": "application/json"}, data)


def edits(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Send a multipart body."""
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    _send("POST", "/v1/images/edits", {"content-type": kind}, data)


def headers(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Send headers: Host, Origin, Prefer, Idempotency-Key, Authorization."""
    rows = [line.partition(b":") for line in data.split(b"\n")[:100]]
    given = [(name.strip().lower(), value.strip()) for name, _, value in rows]
    _send("POST", "/v1/images/generations", given, b'{"prompt": "a cat", "n": 1}')


def paths(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """Ask for a path of any form."""
    text = data.decode("utf-8", "surrogateescape")
    method, _, path = text.partition(" ")
    _send(method if method in ("GET", "DELETE", "POST") else "GET", path or "/", {}, b"")


_BOUNDARY = "danqing-boundary"


@lru_cache
def _application() -> tuple[Any, asyncio.AbstractEventLoop]:
    import logging

    from danqing.serve.app import make_app
    from danqing.serve.guards import Guard, Rules
    from danqing.serve.metrics import Metrics
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_service

    logging.disable(logging.CRITICAL)
    metrics = Metrics()
    app = make_app(make_service(FakeRunner()), metrics)
    hosts = frozenset({"localhost", "127.0.0.1"})
    return Guard(app, Rules(hosts=hosts), metrics.answered), asyncio.new_event_loop()


def _send(
    method: str, path: str, given: Mapping[str, str] | list[tuple[bytes, bytes]], body: bytes
) -> None:
    """Send one request to the application as an ASGI server does."""
    if isinstance(given, list):
        rows = given
    else:
        rows = [(name.encode(), value.encode()) for name, value in given.items()]
    if not any(name == b"host" for name, _ in rows):
        rows.append((b"host", b"localhost"))
    rows.append((b"content-length", str(len(body)).encode()))
    raw = path.encode("utf-8", "surrogateescape")
    clean = raw.decode("utf-8", "replace")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": clean.partition("?")[0], "raw_path": raw, "root_path": "",
        "query_string": raw.partition(b"?")[2], "headers": rows,
        "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    app, loop = _application()
    status = loop.run_until_complete(asyncio.wait_for(_talk(app, scope, body), ANSWER_SECONDS))
    if status is None or status >= SERVER_ERROR:
        raise FindingError(f"answered with {status}")


async def _talk(app: Any, scope: dict[str, Any], body: bytes) -> int | None:
    status: list[int] = []
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.sleep(ANSWER_SECONDS)
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if message["type"] == "http.response.start":
            status.append(message["status"])

    await app(scope, receive, send)
    return status[0] if status else None


# --- inputs to start with ------------------------------------------------------------------------


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _choice(data: bytes, choices: tuple[str, ...]) -> int:
    return (data[0] if data else 0) % len(choices)


def _png_with(record: bytes) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("danqing", record.decode("utf-8", "replace"))
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _images() -> Iterator[bytes]:
    from PIL import Image

    for mode, form in (
        ("RGB", "PNG"), ("RGBA", "WEBP"), ("L", "JPEG"), ("P", "GIF"), ("1", "TIFF"),
        ("I;16", "PNG"), ("CMYK", "JPEG"), ("RGB", "BMP"),
    ):  # fmt: skip
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, form)
        yield buffer.getvalue()
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\nshowpage\n"
    yield b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="7"/>'


def _seeds() -> Iterator[tuple[str, bytes]]:
    yield from _weight_seeds()
    yield from _model_seeds()
    yield from _trace_and_report()
    for data in _images():
        yield from ((name, data) for name in ("images", "images_sent", "record_files"))
    yield "record_files", _png_with(b'{"schema": 1}')
    request = {"prompt": "a cat", "seed": 1, "height": 64, "width": 64, "num_inference_steps": 4}
    yield "records", json.dumps({"schema": 1, "request": request, "provenance": {}}).encode()
    yield "rows", b'\0{"prompt": "a cat", "include": []}\n{"prompt": "a dog"}\n'
    yield "rows", b'\1{"0": {"prompt": "a cat", "id": "x"}, "1": {"prompt": "b", "id": "y"}}'
    yield "rows", b"\2prompt,key\na cat,1\n"
    yield "rows", b"\3a cat\n"
    yield "prompts", b'a cat\n{"prompt": "a dog", "seed": 1, "size": "64x64"}\n'
    for text in ("768x512", "8GiB", "12000 MB", "t5=/a", "{model}-{seed}.png", "~/x.png", "auto"):
        yield "words", text.encode()
    asked = {"model": "fake", "request": {"prompt": "x", "height": 64, "width": 64, "seed": 1}}
    row = {
        "id": "e", "client": "local", "idempotency": "", "digest": "", "accepted": 1.0,
        "state": "accepted", "asked": json.dumps(asked), "error": None,
    }  # fmt: skip
    yield "journal", json.dumps(row).encode()
    body = {"prompt": "a cat", "n": 1, "size": "64x64", "model": "fake", "seed": 3}
    yield "generations", json.dumps(body).encode()
    more = {
        "response_format": "b64_json",
        "output_format": "png",
        "quality": "auto",
        "stream": True,
    }
    yield "generations", json.dumps({**body, **more}).encode()
    yield "edits", _multipart({"prompt": b"a cat", "size": b"64x64"}, next(_images()))
    lines = ("host: localhost", "origin: http://localhost:8000", "prefer: respond-async, wait=1",
             "idempotency-key: abc", "authorization: Bearer x", "content-type: application/json",
             "accept: text/event-stream", "x-request-id: 1")  # fmt: skip
    yield "headers", "\n".join(lines).encode()
    for path in ("/v1/jobs/x", "/v1/jobs/x/pictures/0", "/v1/models/fake", "/healthz", "/metrics"):
        yield "paths", f"GET {path}".encode()
    yield "paths", b"DELETE /v1/jobs/x?y=1"


def _trace_and_report() -> Iterator[tuple[str, bytes]]:
    import tempfile

    import numpy as np

    from danqing.arrays import Array
    from danqing.verify.trace import Recorder

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "a.trace"
        with Recorder(place) as recorder:
            recorder("draw/noise", Array("float32", np.zeros((2, 3), np.uint32)))
            recorder("decode/pixels", Array("bfloat16", np.zeros(4, np.uint16)))
            recorder.finish({"request": {"prompt": "x"}, "provenance": {}, "stages": []})
        yield "traces", place.read_bytes()
    report = HERE.parent / "docs" / "reports" / "cpu-bfloat16" / "report.json"
    yield "reports", report.read_bytes()


def _weight_seeds() -> Iterator[tuple[str, bytes]]:
    table = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(table).encode()
    yield "safetensors", struct.pack("<Q", len(text)) + text + bytes(32)
    key, value = b"general.architecture", b"flux"
    string = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    tensor = struct.pack("<Q", 8) + b"a.weight" + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + string + tensor
    yield "gguf", head + bytes(-len(head) % 32) + bytes(128)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # as torch.save writes an empty table
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", b"3\n")
    yield "pickle", buffer.getvalue()
    yield "pickle", b"\x80\x04}\x94."
    name = "diffusion_pytorch_model-00001-of-00001.safetensors"
    yield "index", json.dumps({"metadata": {}, "weight_map": {"x.weight": name}}).encode()


def _model_seeds() -> Iterator[tuple[str, bytes]]:
    from danqing.weights import POCKET
    from danqing.weights.places import find

    pocket = find(POCKET)
    for number, name in enumerate(_CONFIGS):
        yield "configs", bytes([number]) + (pocket / name).read_bytes()
    for number, name in enumerate(_VOCABULARIES):
        if (path := pocket / name).is_file() and path.stat().st_size < 1 << 15:
            yield "tokenizers", bytes([number]) + path.read_bytes()
    fast = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    splitter = {
        "type": "Split",
        "pattern": {"Regex": "a+"},
        "behavior": "Isolated",
        "invert": False,
    }
    yield "tokenizers", b"\3" + json.dumps({**fast, "pre_tokenizer": splitter}).encode()
    yield "tokenizers", b"\5" + b'{"pad_token": "</s>", "unk_token": {"content": "<unk>"}}'


def _multipart(fields: Mapping[str, bytes], image: bytes) -> bytes:
    lines = []
    for name, value in fields.items():
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        lines.append(head.encode() + value + b"\r\n")
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    return b"".join([*lines, head.encode(), image, f"\r\n--{_BOUNDARY}--\r\n".encode()])


def write_corpus() -> None:
    """Write the inputs to start with; inputs of faults found stay."""
    for name, data in _seeds():
        place = HERE / "corpus" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"seed-{uuid.uuid5(uuid.NAMESPACE_OID, data.hex()).hex[:8]}").write_bytes(data)


TARGETS = {
    target.name: target
    for target in (
        Target(name="safetensors", run=safetensors, kind="header"),
        Target(name="gguf", run=gguf),
        Target(name="pickle", run=pickle),
        Target(name="index", run=index, kind="json"),
        Target(name="configs", run=configs, kind="prefixed"),
        Target(name="tokenizers", run=tokenizers, kind="prefixed"),
        Target(name="images", run=images),
        Target(name="images_sent", run=images_sent),
        Target(name="records", run=records, kind="json"),
        Target(name="record_files", run=record_files),
        Target(name="traces", run=traces, kind="header"),
        Target(name="reports", run=reports, kind="json"),
        Target(name="rows", run=rows, kind="prefixed"),
        Target(name="prompts", run=prompts),
        Target(name="words", run=words),
        Target(name="journal", run=journal, warm=False, kind="json", allowed=(ValueError,)),
        Target(name="generations", run=generations, warm=False, kind="json"),
        Target(name="edits", run=edits, warm=False),
        Target(name="headers", run=headers, warm=False),
        Target(name="paths", run=paths, warm=False),
    )
}
