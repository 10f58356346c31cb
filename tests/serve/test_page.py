"""The page in a real browser: what people do with it, no complaint, and nobody else is asked."""

from __future__ import annotations

import io
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from danqing.serve.page_words import LANGUAGES, WORDS
from tests.serve.conftest import serving, until

pytest.importorskip("gradio")

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serve.conftest import Running

pytestmark = [pytest.mark.enable_socket, pytest.mark.timeout(300)]


def test_every_word_is_there_in_both_languages() -> None:
    import string

    for name, texts in WORDS.items():
        assert len(texts) == len(LANGUAGES), name
        fields = [{f for _, f, _, _ in string.Formatter().parse(text) if f} for text in texts]
        assert fields[0] == fields[1], name


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("--device", "cpu") as running:
        yield running


class Tab:
    """A tab of Chromium, and all it complained about and asked for."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#prompt textarea")
        self.page.wait_for_function("document.querySelector('#corner').innerText.includes('cpu')")

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        assert "CI" not in os.environ, "CI has a browser: make tools installs it"
        pytest.skip("chromium is not installed: make tools")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def tab(server: Running, browser: Any) -> Iterator[Tab]:
    found = Tab(browser, server.address, viewport={"width": 1280, "height": 900})
    yield found
    assert found.complaints == []
    others = [one for one in found.asked if not one.startswith((server.address, "data:", "blob:"))]
    assert others == []
    found.page.close()


def pictures(tab: Tab) -> int:
    return int(tab.page.locator("#gallery button img").count())


def test_paint_choose_again_compare(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    page.fill("#prompt textarea", "a red circle")
    page.fill("#seed input", "5")
    page.keyboard.press("Tab")
    page.focus("#prompt textarea")
    page.keyboard.press("Enter")  # from the keyboard
    page.wait_for_selector("#gallery button img")
    page.wait_for_function("document.querySelector('#state').innerText.startsWith('1 in')")
    assert page.input_value("#seed input") != "5"  # another is drawn for the next
    page.locator("#gallery button:has(img)").first.click()
    page.wait_for_function("document.querySelector('#record').innerText.includes('pixels_sha256')")
    page.click("#left")
    page.click("#again")
    page.wait_for_function("document.querySelector('#seed input').value === '5'")
    assert page.is_checked("#lock input")
    page.click("#paint")
    page.wait_for_function("document.querySelectorAll('#gallery img').length >= 2")
    page.wait_for_function("document.querySelector('#state').innerText.startsWith('1 in')")
    page.click("#right")
    page.wait_for_selector("#compared img")
    page.wait_for_function("document.querySelector('#measures').innerText.length > 3")
    assert "identical pixels" in page.inner_text("#measures")
    page.screenshot(path=tmp_path / "compared.png", full_page=True)


def test_the_file_that_is_shown_carries_its_record(
    tab: Tab, server: Running, tmp_path: Path
) -> None:
    from danqing.pictures import read_record

    page = tab.page
    page.fill("#prompt textarea", "a blue square")
    page.click("#paint")
    page.wait_for_selector("#gallery button img")
    address = page.locator("#gallery img").first.get_attribute("src")
    place = tmp_path / "shown.png"
    place.write_bytes(httpx.get(address).content)
    assert Image.open(place).size == (128, 128)
    assert read_record(place)["request"]["prompt"] == "a blue square"


def test_cancel_by_a_key(tab: Tab) -> None:
    page = tab.page
    page.fill("#prompt textarea", "a long work")
    page.fill("input[aria-label*='Steps']", "100")
    page.fill("input[aria-label*='Width']", "512")
    page.fill("input[aria-label*='Height']", "512")
    page.keyboard.press("Tab")
    page.click("#paint")
    page.wait_for_selector("#state progress")
    page.wait_for_selector("#preview img")  # what it will look like
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('#state').innerText.includes('Cancelled')")
    assert pictures(tab) == 0


def test_languages_and_a_telephone(browser: Any, server: Running, tmp_path: Path) -> None:
    phone = Tab(
        browser, server.address, viewport={"width": 390, "height": 844}, locale="zh-CN",
        is_mobile=True, has_touch=True, device_scale_factor=2,
    )  # fmt: skip
    page = phone.page
    page.get_by_text("提示词", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.fill("#prompt textarea", "a red circle")
    page.click("#paint")
    page.wait_for_function("document.querySelector('#state').innerText.includes('完成 1 张')")
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    page.locator("#language label", has_text="English").click()
    page.get_by_text("Prompt", exact=True).wait_for()
    assert page.get_by_text("提示词").count() == 0
    assert phone.complaints == []
    page.close()


def test_an_error_is_shown(tab: Tab) -> None:
    tab.page.fill("#prompt textarea", " ")
    tab.page.click("#paint")
    tab.page.wait_for_selector("#state [role=alert]")
    assert "prompt is empty" in tab.page.inner_text("#state")


@pytest.mark.slow
def test_editing_on_the_page(deepgen: Path, browser: Any, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(image)
    with serving("--device", "cpu", "-m", deepgen, "--dtype", "float32") as server:
        tab = Tab(browser, server.address, viewport={"width": 1280, "height": 900})
        tab.page.fill("#prompt textarea", "make it blue")
        tab.page.fill("input[aria-label*='Steps']", "2")
        tab.page.set_input_files("#images input[type=file]", image)
        tab.page.wait_for_selector("#images img")
        tab.page.click("#paint")
        tab.page.wait_for_selector("#gallery button img")
        tab.page.locator("#gallery button:has(img)").first.click()
        tab.page.wait_for_function("document.querySelector('#record').innerText.includes('image')")
        assert tab.complaints == []
        tab.page.close()


@pytest.mark.parametrize(
    ("place", "said"),
    [("http://127.0.0.1:9/x.png", "not opened"), ("/etc/hostname", "not in the upload folder")],
)
def test_neither_addresses_nor_other_files_are_opened(
    place: str, said: str, server: Running
) -> None:
    """Gradio's own way in takes a picture's address, or a file's name."""
    accepted = len([row for row in server.logs() if row["event"] == "accepted"])
    config = httpx.get(f"{server.address}/page/config").json()
    painting = next(one for one in config["dependencies"] if len(one["inputs"]) > 10)
    kinds = {one["id"]: one["type"] for one in config["components"]}
    data: list[Any] = []
    for number in painting["inputs"]:
        picture = {"path": place, "meta": {"_type": "gradio.FileData"}}
        known = {"gallery": [{"image": picture, "caption": None}], "textbox": "x", "slider": 64}
        data.append(known.get(kinds[number]))
    body = {"data": data, "fn_index": painting["id"], "session_hash": "abc", "trigger_id": 1}
    joined = httpx.post(f"{server.address}/page/gradio_api/queue/join", json=body)
    assert joined.status_code == 200
    answer = httpx.get(
        f"{server.address}/page/gradio_api/queue/data", params={"session_hash": "abc"}, timeout=20
    )
    assert '"success":false' in answer.text
    assert said in answer.text or "Invalid" in answer.text
    assert len([row for row in server.logs() if row["event"] == "accepted"]) == accepted


