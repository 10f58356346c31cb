"""Hosts, origins, encodings, keys of repeated requests: what is refused before anything is read."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from danqing.errors import (
    CheckpointDamagedError,
    DanqingError,
    DeviceFailedError,
    OutputError,
    RequestError,
)
from danqing.serve import answers, guards
from tests.fakes import FakeRunner
from tests.serve.fakes import make_service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serve.conftest import Running

pytestmark = pytest.mark.enable_socket
GENERATIONS = "/v1/images/generations"
JSON = {"content-type": "application/json"}
SMALL: dict[str, Any] = {"prompt": "a red circle", "size": "64x64"}


def port_of(server: Running) -> int:
    return int(server.address.rpartition(":")[2])


def is_error(answer: Any, status: int) -> bool:
    """Whether an answer has this status, and the shape of the API's errors."""
    body = answer.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert answer.status_code == status, body
    return True


@pytest.mark.finding(13)
@pytest.mark.parametrize(
    "origin",
    [
        "http://127.0.0.1:3000",
        "http://127.0.0.1",
        "https://127.0.0.1:{port}",
        "http://localhost:{port}",
        "http://127.0.0.1:{port}@evil.example",
        "http://user@127.0.0.1:{port}",
        "http://127.0.0.1:{port}.evil.example",
        "http://127.0.0.1:{port}/",
        "http://127.0.0.1.:{port}",
        "ftp://127.0.0.1:{port}",
        "127.0.0.1:{port}",
        "null",
        "",
    ],
)
def test_an_origin_is_compared_with_its_scheme_and_port(
    pocket_server: Running, http: httpx.Client, origin: str
) -> None:
    said = {"origin": origin.format(port=port_of(pocket_server))}
    for path in ("/v1/models", GENERATIONS, "/v1/images/edits"):
        method = "GET" if path == "/v1/models" else "POST"
        found = http.request(method, path, headers=said)
        assert is_error(found, 403)
        assert found.json()["error"]["code"] == "cross_origin"


def test_the_own_origin_is_let_in(pocket_server: Running, http: httpx.Client) -> None:
    port = port_of(pocket_server)
    for host, origin in (
        (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"),
        (f"LOCALHOST:{port}", f"http://localhost:{port}"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        (f"[::1]:{port}", f"http://[::1]:{port}"),
    ):
        found = http.get("/v1/models", headers={"host": host, "origin": origin})
        assert found.status_code == 200, (host, origin)


def test_a_proxy_on_this_machine_may_say_https(http: httpx.Client) -> None:
    said = {"host": "localhost", "x-forwarded-proto": "https"}
    for origin, status in (("https://localhost", 200), ("http://localhost", 403)):
        found = http.get("/v1/models", headers={**said, "origin": origin})
        assert found.status_code == status


@pytest.mark.finding(13)
@pytest.mark.parametrize(
    "host",
    [
        "[::1]evil", "[::1]:", "[::1]:80:80", "[::1].evil.example", "::1", "localhost.", "localhost:",
        "localhost:99999", "127.0.0.1:-1", "127.0.0.1/", "evil@127.0.0.1", "127.0.0.1@evil",
        "127.0.0.1,evil", "127.0.0.1 evil", "[::1", "evil.example",
    ],
)  # fmt: skip
def test_a_host_is_read_to_its_last_character(http: httpx.Client, host: str) -> None:
    found = http.get("/v1/models", headers={"host": host})
    assert is_error(found, 421)


def test_clients_without_keys_are_counted_by_their_address() -> None:
    for peer, name in (
        ("127.0.0.1", "local"),
        ("127.9.9.9", "local"),
        ("::1", "local"),
        ("::ffff:127.0.0.1", "local"),
        ("", "local"),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
    ):
        assert guards._count_as(peer) == name


def test_a_client_cannot_choose_its_address(http: httpx.Client, pocket_server: Running) -> None:
    http.get("/v1/models", headers={"x-forwarded-for": "192.0.2.1", "forwarded": "for=192.0.2.1"})
    assert not any("192.0.2.1" in line for line in list(pocket_server.lines))


# --- status codes --------------------------------------------------------------------------------


@pytest.mark.finding(10)
@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt":"x","model":"\ud800"}',
        rb'{"prompt":"x","size":"\udfff"}',
        rb'{"prompt":"x\ud800"}',
        rb'{"prompt":"x","user":"\ud83d"}',
        rb'{"prompt":"x","output_format":"\ud83d\ud83d"}',
        rb'{"prompt":"x","\ud800":1}',
        b'{"prompt":"\xed\xa0\x80"}',
    ],
)
def test_half_of_a_surrogate_pair_in_a_body(http: httpx.Client, body: bytes) -> None:
    assert is_error(http.post(GENERATIONS, content=body, headers=JSON), 400)


