"""Ascend chips by the name the driver gives: what they have and what they do not.

From CANN's own `platform_config/<soc>.ini` where it says so (cores, clocks, widths: a core of the
cube does 2*16*16*16 floating-point operations a cycle), else from Huawei's product pages. None of
it was measured by danqing: no NPU was at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        name: as people write it.
        memory_gib: memory in all.
        tflops: dense peak in float16, and in bfloat16 where it has it, in 1e12 operations a second.
        bandwidth: of its memory, in 1e9 bytes a second.
        bfloat16: whether its cube computes in it.
    """

    name: str
    memory_gib: int
    tflops: float
    bandwidth: float
    bfloat16: bool


CHIPS = tuple(
    Chip(name=name, memory_gib=memory, tflops=tflops, bandwidth=bandwidth, bfloat16=bfloat16)
    for name, memory, tflops, bandwidth, bfloat16 in (
        ("910A", 32, 221.2, 1200, False),
        ("910ProA", 32, 262.1, 1200, False),
        ("910B1", 64, 363.7, 1600, True),
        ("910B2C", 64, 353.9, 1600, True),
        ("910B2", 64, 353.9, 1600, True),
        ("910B3", 64, 294.9, 1600, True),
        ("910B4-1", 64, 245.8, 1600, True),
        ("910B4", 32, 245.8, 800, True),
        ("910_93", 64, 376.0, 1600, True),
        ("310P3", 24, 70.0, 204, False),
        ("310P1", 24, 70.0, 204, False),
    )
)
"""Longer names before their beginnings. `910_93` begins the names of both halves of a 910C."""


def chip_named(name: str) -> Chip | None:
    """Return the chip of this name, as the driver or a person writes it; None if it is not known.

    `Ascend910B3`, `910B3` and `Ascend 910b3` are the same.
    """
    bare = re.sub(r"(?i)^ascend[ -]?", "", name.strip()).lower()
    return next((chip for chip in CHIPS if bare.startswith(chip.name.lower())), None)
