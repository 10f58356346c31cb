"""What torch cannot say uniformly about a device; one subclass a family, in a file of its own."""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from danqing.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

_LARGE_PAGE = 1 << 21

Computes = Literal["native", "emulated", "no"]
"""`emulated`: right but slow, by converting to float32 and back around each operation."""


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a device family can be used on this machine, and if not, exactly why not.

    Attributes:
        count: how many devices of the family there are; 0 means unavailable.
        reason: why it is not available, or what was found.
        hint: what would make it available.
        expected: it is not available, but something on this machine says that it should be.
    """

    count: int
    reason: str
    hint: str | None = None
    expected: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Device memory in bytes."""

    total_bytes: int
    free_bytes: int


class Device(ABC):
    """One device that is there.

    Attributes:
        family: torch's name for the device type.
        index: which of them.
    """

    family: ClassVar[str]

    def __init__(self, index: int = 0) -> None:
        """Choose one of the family's devices; nothing is touched yet."""
        self.index = index

    @classmethod
    @abstractmethod
    def availability(cls) -> Availability:
        """Look whether the family can be used; never raises."""

    @classmethod
    def put_aside(cls) -> None:
        """Another family was chosen: keep this one's libraries out of the way."""
        return

    @property
    def name(self) -> str:
        """The name a user types: `npu:0`, `cpu`."""
        return f"{self.family}:{self.index}"

    @property
    def torch_device(self) -> torch.device:
        """What tensors are moved to."""
        import torch

        return torch.device(self.name)

    def prepare(self) -> None:  # noqa: B027 - most families need nothing
        """Make it the current device of this thread, with the family's first-thing settings."""

    @property
    @abstractmethod
    def chip(self) -> str:
        """Marketing name of the chip."""

    @property
    def driver(self) -> str:
        """Version of driver or runtime, empty if there is none."""
        return ""

    @property
    def fused(self) -> Mapping[str, Callable[..., Any]]:
        """Fused kernels by name; `danqing.networks.kernels.fuse` says what each takes."""
        return {}

    @property
    def attentions(self) -> Mapping[str, Callable[..., Any]]:
        """Kernels of attention beside torch's, by name: of query, key, value, mask and scale.

        Each returns None where it cannot, and torch's own is taken.
        """
        return {}

    def int8_linear(
        self,
        weight: torch.Tensor,  # noqa: ARG002
        bias: torch.Tensor | None,  # noqa: ARG002
        scales: torch.Tensor | None = None,  # noqa: ARG002
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return a linear layer that computes in int8, or None where there is none.

        Args:
            weight: (out, in); not kept.
            bias: (out,), kept; or None.
            scales: (out,), float32, of a weight that is in int8 already.
        """
        return None

    def preferred(self, dtype: str) -> tuple[str, tuple[str, ...]]:  # noqa: ARG002
        """Return attention and fused kernels that compute in a dtype unless others are asked for.

        Such as are not known to be as good as torch's own are not among them.
        """
        return "auto", ()

    @property
    def harmless_warnings(self) -> Mapping[str, str]:
        """Warnings that its libraries print and that mean nothing: text and why."""
        return {}

    @property
    def threads(self) -> int | None:
        """Threads that compute, where their number can change the bits of a result."""
        return None

    def answers(self) -> bool:
        """Return whether it computes, by letting it add two numbers."""
        import torch

        self.prepare()
        try:
            one = torch.ones(1, device=self.torch_device)
            return float(one + one) == 2.0  # noqa: PLR2004 - one and one
        except RuntimeError:
            return False

    def base_bytes(self) -> int:
        """Return what counts as the device's memory before anything is loaded."""
        return 0

    @abstractmethod
    def memory(self) -> Memory | None:
        """Return memory in all and free, or None if it cannot be known."""

    @abstractmethod
    def computes(self, dtype: str) -> Computes:
        """Say how the device computes in `float32`, `bfloat16` or `float16`."""

    @contextlib.contextmanager
    def deterministic(self, asked: bool) -> Iterator[None]:  # noqa: FBT001
        """Let torch use only kernels that give the same bits again, as long as this lasts.

        What has no such kernel warns and runs as it is; determinism is measured, not believed.
        """
        if not asked:
            yield
            return
        import torch

        before = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)

    def compiler(self, name: str) -> Any:
        """Return what torch.compile takes as its backend, by the name a user types.

        Raises:
            KernelError: the device has none of this name.
        """
        if name == "inductor" and name in self.compilers:
            return name
        raise KernelError(
            f"unknown compiler on {self.name}", seen=name, allowed=", ".join(self.compilers)
        )

    @property
    def compilers(self) -> tuple[str, ...]:
        """Names that `compiler` takes, and `off`."""
        return ("off", "inductor")

    def peak_flops(self, dtype: str) -> float | None:  # noqa: ARG002
        """Return the chip's peak of dense matrix products a second, or None if it is not known."""
        return None

    def software(self) -> Mapping[str, str]:
        """Return versions of what lies below torch: driver, runtime, toolkit; by name."""
        return {}

    def shares_host_memory(self) -> bool:
        """Whether weights mapped from disk can be used in place."""
        return False

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Expect tensors of the same sizes again and again, as long as this lasts."""
        yield

    def staging(self, size: int) -> torch.Tensor:
        """Return memory of the host that files are read into: uint8, aligned to large pages.

        Direct reads pin their pages, and large ones are 512 times fewer.
        """
        import torch

        memory = mmap.mmap(-1, size + _LARGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % _LARGE_PAGE
        return whole[start : start + size]

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Copy to the device beside what it computes; when this ends, all of it is there."""
        yield

    def adopt(self, tensor: torch.Tensor) -> None:  # noqa: B027 - nothing to do without queues
        """Say that what is computed from here on uses a tensor copied under `uploading`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start a new measurement of peak memory."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """Return the most memory in use since `reset_peak`, or None if it cannot be known."""

    @abstractmethod
    def release(self) -> None:
        """Give cached memory back."""

    def explain(self, error: BaseException) -> tuple[str, str] | None:  # noqa: ARG002
        """Return what an error of the device's own software means and what to do, if it is one."""
        return None

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Tell an exhausted memory from any other failure."""
