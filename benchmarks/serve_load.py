"""Many clients at once, for long, and then a crash: is every accepted request answered, once?

    python benchmarks/serve_load.py [--clients 64] [--minutes 10] [--crash-seconds 60]

First the server's capacity is measured: pictures a second with four clients, 20 seconds. Then the
clients ask, all together twice as often as that, each time with an Idempotency-Key of its own and
without retries: a 429 is counted and that request is over. Then the server is started with
--journal, loaded, killed (SIGKILL) and started again, twice: the clients ask again under the same
keys, and what was accepted must come, once.

    python benchmarks/serve_load.py --requests 3000

measures the server's memory alone: four clients send so many small requests, to a server without
a journal and to one with a journal. After a tenth of them memory must stay within 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import os
import re
import secrets
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

BODY: dict[str, Any] = {"prompt": "a red circle", "size": "128x128"}
GENERATIONS = "/v1/images/generations"
OK = 200
MINUTE = 60


class Server:
    """A server in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        """Start it, and wait until it serves."""
        command = [
            sys.executable, "-m", "danqing", "serve", "--port", "0", "--no-page", "--device", "cpu",
            "--queue", "48", "--per-client", "1000", *arguments,
        ]  # fmt: skip
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(command, stderr=self.log)
        self.address = ""
        while not self.address:
            time.sleep(0.2)
            found = re.search(r"danqing serves at (\S+)", Path(self.log.name).read_text())
            self.address = found[1] if found else ""
            assert self.process.poll() is None, Path(self.log.name).read_text()

    def resident(self) -> int:
        """Bytes of memory in use."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it by a signal."""
        self.process.send_signal(how)
        self.process.wait()


async def closed_loop(address: str, clients: int, seconds: float) -> float:
    """Return pictures a second of clients that ask again as soon as they have one."""
    done, end = 0, time.monotonic() + seconds

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal done
        while time.monotonic() < end:
            answer = await client.post(GENERATIONS, json=BODY)
            assert answer.status_code == OK, answer.text
            done += 1

    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        start = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return done / (time.monotonic() - start)


async def load(server: Server, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    """Ask so often a second, all clients together; return what came of it."""
    statuses: collections.Counter[int] = collections.Counter()
    times: list[float] = []
    jobs: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    memory: list[tuple[float, int]] = []
    seeds = itertools.count()
    begin = time.monotonic()
    end = begin + seconds

    async def one(client: httpx.AsyncClient, number: int) -> None:
        due = begin + number / rate
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            seed, start = next(seeds), time.monotonic()
            headers = {"idempotency-key": f"{number}-{seed}"}
            answer = await client.post(GENERATIONS, json={**BODY, "seed": seed}, headers=headers)
            statuses[answer.status_code] += 1
            if answer.status_code == OK:
                times.append(time.monotonic() - start)
                found = answer.json()
                jobs[found["job"]] += 1
                if found["data"][0]["record"]["request"]["seed"] != seed:
                    wrong.append(found["job"])
            due = max(due + clients / rate, time.monotonic())

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append((time.monotonic() - begin, server.resident()))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=server.address, timeout=300, limits=limits) as client:
        await asyncio.gather(watch(), *(one(client, number) for number in range(clients)))
    first = [size for at, size in memory if at < MINUTE]
    last = [size for at, size in memory if at > seconds - MINUTE]
    times.sort()
    return {
        "asked": sum(statuses.values()),
        "statuses": dict(statuses),
        "answered": len(times),
        "answered twice": sum(count - 1 for count in jobs.values()),
        "another's picture": len(wrong),
        "goodput": len(times) / seconds,
        "p50": times[len(times) // 2],
        "p99": times[int(len(times) * 0.99)],
        "memory MiB": [round(statistics.median(part) / 2**20, 1) for part in (first, last)],
        "memory ratio": statistics.median(last) / statistics.median(first),
    }


async def crash(clients: int, seconds: float) -> dict[str, Any]:
    """Kill a server under load twice; return what became of what it accepted."""
    folder = Path(tempfile.mkdtemp())
    journal = folder / "jobs.db"
    server = Server("--journal", str(journal))
    answered: collections.Counter[str] = collections.Counter()
    where = [server.address]
    end = time.monotonic() + seconds
    refused = 0

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal refused
        while time.monotonic() < end:
            key, seed = secrets.token_hex(8), secrets.randbits(32)
            while True:  # as a client does that wants its picture
                try:
                    answer = await client.post(
                        where[0] + GENERATIONS, json={**BODY, "seed": seed},
                        headers={"idempotency-key": key},
                    )  # fmt: skip
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)
                    continue
                if answer.status_code in {429, 503}:
                    refused += 1
                    await asyncio.sleep(1)
                    continue
                assert answer.status_code == OK, answer.text
                found = answer.json()
                assert found["data"][0]["record"]["request"]["seed"] == seed
                answered[key] += 1
                break

    async def kill() -> None:
        nonlocal server
        for _ in range(2):
            await asyncio.sleep(seconds / 3)
            server.stop(signal.SIGKILL)
            server = await asyncio.to_thread(Server, "--journal", str(journal))
            where[0] = server.address

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=200)) as client:
        await asyncio.gather(kill(), *(one(client) for _ in range(clients)))
    server.stop()
    return {
        "kills": 2,
        "answered": len(answered),
        "answered twice": sum(count - 1 for count in answered.values()),
        "refused and asked again": refused,
        **read_journal(journal),
    }


