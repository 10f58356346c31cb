"""What the server costs: a picture by HTTP against the same picture by the engine, alternating.

    python benchmarks/serve_overhead.py [--turns 40] [--size 128]

Two processes that each have the pocket model warm: `danqing serve`, and one that calls the engine.
Seconds of the server are those of a client, from sending the request to the last byte of the
answer; of the engine, those of painting and encoding the PNG.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time

PROMPT = "three blue mountains under a red sun, a boat on the water"


def direct(size: int) -> None:
    """Paint, for each seed on a line of standard input."""
    import danqing
    from danqing.pictures import encode
    from danqing.request import Request

    with danqing.open("pocket", device="cpu") as engine:
        engine.load()
        for line in sys.stdin:
            request = Request(prompt=PROMPT, seed=int(line), height=size, width=size)
            start = time.perf_counter()
            [picture] = engine.paint(request)
            encode(picture.image, picture.record(), "png")
            print(time.perf_counter() - start, flush=True)


def serve() -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it with its address."""
    child = subprocess.Popen(
        [sys.executable, "-m", "danqing", "serve", "--port", "0", "--no-page", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr
    for line in child.stderr:
        if found := re.search(r"danqing serves at (\S+)", line):
            threading.Thread(target=child.stderr.read, daemon=True).start()
            return child, found[1]
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.direct:
        direct(options.size)
        return
    child = subprocess.Popen(
        [sys.executable, __file__, "--direct", "--size", str(options.size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin
    assert child.stdout
    server, address = serve()
    seconds: dict[str, list[float]] = {"engine": [], "server": []}
    client = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with contextlib.closing(client):
        for turn in range(-3, options.turns):
            for name in ("engine", "server") if turn % 2 else ("server", "engine"):
                took = 0.0
                if name == "engine":
                    child.stdin.write(f"{turn + 3}\n")
                    child.stdin.flush()
                    took = float(child.stdout.readline())
                else:
                    size = f"{options.size}x{options.size}"
                    body = json.dumps({"prompt": PROMPT, "seed": turn + 3, "size": size})
                    kind = {"content-type": "application/json"}
                    start = time.perf_counter()
                    client.request("POST", "/v1/images/generations", body, kind)
                    data = client.getresponse().read()
                    took = time.perf_counter() - start
                    assert len(base64.b64decode(json.loads(data)["data"][0]["b64_json"]))
                if turn >= 0:
                    seconds[name].append(took)
    child.stdin.close()
    server.terminate()
    for one in (child, server):
        one.wait()
    print("| | median | fastest |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.4f} s | {min(values):.4f} s |")
    pairs = [a / b for a, b in zip(seconds["server"], seconds["engine"], strict=True)]
    print(f"\nserver / engine: {statistics.median(pairs):.3f} (median of {len(pairs)} pairs)")


if __name__ == "__main__":
    main()
