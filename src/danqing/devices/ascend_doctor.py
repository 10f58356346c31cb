"""Why an NPU cannot be used: what torch_npu says when it cannot be loaded, and what to do.

Each row is a text that a real stack prints, what it means, and the cure. The first that matches is
taken, so that special ones stand before general ones.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh, or where CANN is installed"
_DRIVER = "check 'npu-smi info'; the driver's libraries are in /usr/local/Ascend/driver/lib64"


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One way in which it fails.

    Attributes:
        text: a regular expression for what is printed.
        reason: what it means.
        hint: what to do.
    """

    text: str
    reason: str
    hint: str


def _table(rows: Sequence[tuple[str, str, str]]) -> tuple[Trouble, ...]:
    return tuple(Trouble(text=text, reason=reason, hint=hint) for text, reason, hint in rows)


TROUBLES = _table((
    (r"libascend_hal\.so|libdrvdsmi|libdcmi",
     "CANN is there, but the driver's libraries are not found",
     f"{_DRIVER}; in a container, mount it"),
    (r"libatb\.so", "torch_npu wants ATB, and it is not there",
     "install the NNAL package of the same CANN, and source nnal/atb/set_env.sh"),
    (r"libopapi\S*: cannot open", "CANN's operators are not there",
     "install the kernels package of this chip and CANN (Ascend-cann-kernels-...)"),
    (r"lib(hccl|ascendcl|acl_op_compiler|ge_runner|graph|runtime|acl_tdt_channel)\S*: cannot open",
     "torch_npu is installed, but CANN is not there or its environment is not set", SET_ENV),
    (r"libtorch\w*\.so\S*: cannot open|libc10\S*: cannot open",
     "torch_npu does not find torch's libraries", "install both into the same environment"),
    (r"wrong ELF class|ELFCLASS|cannot execute binary|Exec format",
     "torch_npu was built for another processor", "install the wheel of this architecture"),
    (r"GLIBCXX_|GLIBC_|CXXABI_", "this system's C library is older than torch_npu needs",
     "use a newer system, or the image of CANN"),
    (r"ERR00007|Two accelerators", "torch_npu cannot be used beside a CUDA build of torch",
     "install the CPU build of the same torch version"),
    (r"undefined symbol", "torch_npu does not fit this torch, or this CANN",
     "install the torch_npu release made for this torch version, and its CANN"),
    (r"ASCEND_OPP_PATH|\bopp\b.*(not exist|not found)",
     "CANN's operators are not where ASCEND_OPP_PATH says", SET_ENV),
    (r"ERR00008|ASCEND_HOME_PATH",
     "torch_npu is installed, but ASCEND_HOME_PATH points to no complete CANN", SET_ENV),
    (r"No module named '(tbe|te|acl|hccl|auto_tune)\b",
     "Python does not find CANN's own modules: PYTHONPATH is not set", SET_ENV),
    (r"No module named '(yaml|decorator|attrs?|psutil|scipy|cloudpickle|absl|tornado|ml_dtypes)'",
     "a Python library that torch_npu or CANN needs is missing",
     "pip install pyyaml decorator attrs psutil scipy cloudpickle absl-py tornado ml-dtypes"),
    (r"numpy\.(core|_core)|compiled using NumPy 1|_ARRAY_API",
     "torch_npu was built for another major version of numpy", "pip install 'numpy<2'"),
    (r"[Pp]ermission denied|error code is 507899.*permission|EACCES",
     "this user may not use the card",
     "add the user to the group of /dev/davinci* (HwHiAiUser): usermod -aG HwHiAiUser $USER"),
    (r"\b(507033|507899)\b", "the driver could not be started", _DRIVER),
    (r"\b107001\b|Invalid device ID", "the Ascend driver does not answer for this card",
     "check 'npu-smi info', ASCEND_RT_VISIBLE_DEVICES, and that this user may use /dev/davinci*"),
    (r"\b(107002|107003)\b", "the Ascend driver does not answer: no context",
     "check 'npu-smi info' and that this user may use /dev/davinci*"),
    (r"\b(207001|207018)\b|out of memory", "the card's memory is taken",
     "see who uses it: npu-smi info; ASCEND_RT_VISIBLE_DEVICES chooses another card"),
    (r"\b507054\b", "the card's memory has an error that cannot be corrected",
     "npu-smi info -t ecc -i CARD; choose another card"),
    (r"\b5070\d\d\b|\b507057\b", "the card failed while it was started",
     "npu-smi info -t health -i CARD; reset it when nobody uses it"),
    (r"\b(500000|500001|500002|500003)\b|EZ9999|EE9999|E[A-Z]\d{4}",
     "CANN failed inside while it was started",
     "driver, firmware and CANN must be of one release; its log: ~/ascend/log/debug/plog"),
    (r"drvRet|drvGet|dcmi|driver", "the Ascend driver does not answer", _DRIVER),
    (r"did not answer within", "torch_npu hangs while it is loaded",
     "often a card in an error state: npu-smi info -t health"),
    (r"status -11|Segmentation fault", "torch_npu crashes while it is loaded",
     "torch, torch_npu, CANN and driver must be of one release"),
    (r"status -9", "the system killed the process that loaded torch_npu",
     "there is too little host memory: dmesg says so"),
    (r"status -6", "torch_npu aborts while it is loaded: the process ended with status -6",
     "torch, torch_npu, CANN and driver must be of one release"),
))  # fmt: skip