async def watch_memory(server: Server, requests: int) -> dict[str, Any]:
    """Return the resident memory after a tenth of the requests, at the end, and the largest."""
    left = itertools.count(1)
    memory: list[int] = []
    begin = time.monotonic()

    async def one(client: httpx.AsyncClient) -> None:
        while (number := next(left)) <= requests:
            body = {**BODY, "size": "64x64", "seed": number}
            headers = {"idempotency-key": f"request {number}"} if number % 2 else {}
            answer = await client.post(GENERATIONS, json=body, headers=headers)
            assert answer.status_code == OK, answer.text
            memory.append(server.resident())

    async with httpx.AsyncClient(base_url=server.address, timeout=300) as client:
        await asyncio.gather(*(one(client) for _ in range(4)))
    first, last = memory[len(memory) // 10], memory[-1]
    return {
        "answered": len(memory),
        "seconds": round(time.monotonic() - begin),
        "memory MiB": [round(size / 2**20, 1) for size in (first, last, max(memory))],
        "memory ratio": round(last / first, 4),
    }


def read_journal(journal: Path) -> dict[str, Any]:
    """Return what the journal says of all jobs."""
    with sqlite3.connect(journal) as base:
        states = dict(base.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
        runs = dict(base.execute("SELECT runs, count(*) FROM jobs GROUP BY runs"))
        doubled = base.execute(
            "SELECT count(*) FROM (SELECT job FROM pictures GROUP BY job HAVING count(*) > 1)"
        ).fetchone()[0]
    return {
        "accepted": sum(states.values()),
        "states": states,
        "painted twice": doubled,
        "begun (times: jobs)": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--crash-seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, help="measure memory over so many requests alone")
    options = parser.parse_args()
    if options.requests:
        journal = Path(tempfile.mkdtemp()) / "jobs.db"
        for name, flags in (("without", []), ("with", ["--journal", str(journal)])):
            server = Server(*flags)
            found = asyncio.run(watch_memory(server, options.requests))
            server.stop()
            print(f"{name} a journal: {json.dumps(found)}", flush=True)
        return
    server = Server()
    asyncio.run(closed_loop(server.address, 4, 5))
    capacity = asyncio.run(closed_loop(server.address, 4, 20))
    print(f"capacity: {capacity:.2f} pictures a second", flush=True)
    found = asyncio.run(load(server, options.clients, 2 * capacity, options.minutes * MINUTE))
    server.stop()
    print(json.dumps(found, indent=1), flush=True)
    print(json.dumps(asyncio.run(crash(16, options.crash_seconds)), indent=1))


if __name__ == "__main__":
    main()
