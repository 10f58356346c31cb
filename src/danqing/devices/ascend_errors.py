"""What an Ascend's error codes mean, and what to do: CANN's codes as torch_npu shows them."""

from __future__ import annotations

import re

_LATER = "errors come late: run it again with ASCEND_LAUNCH_BLOCKING=1 to see the operator at fault"
_LOGS = "CANN's log is in ~/ascend/log/debug/plog"

CODES: tuple[tuple[str, str, str], ...] = (
    ("107001", "there is no such card", "ASCEND_RT_VISIBLE_DEVICES renumbers them from 0"),
    (
        "107002", "this thread has no card",
        "every thread that uses one must call torch.npu.set_device first",
    ),
    (
        "161001", "an operator was given a null pointer", _LATER,
    ),
    (
        "161002", "an operator does not take these arguments on this chip",
        "the dtype is the usual reason: try --dtype float16 or float32",
    ),
    ("561103", "an operator failed inside CANN", f"{_LOGS}; update CANN, or try another --dtype"),
    ("507011", "a model of operators failed while it ran", _LATER),
    ("507014", "an operator took too long on the cube cores", _LATER),
    ("507015", "the cube cores raised an exception", _LATER),
    ("507018", "an operator on the card's own CPU raised an exception", _LATER),
    ("507034", "an operator took too long on the vector cores", _LATER),
    ("507035", "the vector cores raised an exception", _LATER),
    ("507046", "a stream did not end in time", f"{_LATER}; {_LOGS}"),
    ("507053", "the card found a fault in its memory", "check npu-smi info -t health; reset it"),
    (
        "507054", "the card's memory has an error that cannot be corrected (HBM ECC)",
        "check npu-smi info -t ecc; the card may have to be replaced",
    ),
    ("507057", "the card was lost", "check npu-smi info and the host's dmesg"),
)  # fmt: skip
"""Code, meaning, advice; from CANN's documentation of aclError, and torch_npu's."""

TEXTS: tuple[tuple[str, str, str], ...] = (
    (
        r"EZ1001", "an operator does not take these arguments on this chip",
        "the dtype is the usual reason: try --dtype float16 or float32",
    ),
    (
        r"ERR01002|Expected NPU tensor|NPUStorageImpl",
        "tensors of the card and of the CPU were mixed",
        "this is a bug in danqing: please report it with --debug",
    ),
    (r"EZ9999|E[0-9]9999", "CANN failed inside", f"{_LOGS}; {_LATER}"),
    (r"EI\d{4}|ERR\d{2}200", "the cards' network failed (HCCL)", "check hccn_tool, and HCCL_*"),
)  # fmt: skip
_ANY_CODE = re.compile(r"error code is (\d{6})|ret(?:urn code)?\s*[=:]?\s*(\d{6})")


def explain(error: BaseException) -> tuple[str, str] | None:
    """Return what an error of torch_npu means and what to do; None if it is none of its own."""
    text = str(error)
    found = {code for pair in _ANY_CODE.findall(text) for code in pair if code}
    for code, meaning, advice in CODES:
        if code in found:
            return f"{meaning} ({code})", advice
    for pattern, meaning, advice in TEXTS:
        if re.search(pattern, text):
            return meaning, advice
    return None
