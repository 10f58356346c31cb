"""`danqing pull` with the real clients against a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from danqing import models
from danqing.errors import RequestError
from danqing.weights import places
from danqing.weights.hubs import RemoteFile
from danqing.weights.pull import choose
from tests import layouts
from tests.conftest import run_danqing
from tests.hub import Hub
from tests.marks import slow_among

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.enable_socket  # the hub listens on this machine's loopback
BIG = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def repository(schnell: Path, schnell_bfl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts, a pickle and a program, as in the release's repository."""
    folder = tmp_path_factory.mktemp("repository") / "toy"
    shutil.copytree(schnell, folder)
    shutil.copy(schnell_bfl / "flux1-toy.safetensors", folder)
    shutil.copy(schnell_bfl / "ae.safetensors", folder)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(20_000))
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04" + bytes(20_000))
    (folder / "modeling.py").write_text("import os")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub(repository) as server:
        yield server


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    return {
        **kept,
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / ".cache"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "MODELSCOPE_CACHE": str(tmp_path / "scope"),
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_ENDPOINT": hub.url,
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }


def pull(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    child = run_danqing("pull", "owner/toy", *options, env=environment)
    assert "Traceback" not in child.stderr
    return child


def same(folder: Path, repository: Path, *paths: str) -> bool:
    return all((folder / p).read_bytes() == (repository / p).read_bytes() for p in paths)


@pytest.mark.parametrize("source", slow_among(["huggingface", "modelscope"], ["modelscope"]))
def test_one_layout_and_only_once(
    hub: Hub, environment: dict[str, str], repository: Path, source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if source == "modelscope":
        pytest.importorskip("modelscope")
    child = pull(environment, "--from", source)
    assert child.returncode == 0, child.stderr
    for name in ("HF_HUB_CACHE", "MODELSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, environment[name])
    folder = models.open_checkpoint("owner/toy").path
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    found = [path for path in found if not path.split("/")[-1].startswith(".")]
    assert same(folder, repository, *found)
    assert BIG in found
    assert not [path for path in found if path.endswith((".bin", ".py", ".fp16.safetensors"))]
    assert "flux1-toy.safetensors" not in found
    assert run_danqing("check", "owner/toy", env=environment).returncode == 0
    sent = dict(hub.sent)
    again = pull(environment, "--from", source)
    assert "all here already" in again.stdout
    assert hub.sent == sent


def test_components_that_the_index_does_not_name(deepgen: Path, tmp_path: Path) -> None:
    """DeepGen's language model and connector are in no index; its program is left where it is."""
    repository = tmp_path / "repository"
    shutil.copytree(deepgen, repository)
    (repository / "prompt_template.json").write_text("{}")
    (repository / "deepgen_pipeline.py").write_text("raise SystemExit")
    files = [
        RemoteFile(path=str(path.relative_to(repository)), size=1, sha256=None)
        for path in repository.rglob("*")
        if path.is_file()
    ]
    chosen = {file.path for file in choose(files, name="x", layout="auto", include=())}
    assert chosen == {file.path for file in files} - {"deepgen_pipeline.py"}


def test_the_clients_own_cache_finds_it(environment: dict[str, str], repository: Path) -> None:
    pull(environment)
    code = (
        "from huggingface_hub import snapshot_download; "
        f"print(snapshot_download('owner/toy', local_files_only=True, allow_patterns=['{BIG}']))"
    )
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True
    )
    from pathlib import Path as _Path

    assert same(_Path(child.stdout.strip()), repository, BIG)


def test_the_bfl_layout(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull(environment, "--layout", "bfl").returncode == 0
    monkeypatch.setenv("HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    checkpoint = models.open_checkpoint("owner/toy")
    assert checkpoint.layout == "BFL files"
    assert not (checkpoint.path / "transformer").exists()


@pytest.mark.slow
def test_killed_at_ten_points_it_goes_on(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk is not fetched again: at most the block the client was about to write."""
    source = tmp_path / "source"
    state = {"x.weight": torch.randn(4000, 4000, generator=torch.Generator().manual_seed(0))}
    file = layouts.save(source / "big.safetensors", state)
    size, block = file.stat().st_size, 10 * 2**20  # of huggingface_hub.constants
    points = random.Random(4)
    command = [sys.executable, "-m", "danqing", "pull", "owner/toy", "-q"]
    kills = 0
    with Hub(source) as hub:
        hub.slow = 0.002
        environment = {**environment, "HF_ENDPOINT": hub.url}
        while kills < 10:
            wanted = sum(hub.sent.values()) + points.randrange(1, size // 5)
            child = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while child.poll() is None and sum(hub.sent.values()) < wanted:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            if child.wait() == 0:  # it was done before its point
                break
            kills += 1
        hub.slow = 0.0
        child_now = run_danqing("pull", "owner/toy", env=environment)
        assert child_now.returncode == 0, child_now.stderr
        sent = sum(hub.sent.values())
    assert kills >= 5
    assert sent < size + kills * 2 * block  # a block in the client, and what the sockets hold
    monkeypatch.setenv("HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    found = places.find("owner/toy") / "big.safetensors"
    assert found.read_bytes() == file.read_bytes()
    assert found.resolve().name == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not list((found.parents[2] / "blobs").glob("*.incomplete"))


def test_a_changed_byte_is_caught(
    hub: Hub, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.corrupt = BIG
    child = pull(environment)
    assert child.returncode == 9
    assert "not what the hub announced" in child.stderr
    monkeypatch.setenv("HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    folder = models.open_checkpoint("owner/toy").path
    assert not (folder / BIG).exists()
    hub.corrupt = ""
    assert pull(environment).returncode == 0


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub, environment: dict[str, str]) -> None:
    hub.cut_after = [10**9] * 3 + [50_000, 20_000]
    assert pull(environment).returncode == 0


TROUBLE: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"status": 401}, "the token is missing"),
    "403": ({"gated": True}, "gated"),
    "404": ({"status": 404}, "owner/toy"),
    "429": ({"status": 429}, "owner/toy"),
    "500": ({"status": 500}, "fault of its own"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_refusals_are_explained(hub: Hub, environment: dict[str, str], kind: str) -> None:
    settings, words = TROUBLE[kind]
    for name, value in settings.items():
        setattr(hub, name, value)
    child = pull(environment)
    assert child.returncode == 9, child.stderr
    assert words in child.stderr
    assert not os.path.exists(environment["HF_HUB_CACHE"])  # noqa: PTH110


def test_no_network(environment: dict[str, str]) -> None:
    child = pull({**environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert child.returncode == 9
    assert "cannot be reached" in child.stderr


def test_dry_run(hub: Hub, environment: dict[str, str]) -> None:
    child = pull(environment, "--dry-run")
    assert child.returncode == 0
    assert "would be fetched" in child.stdout
    assert not hub.sent


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path=path, size=1, sha256=None) for path in paths]


def test_paths_that_leave_the_folder_are_not_taken() -> None:
    rows = files("../../x.safetensors", "/etc/x.json", "a\\..\\b.json", "good.safetensors")
    assert [f.path for f in choose(rows, name="x", layout="auto", include=())] == [
        "good.safetensors"
    ]


def test_which_of_many_must_be_said() -> None:
    rows = files("flux-Q4_0.gguf", "flux-Q8_0.gguf", "README.md")
    with pytest.raises(RequestError, match="say which"):
        choose(rows, name="x", layout="auto", include=())
    chosen = choose(rows, name="x", layout="auto", include=["*Q8_0*"])
    assert [file.path for file in chosen] == ["flux-Q8_0.gguf"]
