"""Clients that mean no good, or do not know better: only 4xx, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.conftest import Running

pytestmark = pytest.mark.enable_socket
EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
FEW, MANY = 300, 10_000


def png(width: int, height: int, *, body: bytes | None = None) -> bytes:
    """A PNG that says it is of this size; of zeros, packed a thousand times smaller."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = body or packer.compress(bytes(min(width * 3 * height, 60_000_000))) + packer.flush()
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = png(50_000, 50_000)


def plain() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes, str]]:
    """Yield path, body and content type of requests none of which is right."""
    dice = random.Random(seed)
    picture = plain()
    makers = [_broken_json, _wrong_types, _broken_multipart, _bad_picture]
    for _ in range(count):
        yield dice.choice(makers)(dice, picture)


def _broken_json(dice: random.Random, _: bytes) -> tuple[str, bytes, str]:
    text = bytearray(b'{"prompt": "a boat", "size": "64x64", "n": 1}')
    for _time in range(dice.randint(1, 6)):
        where = dice.randrange(len(text))
        if dice.random() < 0.5:
            del text[where]
        else:
            text[where] = dice.randrange(256)
    return GENERATIONS, b"[" + bytes(text), "application/json"


def _wrong_types(dice: random.Random, _: bytes) -> tuple[str, bytes, str]:
    import json

    junk: list[Any] = [
        None,
        True,
        -1,
        1e308,
        10**30,
        "",
        "x" * 9000,
        [],
        {},
        [[[]]],
        "\ud800",
        "\0",
    ]
    body: dict[str, Any] = {"prompt": "a boat", "size": "64x64"}
    body["prompt"] = dice.choice(junk)
    for name in dice.sample(["n", "size", "seed", "model", "stream", "output_format", "user"], 3):
        body[name] = dice.choice(junk)
    return GENERATIONS, json.dumps(body).encode(), "application/json"


def _broken_multipart(dice: random.Random, picture: bytes) -> tuple[str, bytes, str]:
    edge = "edge"
    part = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    whole = part.encode() + picture + f"\r\n--{edge}--\r\n".encode()
    cut = bytearray(whole[: dice.randrange(len(whole))])
    for _ in range(dice.randint(0, 8)):
        if cut:
            cut[dice.randrange(len(cut))] = dice.randrange(256)
    boundary = dice.choice([edge, "", "other", "e" * 300, '"'])
    return EDITS, bytes(cut), f"multipart/form-data; boundary={boundary}"


def _bad_picture(dice: random.Random, picture: bytes) -> tuple[str, bytes, str]:
    data = dice.choice(
        [
            picture[: dice.randrange(len(picture))],
            png(50_000, 50_000, body=b"x"),
            b"GIF89a" + picture,
            picture + b"PK\x03\x04" + bytes(50),
            b"%PDF-1.7\n" + picture,
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            b"%!PS\n(/etc/passwd) (r) file\n" + picture,
            b"\x00" * dice.randrange(5000),
            dice.randbytes(dice.randrange(5000)),
        ]
    )
    edge = "edge"
    name = dice.choice(["a.png", "../../etc/passwd", "http://169.254.169.254/", "\\\\x\\y", "a\0b"])
    head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
    text = f'--{edge}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nblue\r\n'
    body = text.encode() + head.encode() + b"Content-Type: image/png\r\n\r\n" + data
    return EDITS, body + f"\r\n--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"


async def fire(address: str, seed: int, count: int) -> dict[int, int]:
    """Send bodies, sixteen at a time; return how often each status came."""
    seen: dict[int, int] = {}
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:

        async def one(path: str, body: bytes, kind: str) -> None:
            async with gate:
                answer = await client.post(path, content=body, headers={"content-type": kind})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if not 400 <= answer.status_code < 500:
                print(path, kind, body[:300], answer.text[:300])

        await asyncio.gather(*(one(*row) for row in bodies(seed, count)))
    return seen


def memory(server: Running) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_fuzzed_bodies(count: int, deepgen_server: Running) -> None:
    asyncio.run(fire(deepgen_server.address, 1, 200))  # what is allocated once
    before = memory(deepgen_server)
    seen = asyncio.run(fire(deepgen_server.address, 2, count))
    assert sum(seen.values()) == count
    assert all(400 <= status < 500 for status in seen), seen
    assert memory(deepgen_server) - before < 150 << 20
    assert httpx.get(f"{deepgen_server.address}/readyz", timeout=30).status_code == 200


def test_bombs(deepgen_server: Running) -> None:
    before = memory(deepgen_server)
    for data in (BOMB, png(6000, 6000), png(65_000, 1000)):
        answer = httpx.post(
            deepgen_server.address + EDITS,
            data={"prompt": "x"}, files={"image": ("a.png", data, "image/png")}, timeout=60,
        )  # fmt: skip
        assert answer.status_code == 400
        assert "pixels" in answer.json()["error"]["message"] or "broken" in answer.text
    assert memory(deepgen_server) - before < 150 << 20


