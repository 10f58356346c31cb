"""Huawei Ascend NPUs, through torch_npu.

torch_npu is looked at in a child process first: beside a CANN that cannot be loaded, importing it
fails in many ways (and through torch's backend autoload it breaks `import torch` itself), and none
of them may take danqing down.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.devices import ascend_doctor
from danqing.devices.accelerator import Accelerator
from danqing.devices.ascend_chips import chip_named
from danqing.devices.ascend_errors import explain
from danqing.devices.ascend_kernels import FUSED, fusion_attention, honour_gelu, mindie_attention
from danqing.devices.base import Availability
from danqing.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_PROBE_SECONDS = 120
_PROBE = """
import json, torch, torch_npu
n = torch.npu.device_count() if torch.npu.is_available() else 0
chips = [torch.npu.get_device_name(i) for i in range(n)]
print("danqing:" + json.dumps({"count": n, "chips": chips}))
"""
_DETERMINISTIC = {
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "ATB_LLM_LCOC_ENABLE": "0",
}
_DRIVER = Path("/usr/local/Ascend/driver/version.info")


class Ascend(Accelerator):
    """`npu:i`."""

    family = "npu"

    @classmethod
    def availability(cls) -> Availability:
        """Look for torch_npu, then CANN, then cards; nothing is imported here if it would fail."""
        found = _availability()
        if found.count:
            _show_torch_npu()
            importlib.import_module("torch_npu")
        return found

    @classmethod
    def put_aside(cls) -> None:
        """Keep other libraries from finding torch_npu while no NPU is used.

        diffusers and transformers import it wherever it is installed, and choose kernels by that:
        one that cannot be loaded stops them, and one that can makes some of their layers fail on a
        CPU (diffusers 0.42, RMSNorm: https://github.com/huggingface/diffusers/issues/14380).
        """
        if "torch_npu" not in sys.modules:
            sys.modules["torch_npu"] = None  # type: ignore[assignment]  # importlib: not installed

    @property
    def driver(self) -> str:
        """Version of torch_npu, which follows CANN's."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"torch_npu {importlib.metadata.version('torch_npu')}"
        return ""

    @contextlib.contextmanager
    def deterministic(self, asked: bool) -> Iterator[None]:  # noqa: FBT001
        """Tell CANN's libraries, too: those that talk between cards, and ATB's matrix products.

        They read it when they are first used.
        """
        if asked:
            for name, value in _DETERMINISTIC.items():
                os.environ.setdefault(name, value)
        with super().deterministic(asked):
            yield

    def compiler(self, name: str) -> Any:
        """Return torch_npu's graphs of kernels, or torchair's compiler of graphs.

        Both come with torch_npu, but not in every release, and torchair needs CANN's compiler.
        """
        if name not in self.compilers:
            return super().compiler(name)
        if name == "npugraph":
            import torch

            known = torch.compiler.list_backends(exclude_tags=())
            found = next((one for one in ("npugraph_ex", "npugraphs") if one in known), None)
            if found is not None:
                return found
            raise KernelError("this torch_npu has no npugraph", seen=self.driver)
        try:
            torchair: Any = importlib.import_module("torchair")
            return torchair.get_npu_backend()
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            raise KernelError(
                "torchair cannot be used here",
                seen=str(error).splitlines()[0],
                hint="it comes with torch_npu and needs CANN's graph engine",
            ) from error

    @property
    def compilers(self) -> tuple[str, ...]:
        """Inductor is not among them: torch_npu's needs a compiler of its own beside it."""
        return ("off", "npugraph", "torchair")

    @property
    def fused(self) -> Mapping[str, Callable[..., Any]]:
        """Those of torch_npu that this release has."""
        npu = importlib.import_module("torch_npu")
        needs = {"rms_norm": "npu_rms_norm", "rope": "npu_rotary_mul"}
        needs["group_norm_silu"] = "npu_group_norm_silu"
        return {name: FUSED[name] for name, theirs in needs.items() if hasattr(npu, theirs)}

    @property
    def attentions(self) -> Mapping[str, Callable[..., Any]]:
        """The fused one of torch_npu; MindIE-SD's where that is installed."""
        found: dict[str, Callable[..., Any]] = {"npu": fusion_attention}
        if importlib.util.find_spec("mindiesd") is not None:
            found["mindie"] = mindie_attention
        return found

    @property
    def harmless_warnings(self) -> Mapping[str, str]:
        """What torch_npu prints on healthy machines."""
        return {
            "owner does not match the current owner": "CANN was installed by another user",
            "Cannot create tensor with internal format while allow_internal_format=False": (
                "private weight formats are switched off on purpose"
            ),
            "allow_internel_format": "the same, as older releases spell it",
        }

    def peak_flops(self, dtype: str) -> float | None:
        """Look the chip up; what is not known, or simulated, has no peak."""
        chip = chip_named(self.chip)
        if (
            chip is None
            or "simulated" in self.chip
            or dtype == "float32"
            or (dtype == "bfloat16" and not chip.bfloat16)
        ):
            return None
        return chip.tflops * 1e12

    def software(self) -> Mapping[str, str]:
        """Return the versions of CANN and of the driver, from their own files."""
        return {name: text for name, text in (("cann", _cann()), ("driver", _driver())) if text}

    def prepare(self) -> None:
        """Make it current, with nothing that changes what is computed.

        With jit_compile the weights of convolutions are cast to a private layout, those of Conv3d
        through float16 on the way; and convolutions in float32 are computed in HF32, with 10 bits
        of mantissa, unless that is forbidden.
        """
        super().prepare()
        with contextlib.suppress(AttributeError):
            self.module.set_compile_mode(jit_compile=False)
            self.module.config.allow_internal_format = False
        with contextlib.suppress(AttributeError):
            self.module.conv.allow_hf32 = False
            self.module.matmul.allow_hf32 = False
        for text in self.harmless_warnings:
            warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")
        honour_gelu()

    def explain(self, error: BaseException) -> tuple[str, str] | None:
        """Look CANN's code up."""
        return explain(error)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise CANN's codes too."""
        return super().is_out_of_memory(error) or bool(
            re.search(r"\b(207001|207018)\b", str(error))
        )


def _cann() -> str:
    """Return the version of CANN's toolkit, from the file its installer leaves."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if home is None:
        return ""
    places = [
        *sorted(Path(home).glob("*/ascend_toolkit_install.info")),
        Path(home) / "version.info",
    ]
    return next(filter(None, map(_version_in, places)), "")


def _driver() -> str:
    return _version_in(_DRIVER)


def _version_in(place: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        match = re.search(r"(?im)^version\s*=\s*(\S+)", place.read_text())
        return match[1] if match else ""
    return ""


def _show_torch_npu() -> None:
    if sys.modules.get("torch_npu", sys) is None:
        del sys.modules["torch_npu"]


@lru_cache(maxsize=1)
def _availability() -> Availability:
    _show_torch_npu()
    cards = sorted(str(path) for path in Path("/dev").glob("davinci[0-9]*"))
    if importlib.util.find_spec("torch_npu") is None:
        seen = f", though there is a card ({cards[0]})" if cards else ""
        return Availability(
            count=0,
            reason=f"torch_npu is not installed{seen}",
            hint="install the torch_npu that fits the CANN of this host",
            expected=bool(cards),
        )
    if (seen_early := _seen_early()) is not None:
        reason, hint = seen_early
        return Availability(count=0, reason=reason, hint=hint, expected=True)
    answer, text = _ask_here() if "torch_npu" in sys.modules else _ask_child()
    if answer is None:
        reason, hint = ascend_doctor.explain(text)
        return Availability(count=0, reason=reason, hint=hint, expected=True)
    if not answer["count"]:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        setting = f" (ASCEND_RT_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        nodes = ", ".join(cards) if cards else "no /dev/davinci*"
        return Availability(
            count=0,
            reason=f"torch_npu works, but no card is visible{setting}; {nodes}",
            hint="check 'npu-smi info'",
            expected=True,
        )
    return Availability(count=answer["count"], reason=", ".join(answer["chips"]))


def _seen_early() -> tuple[str, str] | None:
    """Look at what is wrong before torch_npu is loaded, unless it is."""
    if "torch_npu" in sys.modules:
        return None
    import torch

    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch_npu")
    return ascend_doctor.before_loading(
        version,
        str(torch.__version__),
        cards=sorted(Path("/dev").glob("davinci[0-9]*")),
        visible=os.environ.get("ASCEND_RT_VISIBLE_DEVICES"),
    )


def _ask_here() -> tuple[dict[str, Any] | None, str]:
    """Ask the torch_npu that this process has already loaded."""
    import torch

    try:
        npu: Any = torch.npu  # type: ignore[attr-defined]  # torch_npu puts it there
        count = npu.device_count() if npu.is_available() else 0
        return {"count": count, "chips": [npu.get_device_name(i) for i in range(count)]}, ""
    except (RuntimeError, AttributeError) as error:
        return None, str(error)


def _ask_child() -> tuple[dict[str, Any] | None, str]:
    """Import torch_npu in a child process; return its answer, or what it said while failing."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"torch_npu did not answer within {_PROBE_SECONDS} s"
    for line in child.stdout.splitlines():
        if line.startswith("danqing:"):
            answer: dict[str, Any] = json.loads(line.removeprefix("danqing:"))
            return answer, ""
    return None, child.stderr or f"the process ended with status {child.returncode}"
