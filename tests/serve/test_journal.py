"""Jobs outlive the server: after SIGKILL what was accepted is painted, once."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from danqing.errors import BusyError, OutputError, RefusedPictureError
from danqing.request import Request
from danqing.serve.jobs import Job, Order
from danqing.serve.journal import Journal
from tests.serve.conftest import serving, until

if TYPE_CHECKING:
    from pathlib import Path

BODY: dict[str, Any] = {"prompt": "a red circle", "size": "64x64"}


def _job(name: str | None = None, **more: Any) -> Job:
    request = Request(prompt="a boat", seed=1, height=64, width=64, **more)
    return Job(order=Order(model="pocket", request=request), client="anna", idempotency=name)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "sub" / "jobs.db"
    journal = Journal(place)
    plain = _job("first")
    edit = _job(image=[Image.new("RGB", (8, 8), "red")], reference_latent="mode")
    failed = _job()
    for one in (plain, edit, failed):
        journal.accept(one)
    journal.end(failed, "failed", RefusedPictureError("no", seen="x"))
    journal.close()
    journal = Journal(place)
    assert [one.id for one in journal.waiting()] == [plain.id, edit.id]
    found = journal.job(edit.id)
    assert found is not None
    assert found.order == edit.order
    assert found.order.request.image == edit.order.request.image
    named = journal.by_idempotency("anna", "first")
    assert named is not None
    assert named.id == plain.id
    assert journal.by_idempotency("else", "first") is None
    gone = journal.job(failed.id)
    assert gone is not None
    assert isinstance(gone.error, RefusedPictureError)
    assert gone.error.seen == "x"
    journal.forget_old()
    assert journal.job(failed.id) is not None
    journal.forget_old(older_than=-1)
    assert journal.job(failed.id) is None
    journal.close()


def test_one_server_at_a_time_and_no_other_file(tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    journal = Journal(place)
    with pytest.raises(OutputError, match="cannot be used"):
        Journal(place)
    journal.close()
    other = tmp_path / "other.db"
    other.write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match="cannot be used"):
        Journal(other)
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as base:
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(OutputError, match="newer version of danqing"):
        Journal(newer)


@pytest.mark.slow
@pytest.mark.enable_socket
def test_killed_under_load(tmp_path: Path) -> None:
    """Accepted is answered, and nothing is painted twice to its end."""
    place = tmp_path / "jobs.db"
    ids: dict[int, str] = {}
    with serving("--no-page", "--device", "cpu", "--journal", place) as server:
        headers = {"prefer": "respond-async"}
        for seed in range(12):
            answer = httpx.post(
                f"{server.address}/v1/images/generations",
                json={**BODY, "seed": seed},
                headers={**headers, "idempotency-key": f"job {seed}"},
            )
            assert answer.status_code == 202
            ids[seed] = answer.json()["id"]
        until(lambda: _states(server.address, ids).count("done") >= 3)
        server.stop(signal.SIGKILL)
    with serving("--no-page", "--device", "cpu", "--journal", place) as server:
        until(lambda: set(_states(server.address, ids)) == {"done"}, 60)
        again = httpx.post(
            f"{server.address}/v1/images/generations",
            json={**BODY, "seed": 4},
            headers={"idempotency-key": "job 4"},
            timeout=30,
        ).json()
        assert again["job"] == ids[4]
        records = [one["record"]["request"]["seed"] for one in again["data"]]
        assert records == [4]
        assert server.stop() == 0
    with sqlite3.connect(place) as base:
        assert base.execute("SELECT count(*) FROM jobs WHERE state = 'done'").fetchone() == (12,)
        assert base.execute("SELECT count(*) FROM pictures").fetchone() == (12,)
        runs = [count for (count,) in base.execute("SELECT runs FROM jobs")]
    assert sorted(runs) in ([1] * 12, [1] * 11 + [2])  # the one that was running then, once more


def _states(address: str, ids: dict[int, str]) -> list[str]:
    return [httpx.get(f"{address}/v1/jobs/{one}").json()["status"] for one in ids.values()]


# --- the service with a fake engine --------------------------------------------------------------


def test_limits_are_counted_right() -> None:
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    gate = threading.Event()
    runner = FakeRunner(gate)
    service = make_service(runner, queue=3, per_client=2)
    order = make_order()
    first = service.submit(order, "anna")
    until(lambda: service.running == 1)
    service.submit(order, "anna")
    with pytest.raises(BusyError, match="this client"):
        service.submit(order, "anna")
    others = [service.submit(order, "ben") for _ in range(2)]
    with pytest.raises(BusyError, match="queue is full"):
        service.submit(order, "carl")
    service.cancel(others[0])
    assert others[0].state == "cancelled"
    assert [one.position for one in (others[1],)] == [1]
    service.submit(order, "carl")
    gate.set()
    until(lambda: first.state == "done")
    until(lambda: service.running == 0 and service.depth == 0)
    service.submit(order, "anna")
    service.close()


def test_a_poisoned_job_fails_alone() -> None:
    from danqing.errors import BrokenPictureError, DoesNotFitError
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    runner = FakeRunner()
    service = make_service(runner)
    for error, kind in (
        (BrokenPictureError("black"), BrokenPictureError),
        (DoesNotFitError("full", hint="a smaller --dtype"), DoesNotFitError),
        (ValueError("a bug"), Exception),
    ):
        runner.raises = error
        bad = service.submit(make_order(), "anna")
        until(lambda bad=bad: bad.ended)
        assert bad.state == "failed"
        assert isinstance(bad.error, kind)
        runner.raises = None
        good = service.submit(make_order(), "anna")
        until(lambda good=good: good.ended)
        assert good.state == "done"
    assert runner.closed == 1  # after the unknown one it loads anew
    service.close()


def test_deadlines_waiting_and_running() -> None:
    from danqing.errors import DeadlineError
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    gate = threading.Event()
    runner = FakeRunner(gate)
    service = make_service(runner, deadline=0.2)
    running, waiting = (service.submit(make_order(), "anna") for _ in range(2))
    until(lambda: waiting.ended)
    assert isinstance(waiting.error, DeadlineError)
    gate.set()
    until(lambda: running.ended)
    assert isinstance(running.error, DeadlineError)
    service.close()


def test_a_job_that_cannot_be_kept_is_not_accepted(tmp_path: Path) -> None:
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    runner = FakeRunner()
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(runner, journal=journal)

    journal._base.execute("PRAGMA max_page_count = 1")  # as on a disk that is full
    large = make_order().request.replace(prompt="x" * 8000)
    with pytest.raises(OutputError, match="cannot be written"):
        service.submit(replace(make_order(), request=large), "anna", idempotency="full")
    assert service.depth == service.running == 0
    journal._base.execute("PRAGMA max_page_count = 100000")
    job = service.submit(make_order(), "anna", idempotency="x")
    until(lambda: job.state == "done")
    kept = journal.by_idempotency("anna", "x")
    assert kept is not None
    assert kept.state == "done"
    service.close()


def test_a_picture_that_cannot_be_kept_is_handed_out_all_the_same(tmp_path: Path) -> None:
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    gate = threading.Event()
    runner = FakeRunner(gate)
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(runner, journal=journal)
    job = service.submit(make_order(count=8), "anna")
    until(lambda: service.running == 1)
    journal._base.execute("PRAGMA max_page_count = 1")
    gate.set()
    until(lambda: job.ended)
    assert job.state == "done"
    assert len(job.pictures) == 8
    assert [one.id for one in journal.waiting()] == [job.id]
    service.close()


def test_a_checker_refuses(tmp_path: Path) -> None:
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order, make_service

    class Prude:
        name = "prude"

        def refuses(self, picture: Any) -> str | None:
            return "nsfw, 0.99" if picture.request.seed == 13 else None

    runner = FakeRunner()
    service = make_service(runner, checker=Prude())
    bad, good = (service.submit(make_order(seed=seed), "anna") for seed in (13, 14))
    until(lambda: good.ended)
    assert isinstance(bad.error, RefusedPictureError)
    assert not bad.pictures
    assert good.state == "done"
    service.close()


@pytest.mark.parametrize("labels", [{0: "normal", 1: "nsfw"}, {0: "cat", 1: "dog"}])
def test_a_real_classifier(labels: dict[int, str], tmp_path: Path) -> None:
    """A small ViT of random weights, as transformers writes it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from danqing.errors import UnknownModelError
    from danqing.models.safety import SafetyChecker
    from tests.fakes import FakeRunner
    from tests.serve.fakes import make_order

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16, id2label=labels, label2id={t: i for i, t in labels.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0]))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    if labels[1] == "dog":
        with pytest.raises(UnknownModelError, match="none of the safety"):
            SafetyChecker(tmp_path)
        return
    config_file = tmp_path / "config.json"
    plain = config_file.read_text()
    for key in ("auto_map", "_attn_implementation", "quantization_config"):
        config_file.write_text(json.dumps({**json.loads(plain), key: "evil/repo"}))
        with pytest.raises(UnknownModelError, match="code or kernels") as caught:
            SafetyChecker(tmp_path)
        assert key in (caught.value.seen or "")
    config_file.write_text(plain)
    checker = SafetyChecker(tmp_path)
    [picture] = FakeRunner().paint(make_order().request)
    assert (checker.refuses(picture) or "").startswith("nsfw, 0.99")
    checker._model.classifier.bias.data[1] = -5.0
    assert checker.refuses(picture) is None
