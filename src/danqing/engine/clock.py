"""Running a stage under the plan's kernels, with its seconds, its peak memory and its errors."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from danqing.errors import DanqingError, DeviceFailedError, DoesNotFitError
from danqing.generation import StageCost, StageName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.devices import Device
    from danqing.networks.compiling import CompileClock
    from danqing.plan import Plan


class StageClock:
    """Times the stages of one engine.

    Attributes:
        device: the plan's; its peak memory counts.
    """

    def __init__(self, plan: Plan, device: Device, places: Mapping[str, Device]) -> None:
        """Keep what decides how a stage computes, and which devices it waits for."""
        self.device = device
        self._plan = plan
        self._devices = (device, *places.values())

    @contextlib.contextmanager
    def stage(
        self,
        name: StageName,
        costs: list[StageCost],
        *,
        pictures: int = 1,
        steps: int = 0,
        component: str = "",
    ) -> Iterator[None]:
        """Time a stage and take its peak memory; no gradients; memory errors are translated.

        Args:
            name: of the stage.
            costs: the stage's cost is appended, if it ends without an error.
            pictures: that share the cost.
            steps: of denoising.
            component: read in the stage `load`.
        """
        import torch

        loads = name == "load"
        for device in self._devices:
            device.synchronize()
            device.reset_peak()
        start = time.perf_counter()
        try:
            repeats = name in ("encode", "denoise")
            same = self.device.repeating() if repeats else contextlib.nullcontext()
            gradless = torch.no_grad() if loads else torch.inference_mode()
            with gradless, self.kernels(), same, self._compile_clock() as clock:
                yield
                for device in self._devices:
                    device.synchronize()
        except DanqingError:
            raise
        except (RuntimeError, MemoryError) as error:
            if not self.device.is_out_of_memory(error):
                self._translate(error, name)
                raise
            self.device.release()
            raise DoesNotFitError(
                f"{self.device.name} ran out of memory in {name}",
                seen=str(error).splitlines()[0],
                hint="a smaller --dtype" + ("" if loads else ", picture or --batch"),
            ) from error
        costs.append(
            StageCost(
                name=name,
                seconds=time.perf_counter() - start,
                peak_bytes=self.device.peak_bytes(),
                pictures=pictures,
                steps=steps,
                component=component,
                compile_seconds=clock.seconds if clock else 0.0,
            )
        )

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Compute with the kernels of the plan."""
        from danqing.networks.kernels import attention

        with (
            attention(self._plan.attention, self.device),
            self.device.deterministic(self._plan.deterministic),
        ):
            yield

    def _compile_clock(self) -> contextlib.AbstractContextManager[CompileClock | None]:
        """Count what is spent compiling, if anything may be."""
        if self._plan.compiled == "off":
            return contextlib.nullcontext()
        from danqing.networks.compiling import clocked

        return clocked()

    def _translate(self, error: BaseException, stage: str) -> None:
        """Raise what an error of the device's own software means; return if it is none."""
        meaning = self.device.explain(error)
        if meaning is not None:
            what, advice = meaning
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = next((line for line in lines if "EZ1001" in line), lines[0])
            raise DeviceFailedError(
                f"{self.device.name} failed in {stage}: {what}",
                seen=detail[:300],
                hint=advice,
            ) from error
