"""`danqing plan`: what a run would do, before anything is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from danqing.cli import app
from tests import sparse

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-schnell of real size, of which only the headers exist."""
    return sparse.write_diffusers(tmp_path_factory.mktemp("plan") / "flux")


def plan(place: Path | str, *options: str) -> dict[str, object]:
    ran = invoke("plan", "-m", place, "--device", "cpu", "--json", *options)
    assert ran.exit_code == 0, ran.output
    return dict(json.loads(ran.stdout)["plan"])


def test_a_whole_flux_in_four_gibibytes(flux: Path) -> None:
    found = plan(flux, "--memory", "4GiB", "--size", "512x512", "--dtype", "bfloat16")
    parts = {part["name"]: part for part in found["components"]}  # type: ignore[attr-defined]
    assert found["placement"] == "streamed"
    assert parts["transformer"]["placement"] == "streamed"
    assert parts["transformer"]["blocks"] == 57
    assert parts["text_encoder_2"]["placement"] == "streamed"
    assert max(found["peak_bytes"].values()) < 4 * GIB  # type: ignore[attr-defined]
    assert set(found["seconds"]) == {"encode", "denoise", "decode"}  # type: ignore[call-overload]


def test_limits_make_the_plan(flux: Path) -> None:
    """Everything stays where there is room; the modulations are never held while steps run."""
    places = {
        limit: plan(flux, "--memory", limit, "--dtype", "bfloat16")["placement"]
        for limit in ("64GiB", "30GiB", "8GiB")
    }
    assert places == {"64GiB": "resident", "30GiB": "staged", "8GiB": "streamed"}


def test_a_picture_too_large_to_decode_whole_gets_tiles(flux: Path) -> None:
    options = ("--memory", "5GiB", "--dtype", "bfloat16")
    assert plan(flux, *options, "--size", "512x512")["tile"] == 0
    tile = plan(flux, *options, "--size", "2048x2048")["tile"]
    assert isinstance(tile, int)
    assert 256 <= tile < 2048


def test_what_cannot_fit_says_what_would(flux: Path) -> None:
    ran = invoke("plan", "-m", flux, "--device", "cpu", "--memory", "900MiB")
    assert ran.exit_code == 5
    assert "GiB would do" in ran.output
    ran = invoke(
        "plan", "-m", flux, "--device", "cpu", "--memory", "8GiB", "--placement", "resident"
    )
    assert ran.exit_code == 5
    assert "--placement streamed would take" in ran.output


def test_the_table(flux: Path) -> None:
    ran = invoke("plan", "a cat", "-m", flux, "--device", "cpu", "--memory", "6GiB")
    for word in ("placement", "streamed", "transformer", "beside weights", "at the most", "decode"):
        assert word in ran.output
    assert list(flux.rglob("*.part")) == []


def test_the_pocket_model_measures_nothing() -> None:
    assert plan("pocket")["seconds"] == {}


def test_generate_follows_the_plan(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    options = ("--device", "cpu", "--seed", "1", "-o", picture, "--size", "128x128")
    ran = invoke("generate", "a boat", *options, "--json", "--placement", "streamed")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["provenance"]["placement"] == "streamed"
    ran = invoke("generate", "a boat", *options, "--memory", "many")
    assert ran.exit_code == 2
    assert "invalid memory" in ran.output
