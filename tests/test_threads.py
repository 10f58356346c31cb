"""Any number of threads may share an engine: one at a time, in order of arrival."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import danqing
from danqing.errors import BusyError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.generation import Progress

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
PROMPTS = ("a cat", "a dog", "a bird", "a fish", "a house", "a tree")


def pixels(engine: danqing.Engine, number: int) -> bytes:
    """One of 6 x 5 small requests; some ask for two images, some for another size."""
    settings = {**SMALL, "num_images_per_prompt": 1 + number % 2, "width": 64 + 16 * (number % 3)}
    generation = engine.generate(PROMPTS[number % len(PROMPTS)], seed=number % 5, **settings)
    return b"".join(picture.image.tobytes() for picture in generation.pictures)


def start_all(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Let threads begin at the same moment; return what each returned."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@pytest.mark.finding("U1")
def test_threads_share_an_engine(schnell: Path) -> None:
    with danqing.open(schnell, device="cpu") as engine:
        expected = [pixels(engine, number) for number in range(12)]
        assert start_all(12, lambda number: pixels(engine, number)) == expected


@pytest.mark.finding("U1")
def test_threads_share_a_streamed_engine(schnell: Path) -> None:
    with danqing.open(schnell, device="cpu", placement="streamed") as engine:
        expected = [pixels(engine, number) for number in range(4)]
        assert start_all(4, lambda number: pixels(engine, number)) == expected


@pytest.mark.finding("U1")
def test_engines_on_one_device_take_turns(schnell: Path, dev: Path) -> None:
    with danqing.open(schnell, device="cpu") as one, danqing.open(dev, device="cpu") as other:
        engines = (one, other)
        expected = [pixels(engines[number % 2], number) for number in range(6)]
        found = start_all(6, lambda number: pixels(engines[number % 2], number))
    assert found == expected


@pytest.mark.slow
@pytest.mark.finding("U1")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["schnell", "deepgen"])
def test_eight_threads_have_the_bits_of_one(model: str, request: pytest.FixtureRequest) -> None:
    with danqing.open(request.getfixturevalue(model), device="cpu") as engine:
        expected = [pixels(engine, number) for number in range(30)]

        def fifty(thread: int) -> int:
            numbers = [(7 * thread + request) % 30 for request in range(50)]
            return sum(pixels(engine, number) == expected[number] for number in numbers)

        assert start_all(8, fifty) == [50] * 8


def test_turns_are_in_order_of_arrival() -> None:
    from danqing.turns import Turns

    turns, order = Turns(), list[int]()

    def work(number: int) -> None:
        with turns.take():
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    with turns.take():
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._queue) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert not turns.taken


def test_whole_requests_are_served_in_order_of_arrival(engine: danqing.Engine) -> None:
    order: list[tuple[str, str]] = []
    begun = threading.Event()

    def first(progress: Progress) -> None:
        if progress.stage == "denoise":
            order.append(("first", progress.item))
            begun.set()
            time.sleep(0.02)

    def second(progress: Progress) -> None:
        order.append(("second", progress.stage))

    settings = {**SMALL, "num_images_per_prompt": 3}
    long = threading.Thread(target=lambda: engine.generate("a cat", listen=first, **settings))
    long.start()
    begun.wait()
    engine.generate("a dog", listen=second, **SMALL)
    long.join()
    heard = [who for who, what in order if what != "wait"]
    assert heard == ["first"] * 6 + ["second"] * 2
    assert ("second", "wait") in order


def test_a_request_that_waits_can_be_cancelled(engine: danqing.Engine) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    heard: list[Progress] = []
    release, begun = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        begun.set()
        release.wait(30)

    def cancel(progress: Progress) -> None:
        heard.append(progress)
        if len(heard) == 3:
            raise Enough

    thread = threading.Thread(target=lambda: engine.generate("a cat", listen=hold, **SMALL))
    thread.start()
    begun.wait()
    with pytest.raises(Enough):
        engine.generate("a dog", listen=cancel, **SMALL)
    assert engine.answers()  # at once, though the device is at work
    release.set()
    thread.join()
    assert {(one.stage, one.total - one.done, one.unit) for one in heard} == {
        ("wait", 1, "requests")
    }
    engine.generate("a dog", **SMALL)


def test_what_cannot_be_is_refused_without_waiting(engine: danqing.Engine) -> None:
    release, begun = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        begun.set()
        release.wait(30)

    thread = threading.Thread(target=lambda: engine.generate("a cat", listen=hold, **SMALL))
    thread.start()
    begun.wait()
    with pytest.raises(RequestError):
        engine.generate("a dog", height=1, width=64)
    release.set()
    thread.join()


def test_a_listener_cannot_call_its_own_engine(engine: danqing.Engine) -> None:
    def call(progress: Progress) -> None:
        engine.generate("a dog", **SMALL)

    with pytest.raises(BusyError, match="in this thread"):
        engine.generate("a cat", listen=call, **SMALL)
    with pytest.raises(BusyError, match="in this thread"):
        engine.generate("a cat", listen=lambda _: engine.close(), **SMALL)
    engine.generate("a cat", **SMALL)


def test_an_unfinished_paint_holds_nothing_up(engine: danqing.Engine) -> None:
    from danqing.request import Request

    request = Request(prompt="a cat", seed=1, num_images_per_prompt=3, **SMALL)
    expected = [picture.image.tobytes() for picture in engine.generate(request).pictures]
    unfinished = engine.paint(request)
    images = [next(unfinished).image.tobytes()]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.generate, "a dog", **SMALL).result(timeout=60)
        # a web framework asks for each item in another thread
        images += pool.submit(lambda: [one.image.tobytes() for one in unfinished]).result(60)
    assert images == expected


def test_closing_waits_and_the_engine_loads_again(schnell: Path) -> None:
    engine = danqing.open(schnell, device="cpu")
    expected = pixels(engine, 0)

    def work(number: int) -> bytes | None:
        if number % 2 == 0:
            return pixels(engine, 0)
        engine.close()
        return None

    assert start_all(8, work) == [expected, None] * 4
    engine.close()


OPEN = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import danqing
barrier = threading.Barrier(8)
def work(number):
    barrier.wait()
    with danqing.open(sys.argv[1], device="cpu") as engine:
        return engine.generate("a cat", seed=1, height=64, width=64).image.tobytes()
with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(work, range(8)))))
"""


def test_eight_threads_open_engines_at_the_same_time(schnell: Path) -> None:
    """Also the libraries' first import, and our kernels."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(schnell)],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