def test_addresses_and_files_of_the_server_are_not_opened(deepgen_server: Running) -> None:
    for value in ("/etc/passwd", "http://127.0.0.1:1/x.png", "file:///etc/passwd"):
        for send in (
            {"data": {"prompt": "x", "image": value}},
            {"data": {"prompt": "x", "image[]": value}},
        ):
            answer = httpx.post(
                deepgen_server.address + EDITS,
                files={"image": ("a.png", plain())},
                **send,  # type: ignore[arg-type]
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "image"


@pytest.mark.slow
def test_slow_clients_do_not_starve_others() -> None:
    """Two hundred that send a byte a second, in headers and bodies, and one that works."""
    with serving("--no-page", "--device", "cpu") as server:
        port = int(server.address.rpartition(":")[2])
        slow = []
        for number in range(200):
            one = socket.create_connection(("127.0.0.1", port))
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
            if number % 2:
                head += b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
            one.sendall(head)
            slow.append(one)
        body = {"prompt": "a boat", "size": "64x64"}
        took = []
        for _ in range(5):
            for one in slow:
                one.sendall(b"x")
            start = time.monotonic()
            assert (
                httpx.post(server.address + GENERATIONS, json=body, timeout=30).status_code == 200
            )
            took.append(time.monotonic() - start)
        assert sorted(took)[2] < 5
        # those without whole headers are sent away after a while
        slow[0].settimeout(40)
        assert slow[0].recv(100) == b""
        for one in slow:
            one.close()
        until(lambda: httpx.get(f"{server.address}/readyz").status_code == 200)


def _keys(size: int) -> bytes:
    """Return valid JSON of about so many bytes, all of it unknown keys."""
    keys = b"".join(b'"k%07d":1,' % number for number in range(size // 13))
    return b'{"prompt":"x",' + keys[: size - 32].rpartition(b",")[0] + b"}"


def _worst_bodies(large: bool) -> dict[str, tuple[str, str, bytes]]:
    """Return what once stopped the event loop, and what is just below the limits."""
    kind, form = "application/json", "multipart/form-data; boundary=edge"
    part = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    rows = {
        "8 MB of keys": (GENERATIONS, kind, _keys(8_000_000)),
        "1 MiB of keys": (GENERATIONS, kind, _keys((1 << 20) - 1)),
        "20 MB of lists": (GENERATIONS, kind, b'{"size":[' + b"[]," * 7_000_000 + b"1]}"),
        "1 MiB of lists": (GENERATIONS, kind, b'{"size":[' + b"[]," * 340_000 + b"1]}"),
        "1 MiB nested": (GENERATIONS, kind, b'{"prompt":' + b"[" * 1_000_000),
        "1 MiB of floats": (GENERATIONS, kind, b'{"size":[' + b"1e999," * 170_000 + b"1]}"),
        "1 MiB of escapes": (GENERATIONS, kind, b'{"prompt":"' + b"\\u0041" * 170_000 + b'"}'),
        "20 MB of part headers": (EDITS, form, b"--edge\r\n" + b"a: b\r\n" * 3_000_000),
        "20 MB of boundaries": (EDITS, form, part + b"\r\n--edg" * 2_500_000),
    }
    return rows if large else {name: row for name, row in rows.items() if len(row[2]) < 9_000_000}


def _send_again(address: str, kind: str, data: bytes, over: threading.Event) -> None:
    while not over.is_set():
        with contextlib.suppress(httpx.TransportError):
            found = httpx.post(address, content=data, headers={"content-type": kind}, timeout=60)
            assert found.status_code in {400, 413, 429}, found.text


@pytest.mark.finding(3)
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_worst_bodies_do_not_stop_the_loop(large: bool, pocket_server: Running) -> None:
    """Sixteen clients send each; /healthz answers, from another process than theirs."""
    before = memory(pocket_server)
    for name, (path, kind, data) in _worst_bodies(large).items():
        seconds, over = [], threading.Event()
        asked = (pocket_server.address + path, kind, data, over)
        clients = [threading.Thread(target=_send_again, args=asked) for _ in range(16)]
        for one in clients:
            one.start()
        with httpx.Client(base_url=pocket_server.address, timeout=60) as client:
            until_then = time.monotonic() + (3 if large else 0.5)
            while time.monotonic() < until_then:
                start = time.monotonic()
                client.get("/healthz").raise_for_status()
                seconds.append(time.monotonic() - start)
        over.set()
        for one in clients:
            one.join()
        # of this process, which sends the bodies, there is a share in it as well
        assert sorted(seconds)[len(seconds) // 2] < 0.1, (name, sorted(seconds)[-3:])
    assert memory(pocket_server) - before < 400 << 20
