"""Headers and indexes as an enemy, or a bad disk, would write them: an error, in bounded time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from danqing.errors import CheckpointError, DanqingError, RequestError
from danqing.request import Request
from danqing.weights import open_checkpoint
from danqing.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
SLOW = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def entries(path: Path, data: bytes) -> Mapping[str, Any] | None:
    path.write_bytes(data)
    try:
        return SafetensorsFile(path).entries
    except CheckpointError:
        return None


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    found = entries(path, SOUND)
    assert found is not None
    with safe_open(path, framework="pt") as file:
        assert set(found) == set(file.keys())
        for name, entry in found.items():
            assert entry.shape == tuple(file.get_slice(name).get_shape())


@SLOW
@given(st.data())
def test_flipped_bytes_are_never_more_than_an_error(tmp_path: Path, data: st.DataObject) -> None:
    spoiled = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    found = entries(path, bytes(spoiled))
    if found is not None:  # what we let pass, the library reads too
        with safe_open(path, framework="pt") as file:
            assert set(found) == set(file.keys())


@SLOW
@given(st.integers(0, len(SOUND) - 1))
def test_every_truncation_is_noticed(tmp_path: Path, length: int) -> None:
    assert entries(tmp_path / "x.safetensors", SOUND[:length]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@SLOW
@given(JSON)
def test_any_json_header(tmp_path: Path, value: Any) -> None:
    text = json.dumps(value).encode()
    found = entries(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text)
    assert not found


@SLOW
@given(JSON)
def test_any_json_for_model_index(tmp_path: Path, value: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(value))
    try:
        open_checkpoint(tmp_path)
    except DanqingError:
        return


@SLOW
@given(st.dictionaries(st.sampled_from([*Request.model_fields, "other"]), JSON, max_size=6))
def test_any_request(values: dict[str, Any]) -> None:
    try:
        request = Request(**values)
    except RequestError:
        return
    assert request.prompt.strip()


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model_index.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
