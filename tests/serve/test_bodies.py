"""Bodies are read as the standards say, and no further than the first fault."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, create_model

from danqing.errors import NoEffectError, RequestError, UnknownSettingError
from danqing.request import Request
from danqing.serve import bodies
from danqing.serve.bodies import EditBody, GenerationBody
from danqing.serve.form_body import read_form, split_form
from danqing.serve.json_body import read_object

NAMES = sorted(GenerationBody.model_fields)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


@given(
    st.dictionaries(st.sampled_from(NAMES), SCALARS),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
)
@settings(max_examples=300, deadline=None)
def test_flat_objects_are_read_as_json_reads_them(
    body: dict[str, Any], ascii_only: bool, indent: Any
) -> None:
    try:
        data = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:
        return
    if any(isinstance(value, str) and not _is_unicode(value) for value in body.values()):
        with pytest.raises(RequestError, match="surrogate"):
            read_object(data, GenerationBody)
        return
    assert read_object(data, GenerationBody) == {name: whole(value) for name, value in body.items()}


@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\\\n truefalsn0123456789.eE+-u', max_size=60).map(str.encode)
)
@settings(max_examples=1000, deadline=None)
def test_what_is_not_json_is_never_taken(data: bytes) -> None:
    data = b'{"prompt":' + data
    try:
        found = read_object(data, GenerationBody)
    except RequestError:
        return
    assert found == {name: whole(value) for name, value in json.loads(data).items()}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"nonsense":1', UnknownSettingError),
        ('{"prompt":"a","prompt":"b"}', RequestError),
        ('{"prompt":NaN}', RequestError),
        ('{"prompt":-Infinity}', RequestError),
        ('{"n":01}', RequestError),
        ('{"n":' + "9" * 5000 + "}", RequestError),
        ('{"prompt":["a"]}', RequestError),
        ('{"prompt":{"a":1}}', RequestError),
        ('{"prompt":"a"}{', RequestError),
        ('{"prompt":"a",}', RequestError),
        ('\ufeff{"prompt":"a"}', RequestError),
        ('{"prompt":"a\nb"}', RequestError),
        ("[]", RequestError),
        ("", RequestError),
    ],
)
def test_the_first_fault_ends_it(text: str, kind: type) -> None:
    with pytest.raises(RequestError) as caught:
        read_object(text.encode(), GenerationBody)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "unit",
    [
        b'"a":1,', b'"prompt":[],', b'"n":1e999,', b'"n":1.5,', b'"prompt":"\\u0041",', b'"":"",',
        b'"prompt":"', b"[", b'{"a":', b" ", b"9", b"\\u0041", b"\xf0\x9f\x92\xa9", b'"n":-0.0e-0,',
    ],
)  # fmt: skip
def test_a_mebibyte_of_anything_takes_no_time(unit: bytes) -> None:
    for start in (b"{", b'{"prompt":"', b'{"n":', b""):
        data = start + unit * ((1 << 20) // len(unit))
        begin = time.perf_counter()
        with pytest.raises(RequestError) as caught:
            read_object(data, GenerationBody)
        assert time.perf_counter() - begin < 0.25
        assert len(str(caught.value)) < 2000


# --- forms -------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes], edge: str = "edge") -> bytes:
    found = [
        f"--{edge}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data
        for head, data in parts
    ]
    return b"\r\n".join([*found, f"--{edge}--\r\n".encode()])


FORM = "multipart/form-data; boundary=edge"
FILE = 'name="image"; filename="a.png"'


def test_a_form_of_httpx_is_read() -> None:
    import httpx

    asked = httpx.Request(
        "POST", "http://x",
        data={"prompt": "夏 a\r\nb", "n": "2"}, files=[("image[]", ('ä".png', b"\r\n--x"))] * 2,
    )  # fmt: skip
    fields, files = read_form(asked.read(), asked.headers["content-type"], EditBody)
    assert fields == {"prompt": "夏 a\r\nb", "n": "2"}
    assert [bytes(one) for one in files] == [b"\r\n--x"] * 2


@given(
    st.lists(
        st.tuples(st.sampled_from([FILE, 'name="prompt"']), st.binary(max_size=50)), max_size=8
    ),
    st.text(alphabet="abcXYZ019'()+_,-./:=?", min_size=1, max_size=70),
)
@settings(max_examples=200, deadline=None)
def test_parts_come_back_as_they_were(parts: list[tuple[str, bytes]], edge: str) -> None:
    if any(b"\r\n--" + edge.encode() in b"\r\n" + data for _, data in parts):
        return
    data = form(*parts, edge=edge)
    found = split_form(bytearray(data), f'multipart/form-data; boundary="{edge}"')
    assert [bytes(one.data) for one in found] == [data for _, data in parts]
    assert [one.is_file for one in found] == [head == FILE for head, _ in parts]


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_form_or_an_error(junk: bytes, start: int, stop: int) -> None:
    data = form((FILE, b"x"), ('name="prompt"', b"y"))
    for body in (junk, data[:start] + junk + data[stop:]):
        with contextlib.suppress(RequestError):
            read_form(body, FORM, EditBody)


@pytest.mark.parametrize(
    ("parts", "kind", "setting"),
    [
        ([], RequestError, "image"),
        ([(FILE, b"x")] * 9, RequestError, "image"),
        ([(FILE, b"x"), ('name="mask"; filename="m"', b"x")], NoEffectError, "mask"),
        ([(FILE, b"x"), ('name="nonsense"', b"x")], UnknownSettingError, "nonsense"),
        ([(FILE, b"x"), ('name="prompt"; filename="m"', b"x")], RequestError, "prompt"),
        ([(FILE, b"x"), ('name="prompt"', b"x"), ('name="prompt"', b"x")], RequestError, "prompt"),
        ([('name="image"', b"/etc/passwd")], RequestError, "image"),
        ([(FILE, b"x"), ('name="prompt"', b"\xed\xa0\x80")], RequestError, "prompt"),
        ([(FILE, b"x"), ('name="prompt"', b"x" * 70_000)], RequestError, "prompt"),
        ([(f'name="{"x" * 3000}"', b"x")], UnknownSettingError, "x" * 80),
    ],
)
def test_parts_that_cannot_be(parts: list[tuple[str, bytes]], kind: type, setting: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_form(form(*parts), FORM, EditBody)
    assert type(caught.value) is kind
    assert caught.value.setting == setting
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("start", "unit"),
    [
        (b"--edge\r\n", b"a: b\r\n"),
        (b"--edge\r\n", b"a"),
        (b"", form(('name="prompt"', b""))[:-10]),
        (form((FILE, b""))[:-12], b"\r\n--edg"),
        (form((FILE, b""))[:-12], b"\r\n--edge"),
        (form((FILE, b""))[:-12], b"\r"),
        (b"", b"\r\n"),
    ],
    ids=["headers", "header", "parts", "nearly", "boundaries", "endless", "preamble"],
)
def test_a_form_of_anything_takes_no_time(start: bytes, unit: bytes) -> None:
    body = start + unit * ((60 << 20) // len(unit))
    begin = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        split_form(body, FORM)
    assert time.perf_counter() - begin < 2
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "e" * 71, 'multipart/form-data; boundary="a', "text/plain",
        "multipart/form-data; boundary=ed\u00e4ge", 'multipart/form-data; boundary="a "',
    ],
)  # fmt: skip
def test_boundaries_that_cannot_be(kind: str) -> None:
    with pytest.raises(RequestError, match="boundary"):
        split_form(form((FILE, b"x")), kind)


def test_what_stands_beside_a_boundary_is_passed_over() -> None:
    for kind in (
        "Multipart/Form-Data; charset=utf-8; Boundary=edge",
        'multipart/form-data; boundary="edge"; charset=utf-16',
    ):
        assert len(split_form(form((FILE, b"x")), kind)) == 1
    assert bodies.MAX_FIELDS == 64


# --- settings of a request ---------------------------------------------------------------------


def test_every_setting_is_in_a_body_or_excluded() -> None:
    settings = set(Request.model_fields)
    assert set(bodies.EXCLUDED) < settings
    assert all(bodies.EXCLUDED.values())
    assert settings - set(bodies.EXCLUDED) <= set(EditBody.model_fields)
    assert set(EditBody.model_fields) - set(GenerationBody.model_fields) == {
        "resize", "reference_latent",
    }  # fmt: skip


class Wider(Request):
    strength: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Share of the noise.", json_schema_extra={"needs": "image"}
    )
    sharpness: Annotated[int, Field(ge=0, le=9)] = Field(default=3, description="Of edges.")


def test_a_new_setting_is_in_the_bodies_by_itself() -> None:
    assert "strength" not in bodies.setting_fields(Wider, edits=False)
    body = create_model(
        "WiderBody", __base__=bodies.Body,
        **bodies.setting_fields(Wider, edits=False), **bodies.setting_fields(Wider, edits=True),
    )  # fmt: skip
    fields = body.model_json_schema()["properties"]
    assert fields["strength"] == {
        "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}],
        "default": None, "description": "Share of the noise.", "title": "Strength",
    }  # fmt: skip
    assert fields["sharpness"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 9}
    with pytest.raises(RequestError, match="strength is out of range") as caught:
        bodies.read_body(body, {"prompt": "x", "strength": "2"}, from_json=False)
    assert caught.value.allowed == "0 to 1"
