"""What a server does under the worst bodies: 16 clients send each without end, one asks /healthz.

    python benchmarks/serve_hostile.py [--seconds 3] [--clients 16] [--edits FOLDER]

Prints a line for each body: how many were answered and how, the median and slowest answer, the
median and slowest /healthz meanwhile, and the server's resident memory. FOLDER has a model that
edits; `python tests/deepgen_toys.py FOLDER` writes a small one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
MEBIBYTE = 1 << 20
JSON = "application/json"
FORM = "multipart/form-data; boundary=edge"


def fill(start: bytes, unit: bytes, end: bytes = b"", size: int = MEBIBYTE) -> bytes:
    """Repeat a unit until the body is just of a size."""
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + end


def part(name: str, data: bytes, file: str = "") -> bytes:
    """Return a part of a form."""
    named = f'; filename="{file}"' if file else ""
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def picture(kind: str, size: tuple[int, int]) -> bytes:
    """Return an image of one color."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def json_bodies() -> dict[str, bytes]:
    """Return bodies of JSON; most are just below the limit."""
    many = b"".join(b'"k%d":1,' % number for number in range(4_000_000))
    return {
        "46 MB of unknown keys": b"{" + many[:46_000_000].rpartition(b",")[0] + b"}",
        "8 MB of unknown keys": b"{" + many[:8_000_000].rpartition(b",")[0] + b"}",
        "1 MiB of unknown keys": b"{" + many[: MEBIBYTE - 20].rpartition(b",")[0] + b"}",
        "60 MB of [] as size": fill(b'{"prompt":"x","size":[', b"[],", b"[]]}", 60_000_000),
        "1 MiB of [] as size": fill(b'{"prompt":"x","size":[', b"[],", b"[]]}"),
        "60 MB list as prompt": fill(b'{"prompt":[', b'"x",', b'"x"]}', 60_000_000),
        "1 MiB nested": fill(b'{"prompt":', b"["),
        "1 MiB of objects, nested": fill(b"", b'{"prompt":'),
        "1 MiB of digits": fill(b'{"prompt":"x","n":', b"9", b"}"),
        "1 MiB of numbers of 4300 digits": fill(b'{"size":[', b"9" * 4299 + b",", b"1]}"),
        "1 MiB of 1e999": fill(b'{"size":[', b"1e999,", b"1]}"),
        "1 MiB of escapes": fill(b'{"prompt":"', b"\\u0041", b'"}'),
        "1 MiB of emoji": fill(b'{"prompt":"', "\U0001f4a9".encode(), b'"}'),
        "1 MiB of spaces": fill(b'{"prompt":"x"', b" ", b"}"),
        "1 MiB name of a key": fill(b'{"', b"x", b'":1}'),
        "1 MiB of one key": fill(b"{", b'"prompt":"x",', b'"n":1}'),
    }


def form_bodies() -> dict[str, bytes]:
    """Return forms; images are what a model that edits would decode."""
    large = 60 << 20
    return {
        "form: 60 MB of headers": fill(b"--edge\r\n", b"a: b\r\n", size=large),
        "form: 60 MB of parts": fill(b"", part("prompt", b"x"), size=large),
        "form: 60 MB nearly boundaries": fill(part("image", b"", "a"), b"\r\n--edg", size=large),
        "form: 60 MB file": fill(part("prompt", b"x") + part("image", b"", "a")[:-2], b"x",
                                 b"\r\n--edge--\r\n", large),
        "form: PNG of 32 million pixels": part("prompt", b"x")
        + part("image", picture("PNG", (8000, 4000)), "a") + b"--edge--\r\n",
        "form: 8 of them": part("prompt", b"x")
        + part("image", picture("PNG", (8000, 4000)), "a") * 8 + b"--edge--\r\n",
        "form: WebP of 32 million pixels": part("prompt", b"x")
        + part("image", picture("WEBP", (8000, 4000)), "a") + b"--edge--\r\n",
    }  # fmt: skip


