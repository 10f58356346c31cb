"""Slots: each family says what its components are for."""

from __future__ import annotations

import importlib

import pytest

from danqing import models
from danqing.models.deepgen import SLOTS
from danqing.models.slots import STAGES, Role, Slot, names_in_stage, names_with_role
from danqing.request import Request

FAMILIES = [importlib.import_module(package).SLOTS for package in models.FAMILIES.values()]


@pytest.mark.parametrize("slots", FAMILIES, ids=models.FAMILIES)
def test_each_stage_has_what_does_its_work(slots: tuple[Slot, ...]) -> None:
    rows: tuple[tuple[Role, str], ...] = (
        ("text encoder", "encode"), ("denoiser", "denoise"), ("decoder", "decode"),
    )  # fmt: skip
    for role, stage in rows:
        names = names_with_role(slots, role)
        assert names
        assert set(names) <= set(names_in_stage(slots, stage))


@pytest.mark.parametrize("slots", FAMILIES, ids=models.FAMILIES)
def test_text_encoders_and_tokenizers_belong_together(slots: tuple[Slot, ...]) -> None:
    named = [slot.tokenizer for slot in slots if slot.role == "text encoder"]
    assert sorted(named) == sorted(names_with_role(slots, "tokenizer"))


@pytest.mark.parametrize("slots", FAMILIES, ids=models.FAMILIES)
def test_a_name_has_one_kind(slots: tuple[Slot, ...]) -> None:
    assert len({slot.name for slot in slots}) == len({(slot.name, slot.kind) for slot in slots})


def test_a_component_with_two_uses_has_two_roles() -> None:
    assert names_with_role(SLOTS, "image encoder") == names_with_role(SLOTS, "decoder") == ("vae",)
    assert {stage: names_in_stage(SLOTS, stage) for stage in STAGES} == {
        "encode": ("vlm", "connector", "vae"),
        "denoise": ("transformer",),
        "decode": ("vae",),
    }
    assert names_in_stage(SLOTS, "encode", Request(prompt="a cat")) == ("vlm", "connector")
