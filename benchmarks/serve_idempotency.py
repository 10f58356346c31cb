"""Many requests with one Idempotency-Key at once: is each key one job, and each request answered?

    python benchmarks/serve_idempotency.py [--keys 40] [--clients 12] [--rounds 10]

In each round every key is sent by all clients at the same time. Three servers are asked, each by
`danqing serve`: without a journal, with one, and with one while the server is killed (SIGKILL) in
every round and started again; then the clients repeat their requests under the same keys.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import random
import signal
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from serve_load import GENERATIONS, OK, Server

BODY: dict[str, Any] = {"prompt": "a red circle", "size": "64x64"}
RETRIED = (503,)
"""The server is being started or stopped: the client asks again."""


class Counts:
    """What became of all requests."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.statuses: collections.Counter[str] = collections.Counter()
        self.repeated = 0
        self.kills = 0
        self.jobs: dict[str, set[str]] = collections.defaultdict(set)
        self.images: dict[str, set[str]] = collections.defaultdict(set)
        self.slowest = 0.0

    def take(self, key: str, answer: httpx.Response, seconds: float) -> None:
        """Count an answer."""
        self.statuses[str(answer.status_code)] += 1
        self.slowest = max(self.slowest, seconds)
        if answer.status_code == OK:
            found = answer.json()
            self.jobs[key].add(found["job"])
            image = found["data"][0]["b64_json"].encode()
            self.images[key].add(hashlib.sha256(image).hexdigest())

    def row(self, name: str, journal: Path | None) -> str:
        """Return a row of the table."""
        answers = sum(self.statuses.values())
        several = sum(len(jobs) != 1 for jobs in self.jobs.values())
        different = sum(len(images) != 1 for images in self.images.values())
        statuses = ", ".join(f"{count} x {status}" for status, count in self.statuses.items())
        written = "" if journal is None else read_journal(journal)
        cells = (
            name, answers, statuses, self.statuses["unanswered"], len(self.jobs), several,
            different, self.kills, self.repeated, f"{self.slowest:.1f} s", written,
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def read_journal(journal: Path) -> str:
    """Return how many jobs and images the journal has, and how often jobs were begun."""
    with sqlite3.connect(journal) as base:
        states = dict(base.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
        [pictures] = base.execute("SELECT count(*) FROM pictures").fetchone()
        [begun] = base.execute("SELECT sum(runs) FROM jobs").fetchone()
    base.close()
    named = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{named}; {pictures} images; begun {begun} times"


async def send(client: httpx.AsyncClient, where: list[str], key: str, counts: Counts) -> None:
    """Send one request until it is answered, as a client does that wants its image."""
    start = time.monotonic()
    while True:
        try:
            answer = await client.post(
                where[0] + GENERATIONS, json=BODY, headers={"idempotency-key": key}
            )
        except httpx.TimeoutException:
            counts.statuses["unanswered"] += 1
            return
        except httpx.HTTPError:
            if len(where) == 1:  # nobody kills this server
                counts.statuses["broken off"] += 1
                return
            counts.repeated += 1
            await asyncio.sleep(1)
            continue
        if len(where) > 1 and answer.status_code in RETRIED:
            counts.repeated += 1
            await asyncio.sleep(1)
            continue
        counts.take(key, answer, time.monotonic() - start)
        return


async def measure(options: argparse.Namespace, journal: Path | None, *, kill: bool) -> Counts:
    """Ask a server for all rounds."""
    flags = ["--queue", str(max(64, options.keys))]
    flags += [] if journal is None else ["--journal", str(journal)]
    server = Server(*flags)
    counts = Counts()
    where = [server.address] + (["killed"] if kill else [])
    dice = random.Random(19)  # noqa: S311 - moments to kill at
    total = options.keys * options.clients
    limits = httpx.Limits(max_connections=total, max_keepalive_connections=total)
    async with httpx.AsyncClient(timeout=options.patience, limits=limits) as client:
        for number in range(options.rounds):
            keys = [f"{number}-{key}" for key in range(options.keys)] * options.clients
            dice.shuffle(keys)
            asking = asyncio.gather(*(send(client, where, key, counts) for key in keys))
            if kill:
                await asyncio.sleep(dice.uniform(0.05, options.kill_within))
                server.stop(signal.SIGKILL)
                counts.kills += 1
                server = await asyncio.to_thread(Server, *flags)
                where[0] = server.address
            await asking
    server.stop()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--patience", type=float, default=60, help="seconds until unanswered")
    parser.add_argument("--kill-within", type=float, default=2.0, help="seconds, in each round")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    names = (
        "", "answers", "statuses", "unanswered", "keys", "keys with several jobs",
        "keys with several images", "kills", "requests repeated", "slowest", "journal",
    )  # fmt: skip
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for name, journal, kill in (
        ("without a journal", None, False),
        ("with a journal", folder / "kept.db", False),
        ("with a journal and SIGKILL", folder / "killed.db", True),
    ):
        counts = asyncio.run(measure(options, journal, kill=kill))
        print(counts.row(name, journal), flush=True)


if __name__ == "__main__":
    main()
