"""The official client against a server in a process of its own."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from PIL import Image

import danqing
from danqing.pictures import read_record
from tests.serve.conftest import serving, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serve.conftest import Running

pytestmark = pytest.mark.enable_socket
PROMPT = "a red circle"
SMALL: dict[str, Any] = {"prompt": PROMPT, "size": "64x64"}


def client(server: Running, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=60)


def picture_of(text: str | None) -> Image.Image:
    assert text
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_models_are_listed(pocket_server: Running) -> None:
    [model] = client(pocket_server).models.list().data
    assert model.id == "pocket"
    more = model.model_extra or {}
    assert more["safety_checker"] == "off"
    assert more["edits"] is False
    assert client(pocket_server).models.retrieve("pocket").id == "pocket"


def test_a_picture_is_the_one_that_the_library_paints(
    pocket_server: Running, tmp_path: Path
) -> None:
    found = client(pocket_server).images.generate(
        **SMALL, n=2, extra_body={"seed": 7, "num_inference_steps": 2}
    )
    assert found.size == "64x64"
    assert found.output_format == "png"
    assert found.usage
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.data
    pictures = [picture_of(one.b64_json) for one in found.data]
    with danqing.open("pocket", device="cpu") as engine:
        again = engine.generate(
            PROMPT, seed=7, num_inference_steps=2, height=64, width=64, num_images_per_prompt=2
        )
    digests = [hashlib.sha256(one.convert("RGB").tobytes()).hexdigest() for one in pictures]
    threads = {one.provenance.device["threads"] for one in again.pictures}
    records = [(one.model_extra or {})["record"] for one in found.data]
    if {record["provenance"]["device"]["threads"] for record in records} == threads:
        assert digests == [one.pixels_sha256 for one in again.pictures]
    place = tmp_path / "one.png"
    place.write_bytes(base64.b64decode(found.data[1].b64_json or ""))
    assert read_record(place) == records[1]
    assert records[1]["request"]["seed"] == 8
    assert records[1]["picture"]["pixels_sha256"] == digests[1]


@pytest.mark.parametrize(("kind", "mode"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(pocket_server: Running, kind: Any, mode: str, tmp_path: Path) -> None:
    sizes = []
    for quality in (10, 95):
        found = client(pocket_server).images.generate(
            prompt=PROMPT, size="256x256", output_format=kind, output_compression=quality
        )
        assert found.data
        data = base64.b64decode(found.data[0].b64_json or "")
        assert Image.open(io.BytesIO(data)).format == mode
        sizes.append(len(data))
        place = tmp_path / f"one.{kind}"
        place.write_bytes(data)
        assert read_record(place)["request"]["prompt"] == PROMPT
    assert sizes[0] < sizes[1]


def test_an_address_instead_of_the_picture(pocket_server: Running) -> None:
    found = client(pocket_server).images.generate(**SMALL, response_format="url")
    assert found.data
    url = found.data[0].url or ""
    assert url.startswith(pocket_server.address)
    answer = httpx.get(url)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    assert httpx.get(url[:-1] + "7").status_code == 404


def test_streaming(pocket_server: Running) -> None:
    kinds, previews, done = [], [], None
    stream = client(pocket_server).images.generate(
        **SMALL, stream=True, partial_images=2, extra_body={"seed": 3, "progress": True}
    )
    for event in stream:
        kinds.append(event.type)
        if event.type == "image_generation.partial_image":
            previews.append((event.partial_image_index, picture_of(event.b64_json).size))
        elif event.type == "image_generation.completed":
            done = event
    assert kinds.count("image_generation.progress") >= 4
    assert previews == [(0, (64, 64)), (1, (64, 64))]
    assert kinds[-1] == "image_generation.completed"
    assert done is not None
    plain = client(pocket_server).images.generate(**SMALL, extra_body={"seed": 3})
    assert plain.data
    assert picture_of(done.b64_json).tobytes() == picture_of(plain.data[0].b64_json).tobytes()


async def _several(server: Running) -> list[Any]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="x") as one:
        return await asyncio.gather(
            *(one.images.generate(**SMALL, extra_body={"seed": seed}) for seed in range(6))
        )


def test_several_at_once(pocket_server: Running) -> None:
    import asyncio

    found = asyncio.run(_several(pocket_server))
    seeds = [(answer.data[0].model_extra or {})["record"]["request"]["seed"] for answer in found]
    assert seeds == list(range(6))


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = [
    ({"prompt": ""}, openai.BadRequestError, "prompt", "invalid_value"),
    ({"prompt": " \n "}, openai.BadRequestError, "prompt", "invalid_value"),
    ({"prompt": "a\x00b"}, openai.BadRequestError, "prompt", "invalid_value"),
    ({"prompt": "x" * 8001}, openai.BadRequestError, "prompt", "invalid_value"),
    ({"model": "dall-e-3"}, openai.NotFoundError, "model", "model_not_found"),
    ({"n": 0}, openai.BadRequestError, "n", "invalid_value"),
    ({"n": 11}, openai.BadRequestError, "n", "invalid_value"),
    ({"n": "2"}, openai.BadRequestError, "n", "invalid_value"),
    ({"size": "huge"}, openai.BadRequestError, "size", "invalid_value"),
    ({"size": "64x4096"}, openai.BadRequestError, "size", "invalid_value"),
    ({"quality": "hd"}, openai.BadRequestError, "quality", "invalid_value"),
    ({"style": "vivid"}, openai.BadRequestError, "style", "unknown_parameter"),
    ({"background": "transparent"}, openai.BadRequestError, "background", "invalid_value"),
    ({"moderation": "low"}, openai.BadRequestError, "moderation", "invalid_value"),
    ({"output_compression": 50}, openai.BadRequestError, "output_compression", "invalid_value"),
    ({"partial_images": 2}, openai.BadRequestError, "partial_images", "invalid_value"),
    ({"extra_body": {"seeed": 1}}, openai.BadRequestError, "seeed", "unknown_parameter"),
    ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed", "invalid_value"),
    ({"extra_body": {"negative_prompt": "x"}}, openai.BadRequestError, "negative_prompt", "no_effect"),
    ({"extra_body": {"guidance_scale": 2}}, openai.BadRequestError, "guidance_scale", "no_effect"),
    ({"extra_body": {"num_inference_steps": 101}}, openai.BadRequestError, "num_inference_steps",
     "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "setting", "code"), ERRORS)
def test_every_error_names_its_parameter(
    pocket_server: Running, given: dict[str, Any], kind: type, setting: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client(pocket_server).images.generate(**{**SMALL, **given})
    assert type(caught.value) is kind
    assert (caught.value.param, caught.value.code) == (setting, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    assert setting in str(caught.value)


def test_a_model_that_does_not_edit_says_so(pocket_server: Running) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(image, "PNG")
    with pytest.raises(openai.BadRequestError, match="pocket does not edit") as caught:
        client(pocket_server).images.edit(image=("a.png", image.getvalue()), prompt="blue")
    assert caught.value.param == "image"


def _png(colour: str, size: tuple[int, int] = (64, 64)) -> tuple[str, bytes, str]:
    image = io.BytesIO()
    Image.new("RGB", size, colour).save(image, "PNG")
    return "a.png", image.getvalue(), "image/png"


def test_editing(deepgen_server: Running) -> None:
    settings: dict[str, Any] = {"prompt": "make it blue", "size": "64x64"}
    settings["extra_body"] = {"num_inference_steps": 2, "seed": 4}
    one = client(deepgen_server).images.edit(image=_png("red"), **settings)
    two = client(deepgen_server).images.edit(image=[_png("red"), _png("green")], **settings)
    same = client(deepgen_server).images.edit(image=[_png("red")], **settings)
    assert one.data
    assert two.data
    assert same.data
    assert one.data[0].b64_json == same.data[0].b64_json or one.usage == same.usage
    assert picture_of(one.data[0].b64_json).tobytes() == picture_of(same.data[0].b64_json).tobytes()
    assert picture_of(one.data[0].b64_json).tobytes() != picture_of(two.data[0].b64_json).tobytes()
    assert one.usage
    assert two.usage
    assert two.usage.input_tokens_details.image_tokens > one.usage.input_tokens_details.image_tokens
    stream = client(deepgen_server).images.edit(
        image=_png("red"), stream=True, partial_images=1, **settings
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"mask": _png("white")}, "mask"),
        ({"image": ("a.png", b"no picture", "image/png")}, "image 1"),
        ({"image": ("a.png", _png("red")[1][:60], "image/png")}, "image 1"),
        ({"image": [_png("red")] * 9}, "image"),
        ({"image": _png("red", (6000, 6000))}, "image 1"),
        ({"input_fidelity": "high"}, "input_fidelity"),
    ],
)
def test_bad_edits(deepgen_server: Running, given: dict[str, Any], setting: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(deepgen_server).images.edit(**{"image": _png("red"), "prompt": "x", **given})
    assert caught.value.param == setting


def test_keys_and_what_is_open(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nanna 0123456789abcdef-anna\n0123456789abcdef-other  # no name\n")
    with serving(
        "--no-page", "--device", "cpu", "--api-key-file", keys, "--per-client", 1
    ) as server:
        for key in ("wrong", "", "0123456789abcdef-ann"):
            with pytest.raises((openai.AuthenticationError, httpx.LocalProtocolError)):
                client(server, key or "x").models.list()
        assert client(server, "0123456789abcdef-anna").models.list().data
        basic = httpx.get(f"{server.address}/v1/models", auth=("x", "0123456789abcdef-other"))
        assert basic.status_code == 200
        assert httpx.get(f"{server.address}/metrics").status_code == 401
        assert httpx.get(f"{server.address}/healthz").status_code == 200
        anna = {"authorization": "Bearer 0123456789abcdef-anna", "prefer": "respond-async"}
        other = {"authorization": "Bearer 0123456789abcdef-other"}
        body = {"prompt": PROMPT, "n": 10, "size": "128x128"}
        asked = httpx.post(f"{server.address}/v1/images/generations", json=body, headers=anna)
        assert asked.status_code == 202
        where = server.address + asked.headers["location"]
        # one job of anna's is what she may have; the other is not in her way, nor sees her job
        with pytest.raises(openai.RateLimitError) as caught:
            client(server, "0123456789abcdef-anna").images.generate(**SMALL)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert httpx.get(where, headers=other).status_code == 404
        assert httpx.delete(where, headers=anna).status_code == 200
        until(lambda: httpx.get(where, headers=anna).json()["status"] == "cancelled")
        assert client(server, "0123456789abcdef-other").images.generate(**SMALL).data
    assert not any(PROMPT in line for line in server.lines)


def test_a_client_that_goes_away_frees_the_device(
    pocket_server: Running, http: httpx.Client
) -> None:
    body = {"prompt": "a long work", "size": "512x512", "num_inference_steps": 100, "n": 4}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/images/generations", json=body, timeout=1.5)
    until(lambda: http.get("/readyz").json()["running"] == 0, 10)
    with http.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        until(lambda: http.get("/readyz").json()["running"] == 1)
        answer.close()
    start = time.monotonic()
    until(lambda: http.get("/readyz").json()["running"] == 0, 10)
    assert time.monotonic() - start < 8
    states = [row["event"] for row in pocket_server.logs() if row.get("job")]
    assert states.count("cancelled") >= 2


def test_jobs_that_are_asked_for_later(http: httpx.Client) -> None:
    named = {"prefer": "respond-async", "idempotency-key": "the-one"}
    body = {**SMALL, "seed": 5}
    first = http.post("/v1/images/generations", json=body, headers=named)
    again = http.post("/v1/images/generations", json=body, headers=named)
    assert first.status_code == again.status_code == 202
    assert first.headers["location"] == again.headers["location"]
    other = http.post("/v1/images/generations", json={**body, "seed": 6}, headers=named)
    assert other.status_code == 409
    until(lambda: http.get(first.headers["location"]).json()["status"] == "done")
    job = http.get(first.headers["location"]).json()
    address = job["result"]["data"][0]["url"]
    assert Image.open(io.BytesIO(http.get(address).content)).size == (64, 64)
    waited = http.post("/v1/images/generations", json=body, headers={"idempotency-key": "the-one"})
    assert waited.json()["job"] == job["id"]


def test_what_is_no_request_of_ours(http: httpx.Client) -> None:
    generate = "/v1/images/generations"
    assert (
        http.post(generate, content=b"{}", headers={"content-type": "text/plain"}).status_code
        == 415
    )
    for body in (b"", b"[1]", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'"x"'):
        answer = http.post(generate, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get(generate).status_code == 405
    assert http.post("/v1/models", json={}).json()["error"]["code"] == "method_not_allowed"
    wrong = http.get("/v1/models", headers={"host": "evil.example"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (421, "wrong_host")
    cross = http.post(generate, json=SMALL, headers={"origin": "https://evil.example"})
    assert (cross.status_code, cross.json()["error"]["code"]) == (403, "cross_origin")
    same = http.get("/v1/models", headers={"origin": str(http.base_url).rstrip("/")})
    assert same.status_code == 200
    for name in ("x-content-type-options", "content-security-policy", "x-request-id"):
        assert same.headers[name]
    assert "access-control-allow-origin" not in same.headers
    large = http.post(
        generate, content=b" " * (65 << 20), headers={"content-type": "application/json"}
    )
    assert large.status_code == 413


def test_a_whole_number_may_have_a_point(http: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    text = b'{"prompt": "a", "size": "64x64", "n": 2.0, "seed": 1e1}'
    found = http.post("/v1/images/generations", content=text, headers=kind).json()
    assert [one["record"]["request"]["seed"] for one in found["data"]] == [10, 11]
    for wrong in (b"1.5", b"1e400", b"1e308"):
        body = text.replace(b"2.0", wrong)
        assert http.post("/v1/images/generations", content=body, headers=kind).status_code == 400


def test_figures(http: httpx.Client) -> None:
    http.post("/v1/images/generations", json=SMALL)
    text = http.get("/metrics").text
    assert 'danqing_pictures_total{model="pocket"}' in text
    assert 'danqing_stage_seconds_bucket{le="0.05",stage="denoise"}' in text
    assert "danqing_queue_depth 0.0" in text
    assert 'danqing_device_memory_bytes{device="cpu",kind="total"}' in text


def test_an_orderly_end() -> None:
    """What runs is finished; what waits is given back; what comes is refused."""
    import threading

    answers: dict[str, Any] = {}
    with serving("--no-page", "--device", "cpu") as server:

        def ask(name: str, **more: Any) -> None:
            try:
                answers[name] = client(server).images.generate(**{**SMALL, **more})
            except openai.APIError as error:
                answers[name] = error

        long = threading.Thread(target=ask, args=("long",), kwargs={"n": 10})
        long.start()
        until(lambda: httpx.get(f"{server.address}/readyz").json()["running"] == 1)
        short = threading.Thread(target=ask, args=("short",))
        short.start()
        until(lambda: httpx.get(f"{server.address}/readyz").json()["queue"] == 1)
        assert server.stop() == 0
        long.join()
        short.join()
    assert len(answers["long"].data) == 10
    assert isinstance(answers["short"], openai.InternalServerError)
    assert answers["short"].status_code == 503
    assert answers["short"].code == "server_not_ready"


def test_bad_command_lines(tmp_path: Path) -> None:
    from tests.conftest import run_danqing

    weak = tmp_path / "weak.txt"
    weak.write_text("short\n")
    for arguments, code, text in (
        (["--host", "0.0.0.0"], 2, "no API key"),
        (["--api-key-file", weak], 2, "invalid API key"),
        (["--api-key-file", tmp_path / "none"], 2, "cannot be read"),
        (["-m", tmp_path], 3, "danqing: error"),
        (["--journal", tmp_path], 7, "journal cannot be used"),
        (["--safety-checker", tmp_path], 3, "no safety checker"),
    ):
        found = run_danqing("serve", "--no-page", *arguments)
        assert found.returncode == code, found.stderr
        assert text in found.stderr