@pytest.mark.finding(10)
def test_half_of_a_surrogate_pair_elsewhere(http: httpx.Client) -> None:
    raw = b"\xed\xa0\x80"
    for path in ("/v1/models/%ED%A0%80", "/v1/jobs/%ED%A0%80", "/v1/models?x=%ED%A0%80", "/%FF"):
        assert is_error(http.get(path), 400)
    named: Any = {b"idempotency-key": raw}
    assert is_error(http.post(GENERATIONS, json=SMALL, headers=named), 400)
    kind: Any = {b"content-type": b"text/" + raw}
    host: Any = {b"host": raw}
    assert is_error(http.post(GENERATIONS, content=b"{}", headers=kind), 415)
    assert is_error(http.get("/v1/models", headers=host), 421)


@pytest.mark.finding(10)
@pytest.mark.parametrize("digits", [3, 100, 5000])
def test_a_long_number_of_a_picture(http: httpx.Client, digits: int) -> None:
    asked = {"prefer": "respond-async"}
    job = http.post(GENERATIONS, json=SMALL, headers=asked).headers["location"]
    for digit in "90":
        assert is_error(http.get(f"{job}/pictures/{digit * digits}"), 404)
    assert is_error(http.get(f"{job}/pictures/%D9%A0"), 404)  # a digit, though none of ours


@pytest.mark.finding(10)
@pytest.mark.parametrize("name", [b"", b"x" * 257, b"x" * 5000, b"a\x80b", b"a\tb", b"\xff"])
def test_an_idempotency_key_that_cannot_be(http: httpx.Client, name: bytes) -> None:
    asked: Any = {b"idempotency-key": name}
    found = http.post(GENERATIONS, json=SMALL, headers=asked)
    assert is_error(found, 400)
    assert found.json()["error"]["code"] == "invalid_value"
    assert found.json()["error"]["param"] == "Idempotency-Key"


def test_an_idempotency_key_used_again_for_another_request_is_409(http: httpx.Client) -> None:
    named = {"idempotency-key": "one ~ key"}
    assert http.post(GENERATIONS, json={**SMALL, "seed": 1}, headers=named).status_code == 200
    found = http.post(GENERATIONS, json={**SMALL, "seed": 2}, headers=named)
    assert is_error(found, 409)
    assert found.json()["error"]["code"] == "idempotency_key_reused"


def test_what_is_not_http_is_answered_in_the_same_shape(pocket_server: Running) -> None:
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 3000 + b"\r\n"
    for text, status in ((b"NONSENSE\r\n\r\n", b" 400 "), (many, b" 431 ")):
        with socket.create_connection(("127.0.0.1", port_of(pocket_server)), timeout=5) as one:
            one.sendall(text)
            answer = b""
            try:
                while data := one.recv(65536):
                    answer += data
            except ConnectionResetError:  # it did not read all of it
                pass
        head, _, body = answer.partition(b"\r\n\r\n")
        assert status in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_headers_are_counted_for_each_request(http: httpx.Client) -> None:
    for _ in range(60):
        assert http.get("/healthz").status_code == 200


# --- paths of the server -------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[str]:
    from danqing.serve import privacy  # later than the findings: they must fail before it

    privacy.hide(tmp_path)
    yield f"{tmp_path}/models/secret.safetensors"
    privacy._hidden.clear()
    privacy._roots.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        lambda path: OutputError("the journal cannot be written", seen=f"{path}: disk is full"),
        lambda path: CheckpointDamagedError(f"{path} is damaged", seen=path, hint=f"see {path}"),
        lambda path: DeviceFailedError("the device failed", seen=f"see {path}"),
        lambda path: DanqingError("unknown", seen=f"FileNotFoundError: '{path}'"),
        lambda path: RequestError("wrong", seen=path, allowed=f"not ({path})", hint=f"`{path}`"),
    ],
    ids=["journal", "weights", "device", "unknown", "request"],
)
def test_no_error_names_a_path_of_the_server(error: Any, secret: str) -> None:
    problem = error(secret)
    for told in (
        json.dumps(answers.describe_error(problem, "req_1")[1]),
        answers.error_event(problem, "job_1").decode(),
    ):
        assert secret not in told
        assert "secret" not in told
        assert os.path.dirname(secret) not in told  # noqa: PTH120
    if not isinstance(problem, RequestError):
        assert "req_1" in answers.describe_error(problem, "req_1")[1]["error"]["message"]