def ask_page(address: str, session: str, fields: dict[str, Any], **options: Any) -> httpx.Response:
    """Press the button as the page does, in a session that the client names."""
    config = httpx.get(f"{address}/page/config", **options).json()
    painting = next(one for one in config["dependencies"] if len(one["inputs"]) > 10)
    kinds = {one["id"]: one for one in config["components"]}
    data: list[Any] = []
    for number in painting["inputs"]:
        component = kinds[number]
        props = component["props"]
        name = props.get("elem_id") or props.get("label")
        data.append(fields.get(name, props.get("value")))
    body = {"data": data, "fn_index": painting["id"], "session_hash": session, "trigger_id": 1}
    return httpx.post(f"{address}/page/gradio_api/queue/join", json=body, **options)


LONG = {"prompt": "a long work", "Steps": 100, "Pictures": 10, "Width": 512, "Height": 512}


@pytest.mark.finding(8)
def test_a_client_has_its_limit_in_however_many_sessions(tmp_path: Path) -> None:
    """Sessions are named by the browser; jobs of the page and of the API count together."""
    with serving("--device", "cpu", "--per-client", 3) as server:
        for number in range(12):
            assert ask_page(server.address, f"session{number}", LONG).status_code == 200
        until(lambda: load(server) == 3)
        found = httpx.post(f"{server.address}/v1/images/generations", json={"prompt": "x"})
        assert found.status_code == 429
        time.sleep(1)
        assert load(server) == 3
        assert {row["client"] for row in server.logs() if row["event"] == "accepted"} == {"local"}


def load(server: Running) -> int:
    found = httpx.get(f"{server.address}/readyz").json()
    return int(found["queue"]) + int(found["running"])


@pytest.mark.finding(8)
def test_a_session_belongs_to_the_client_that_began_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("anna 0123456789abcdef-anna\neve 0123456789abcdef-evee\n")
    anna: dict[str, Any] = {"auth": ("x", "0123456789abcdef-anna")}
    eve: dict[str, Any] = {"auth": ("x", "0123456789abcdef-evee"), "timeout": 20}
    with serving("--device", "cpu", "--api-key-file", keys) as server:
        assert ask_page(server.address, "annas", LONG, **anna).status_code == 200
        until(lambda: load(server) == 1)
        api = f"{server.address}/page/gradio_api"
        body = {"session_hash": "annas", "fn_index": 0, "event_id": "x", "data": []}
        for path in ("queue/join", "cancel", "reset", "run/predict"):
            assert httpx.post(f"{api}/{path}", json=body, **eve).status_code == 403, path
        for path in ("queue/data?session_hash=annas", "heartbeat/annas"):
            assert httpx.get(f"{api}/{path}", **eve).status_code == 403, path
        assert load(server) == 1
        png = io.BytesIO()
        Image.new("RGB", (8, 8)).save(png, "PNG")
        [path] = httpx.post(f"{api}/upload", files={"files": png.getvalue()}, **anna).json()
        assert httpx.get(f"{api}/file={path}", **anna).status_code == 200


