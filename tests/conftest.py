"""Toy checkpoints, made once for each process of the test run, and ways to call danqing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import danqing
from tests import deepgen_toys, toys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference implementations must not ask a hub either
torch.set_num_threads(1)  # bit-equality is promised for one number of threads

SLOW = (
    "test_simulated.py::test_contract[310P3]",
    "test_simulated.py::test_contract[910A]",
    "test_simulated.py::test_pictures_have_the_cpus_bits[910A]",
    "test_simulated.py::test_what_only_an_npu_has_is_refused_elsewhere[words1",
    "test_simulated.py::test_what_only_an_npu_has_is_refused_elsewhere[words3",
    "test_simulated.py::test_what_only_an_npu_has_is_refused_elsewhere[words4",
    "test_devices.py::test_doctor_survives_a_broken_torch_npu[a crash]",
    "test_devices.py::test_a_broken_torch_npu_is_explained_and_the_cpu_goes_on_painting[no CANN]",
    "test_traces.py::test_from_the_command_line",
    "test_traces.py::test_inside_a_network_a_sample_is_kept",
    "test_traces.py::test_a_trace_of_a_12b_model_stays_small",
    "test_traces.py::test_what_determinism_costs",
    "test_parity.py::test_from_the_command_line",
    "test_parity.py::test_what_cannot_be_a_reference",
    "test_damaged.py::test_a_rule[a million tensors]",
    "test_check.py::test_a_single_component",
    "test_check.py::test_one_faulty_component_among_sound_ones[a pointer]",
    "test_check.py::test_one_faulty_component_among_sound_ones[no vocabulary]",
    "test_check.py::test_one_faulty_component_among_sound_ones[no file]",
    "test_check.py::test_one_faulty_component_among_sound_ones[a pickle]",
    "test_check.py::test_values_that_are_not_finite",
    "test_kernels.py::test_deepgen_paints_on_a_cpu_beside_torch_npu[]",
    "test_interruptions.py::test_a_full_disk",
    "test_interruptions.py::test_signals_in_the_middle_of_denoising[9--9--resident]",
    "test_pull.py::test_one_layout_and_only_once[modelscope]",
    "test_pull.py::test_killed_at_ten_points_it_goes_on",
    "test_convert.py::test_there_and_back_is_the_same_bits[schnell-bfl]",
    "test_convert.py::test_there_and_back_is_the_same_bits[schnell-comfy]",
    "test_convert.py::test_quantised_weights_become_plain_ones",
    "test_convert.py::test_diffusers_opens_what_was_a_comfy_file",
    "test_convert.py::test_int8_keeps_a_byte_of_each_weight_and_the_picture",
    "test_doctor.py::test_text_for_people",
    "test_doctor.py::test_broken_libraries_are_reported[transformers]",
    "test_doctor.py::test_broken_libraries_are_reported[safetensors]",
    "test_doctor.py::test_broken_libraries_are_reported[PIL]",
    "test_deepgen_pt.py::test_adapters_are_merged_as_peft_merges_them[new-module.]",
    "test_deepgen_pt.py::test_adapters_are_merged_as_peft_merges_them[old-]",
    "test_deepgen_pt.py::test_adapters_are_merged_as_peft_merges_them[old-model.module.]",
    "test_paint.py::test_the_suite_as_json",
    "test_hostile.py::test_slow_clients_do_not_starve_others",
    "test_page.py::test_editing_on_the_page",
    "test_simulated.py::test_pictures_have_the_cpus_bits[310P3]",
    "test_devices.py::test_doctor_survives_a_broken_torch_npu[no CANN]",
    "test_doctor.py::test_broken_libraries_are_reported[diffusers]",
    "test_docs.py::test_commands_run[ascend.md]",
    "test_docs.py::test_commands_run[report.md]",
    "test_docs.py::test_commands_run[verify.md]",
    "test_docs.py::test_python_runs[README.zh.md]",
    "test_crashes.py::test_killed_commands_resume[convert]",
    "test_crashes.py::test_killed_pulls_resume[modelscope]",
    "test_journal.py::test_killed_under_load",
    "test_paint.py::test_the_suite_in_a_process",
    "test_surroundings.py::test_every_command_in_an_oddly_named_folder",
    "test_check.py::test_digests_are_kept_until_the_file_changes",
)
"""Tests of ten to forty seconds whose like, quicker or of another case, is in every run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow ones; let tests that share a server run in one process."""
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)
        if "tests/serve/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("serve"))


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="session")
def schnell(toy_home: Path) -> Path:
    return toys.write_diffusers(toy_home / "schnell")


@pytest.fixture(scope="session")
def dev(toy_home: Path) -> Path:
    return toys.write_diffusers(toy_home / "dev", guided=True, seed=1)


@pytest.fixture(scope="session")
def schnell_bfl(schnell: Path, toy_home: Path) -> Path:
    return toys.write_bfl(toy_home / "schnell-bfl", schnell)


@pytest.fixture(scope="session")
def dev_bfl(dev: Path, toy_home: Path) -> Path:
    return toys.write_bfl(toy_home / "dev-bfl", dev)


@pytest.fixture(scope="session")
def deepgen(toy_home: Path) -> Path:
    return deepgen_toys.write(toy_home / "deepgen")


@pytest.fixture(scope="session")
def engine(schnell: Path) -> Iterator[danqing.Engine]:
    with danqing.open(schnell, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="session")
def dev_engine(dev: Path) -> Iterator[danqing.Engine]:
    with danqing.open(dev, device="cpu") as engine:
        yield engine


def run_danqing(
    *arguments: object, cwd: Path | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "danqing", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
        **options,
    )