def serve(model: str | None) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it with its address."""
    command = [sys.executable, "-m", "danqing", "serve", "--port", "0", "--no-page"]
    if model:
        command += ["-m", model, "--dtype", "float32"]
    child = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    assert child.stderr
    for line in child.stderr:
        if found := re.search(r"danqing serves at (\S+)", line):
            threading.Thread(target=child.stderr.read, daemon=True).start()
            return child, found[1]
    raise SystemExit("the server did not start")


def resident(pid: int) -> int:
    """Return the MiB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


class Health(threading.Thread):
    """Asks /healthz without pause, in a thread and over a connection of its own."""

    def __init__(self, address: str, pid: int) -> None:
        """Keep whom to ask."""
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.most = 0
        self._address, self._pid, self._over = address, pid, threading.Event()

    def run(self) -> None:
        """Ask until it is over."""
        with httpx.Client(base_url=self._address, timeout=120) as client:
            while not self._over.is_set():
                start = time.perf_counter()
                client.get("/healthz").raise_for_status()
                self.seconds.append(time.perf_counter() - start)
                self.most = max(self.most, resident(self._pid))
                time.sleep(0.01)

    def stop(self) -> None:
        """End, and wait for the last answer."""
        self._over.set()
        self.join()


SENDER = """
import http.client, json, socket, sys, time
host, path, kind, place, clients, seconds = sys.argv[1:]
import threading
body = open(place, "rb").read()
rows, until = [], time.monotonic() + float(seconds)
def send():
    while time.monotonic() < until:
        start = time.perf_counter()
        try:
            one = http.client.HTTPConnection(host, timeout=120)
            try:
                one.request("POST", path, body, {"content-type": kind, "prefer": "respond-async"})
            except (BrokenPipeError, ConnectionResetError):
                pass
            status = str(one.getresponse().status)
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        one.close()
        rows.append((status, time.perf_counter() - start))
threads = [threading.Thread(target=send) for _ in range(int(clients))]
for one in threads: one.start()
for one in threads: one.join()
print(json.dumps(rows))
"""


def measure(
    address: str, pid: int, body: tuple[str, str, bytes], options: argparse.Namespace
) -> list[str]:
    """Send one body from all clients for a while; return the row of the table."""
    path, kind, data = body
    place = Path(options.scratch) / "body"
    place.write_bytes(data)
    before = resident(pid)
    health = Health(address, pid)
    health.start()
    command = [
        sys.executable,
        "-c",
        SENDER,
        address.removeprefix("http://"),
        path,
        kind,
        str(place),
    ]
    sent = subprocess.run([*command, str(options.clients), str(options.seconds)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    health.stop()
    rows = json.loads(sent.stdout)
    times = [seconds for _, seconds in rows]
    counts = Counter(status for status, _ in rows)
    answers = ", ".join(f"{count} x {status}" for status, count in counts.items())
    return [
        answers, f"{statistics.median(times):.2f} s", f"{max(times):.2f} s",
        f"{1000 * statistics.median(health.seconds):.0f} ms",
        f"{1000 * max(health.seconds):.0f} ms",
        f"{before} to {health.most} MiB",
    ]  # fmt: skip


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--edits", metavar="FOLDER", help="a model that edits")
    parser.add_argument("--only", default="", help="bodies whose name has this in it")
    options = parser.parse_args()
    child, address = serve(options.edits)
    bodies = {name: (GENERATIONS, JSON, data) for name, data in json_bodies().items()}
    bodies |= {name: (EDITS, FORM, data) for name, data in form_bodies().items()}
    print("| body | answers | median | slowest | /healthz | slowest | memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as options.scratch:
        for name, body in bodies.items():
            if options.only in name:
                print(
                    "|",
                    " | ".join([name, *measure(address, child.pid, body, options)]),
                    "|",
                    flush=True,
                )
    child.terminate()
    child.wait()


if __name__ == "__main__":
    main()