def test_what_the_page_does_not_need_is_not_there(server: Running) -> None:
    api = f"{server.address}/page/gradio_api"
    for path in ("info", "proxy=http://127.0.0.1:1/", "runs", "call/x/y", "openapi.json", "x"):
        assert httpx.get(f"{api}/{path}").status_code == 404, path
    for path in ("call/x", "api/predict", "process_recording", "vibe-edit", "component_server"):
        assert httpx.post(f"{api}/{path}", json={}).status_code == 404, path


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"[" * 100_000, b'{"session_hash":"a","data":[' + b"[" * 50_000,
        b'{"session_hash":"a","fn_index":"\\ud800","data":[]}', b'{"session_hash":7,"data":[]}',
        b'{"session_hash":"../x","data":[]}', b'{"session_hash":"a","fn_index":{"a":[[]]},"data":7}',
        b'{"session_hash":"a","data":[' + b"[]," * 60_000 + b'1],"fn_index":1}',
        b'{"session_hash":"a","data":[],"fn_index":100000}', b" " * 300_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_bodies_that_the_page_never_sends(server: Running, body: bytes) -> None:
    for path in ("queue/join", "cancel", "run/predict"):
        found = httpx.post(
            f"{server.address}/page/gradio_api/{path}", content=body,
            headers={"content-type": "application/json"}, timeout=20,
        )  # fmt: skip
        assert 400 <= found.status_code < 500 or found.status_code == 200, (path, found.text)
        assert "Traceback" not in found.text
        assert "/tmp" not in found.text


def test_uploads_are_images_with_names_of_the_server(server: Running) -> None:
    address = f"{server.address}/page/gradio_api/upload"
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    for name in ("../../etc/passwd", "a\n.png", "x" * 3000, "<b>.svg"):
        [path] = httpx.post(address, files={"files": (name, png.getvalue())}).json()
        assert path.endswith("/image.png"), path
        assert not {"etc", "svg"} & set(path.split("/"))
    for data in (b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0", b"MZ" * 100):
        found = httpx.post(address, files={"files": ("a.png", data)})
        assert found.status_code == 400, found.text


def test_uploads_have_a_quota(tmp_path: Path) -> None:
    from danqing.errors import BusyError, RequestError
    from danqing.serve.uploads import Quota, Uploads

    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    request = httpx.Request("POST", "http://x", files={"files": ("a.png", png.getvalue())})
    body, kind = bytearray(request.read()), request.headers["content-type"]
    uploads = Uploads(tmp_path, Quota(files=3, all_files=5))
    mine = [uploads.take(body, kind, "anna")[0] for _ in range(5)]
    assert [path in uploads for path in mine] == [False, False, True, True, True]
    assert len(list(tmp_path.glob("*/*"))) == 3  # the oldest made room
    assert uploads.read(mine[-1], "anna") == png.getvalue()
    for path, client in ((mine[-1], "eve"), (mine[0], "anna"), ("/etc/passwd", "anna")):
        with pytest.raises(RequestError, match="not here"):
            uploads.read(path, client)
    uploads.take(body, kind, "eve")
    uploads.take(body, kind, "eve")
    with pytest.raises(BusyError):
        uploads.take(body, kind, "eva")
    small = Uploads(tmp_path / "b", Quota(bytes=len(png.getvalue()) * 2, file_bytes=len(body)))
    for _ in range(5):
        small.take(body, kind, "anna")
    assert len(list((tmp_path / "b").glob("*/*"))) == 2
    with pytest.raises(RequestError, match="too large"):
        Uploads(tmp_path, Quota(file_bytes=10)).take(body, kind, "anna")


def test_files_of_the_server_are_not_handed_out(server: Running) -> None:
    for place in ("/etc/passwd", "/proc/self/environ", os.path.abspath(__file__)):  # noqa: PTH100
        found = httpx.get(f"{server.address}/page/gradio_api/file={place}")
        assert found.status_code in {403, 404}, place


def test_a_page_behind_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef-key\n")
    with serving("--device", "cpu", "--api-key-file", keys) as server:
        asked = httpx.get(f"{server.address}/page/")
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"].startswith("Basic")
        found = httpx.get(f"{server.address}/page/", auth=("me", "0123456789abcdef-key"))
        assert found.status_code == 200
        large = io.BytesIO(bytes(65 << 20))
        upload = httpx.post(
            f"{server.address}/page/gradio_api/upload", files={"files": large},
            auth=("me", "0123456789abcdef-key"),
        )  # fmt: skip
        assert upload.status_code == 413