def explain(text: str) -> tuple[str, str]:
    """Return what a failing torch_npu means and what to do."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), text).strip()
    for trouble in TROUBLES:
        if re.search(trouble.text, text):
            return f"{trouble.reason} ({last[:200]})", trouble.hint
    return (
        f"torch_npu is installed but fails: {last[:300]}",
        "python -c 'import torch_npu' shows all of it",
    )


def before_loading(
    torch_npu: str, torch: str, *, cards: Sequence[Path], visible: str | None
) -> tuple[str, str] | None:
    """Return what can be seen to be wrong without loading it; None if nothing.

    Args:
        torch_npu: its version.
        torch: its version, with its build.
        cards: nodes of cards in /dev.
        visible: ASCEND_RT_VISIBLE_DEVICES.
    """
    pair = [".".join(version.split("+")[0].split(".")[:2]) for version in (torch_npu, torch)]
    if pair[0] != pair[1] and torch_npu:
        return (
            f"torch_npu {torch_npu} is made for torch {pair[0]}, and this is torch {torch}",
            f"pip install torch=={pair[0]}.* (the CPU build), or the torch_npu of {pair[1]}",
        )
    if "+cu" in torch:
        return (
            f"torch_npu cannot be used beside a CUDA build of torch ({torch})",
            f"install the CPU build: torch=={torch.split('+', maxsplit=1)[0]}+cpu",
        )
    for trouble in _visible_troubles(visible):
        return trouble
    for card in cards:
        if not os.access(card, os.R_OK | os.W_OK):
            return (
                f"this user may not use the card {card}",
                "add the user to its group: usermod -aG HwHiAiUser $USER; then log in again",
            )
    return None


def _visible_troubles(visible: str | None) -> Iterator[tuple[str, str]]:
    """CANN reads the list up to the first thing it does not like, and says nothing of it."""
    if visible is None:
        return
    right = "numbers that rise, with commas and without blanks: 0,1,2"
    if visible == "":
        yield "ASCEND_RT_VISIBLE_DEVICES is empty: no card is visible", "unset it"
    elif not re.fullmatch(r"\d+(,\d+)*", visible):
        yield f"ASCEND_RT_VISIBLE_DEVICES={visible!r} cannot be read", right
    else:
        numbers = [int(number) for number in visible.split(",")]
        if numbers != sorted(set(numbers)):
            yield f"ASCEND_RT_VISIBLE_DEVICES={visible!r} does not rise: CANN stops reading", right