def test_a_record_names_the_model_as_it_is_served(secret: str) -> None:
    from danqing.serve import privacy

    model = {"name": "a", "path": secret, "components": {"vae": secret}, "fingerprint": "f"}
    record = {"provenance": {"model": model, "dtype": "x"}, "notes": [f"read {secret}"]}
    told = privacy.public_record(record, "served")
    assert told["provenance"]["model"]["path"] == "served"
    assert told["provenance"]["model"]["components"] == {"vae": "secret.safetensors"}
    assert os.path.dirname(secret) not in json.dumps(told)  # noqa: PTH120
    assert model["path"] == secret


def test_a_full_disk_is_told_without_the_journals_path(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from danqing.serve.app import make_app
    from danqing.serve.journal import Journal
    from danqing.serve.metrics import Metrics

    journal = Journal(tmp_path / "journal.db")

    def full(_: Any) -> None:
        raise OutputError("the journal cannot be written", seen=f"{journal.place}: disk is full")

    journal.accept = full  # type: ignore[method-assign, assignment]
    service = make_service(FakeRunner(), journal=journal)
    app: Any = guards.Guard(make_app(service, Metrics()), guards.Rules())
    try:
        found = TestClient(app).post(GENERATIONS, json={"prompt": "x"})
    finally:
        service.close()
    assert is_error(found, 507)
    assert str(tmp_path) not in found.text
    assert found.headers["x-request-id"] in found.json()["error"]["message"]


@pytest.mark.finding(10)
def test_an_unknown_failure_is_told_by_its_id_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    from danqing.serve.app import make_app
    from danqing.serve.metrics import Metrics

    runner = FakeRunner()

    def fail(*_: Any) -> Any:
        raise ValueError("/home/somebody/secret")

    service = make_service(runner)
    monkeypatch.setattr(type(runner.spec), "resolve", fail)
    app: Any = guards.Guard(make_app(service, Metrics()), guards.Rules())
    try:
        client = TestClient(app, raise_server_exceptions=False)
        found = client.post(GENERATIONS, json={"prompt": "x"})
    finally:
        service.close()
    assert is_error(found, 500)
    assert "secret" not in found.text
    assert found.headers["x-request-id"] in found.json()["error"]["message"]
    assert "secret" in caplog.text


def test_no_answer_names_where_the_weights_are(deepgen: Path, deepgen_server: Running) -> None:
    body = {**SMALL, "num_inference_steps": 1}
    with httpx.Client(base_url=deepgen_server.address, timeout=60) as client:
        texts = [
            client.post(GENERATIONS, json=body).text,
            client.post(GENERATIONS, json={**body, "stream": True}).text,
            *(client.get(path).text for path in ("/v1/models", "/openapi.json", "/metrics")),
        ]
    assert "fingerprint" in texts[0]
    for text in texts:
        for root in (deepgen, deepgen.parent, deepgen.parent.parent):
            assert str(root) not in text


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.finding(3)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_larger_than_a_mebibyte_is_refused(http: httpx.Client, chunked: bool) -> None:
    data = b'{"prompt":"x"}' + b" " * (2 << 20)
    content: Any = (data[i : i + 65536] for i in range(0, len(data), 65536)) if chunked else data
    found = http.post(GENERATIONS, content=content, headers=JSON)
    assert is_error(found, 413)
    assert found.json()["error"]["code"] == "body_too_large"


def test_a_body_as_large_as_it_may_be_is_refused_at_once(http: httpx.Client) -> None:
    for body in (b"{" + b'"a":1,' * 150_000 + b'"b":1}', b'{"prompt":' + b"[" * 1_000_000):
        start = time.perf_counter()
        assert is_error(http.post(GENERATIONS, content=body, headers=JSON), 400)
        assert time.perf_counter() - start < 0.5


@pytest.mark.finding(3)
def test_chunks_of_one_byte_are_cut_off(pocket_server: Running) -> None:
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection(("127.0.0.1", port_of(pocket_server)), timeout=20) as one:
        start = time.perf_counter()
        try:
            one.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n")
            one.sendall(b"1\r\nx\r\n" * 1_000_000)
            while one.recv(65536):
                pass
        except OSError:
            pass
        assert time.perf_counter() - start < 3
