"""Which components are in memory: loading, streaming, compiling and dropping them."""

from __future__ import annotations

import contextlib
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danqing.generation import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from danqing.devices import Device
    from danqing.engine.clock import StageClock
    from danqing.engine.probe import Hooks
    from danqing.generation import StageCost
    from danqing.models.model import Model
    from danqing.networks.streaming import Streaming
    from danqing.plan import Plan
    from danqing.runner import Listener


class Residence:
    """The components of one engine that are in memory.

    Attributes:
        modules: networks in memory, by component.
        streaming: the memory that blocks are streamed through, while a component needs it.
        on_load: called with the name and the network of each component that is loaded.
    """

    def __init__(
        self, model: Model, plan: Plan, clock: StageClock, places: Mapping[str, Device]
    ) -> None:
        """Begin with nothing in memory."""
        self.modules: dict[str, Any] = {}
        self.streaming: Streaming | None = None
        self.on_load: Callable[[str, Any], None] | None = None
        self._model = model
        self._plan = plan
        self._clock = clock
        self._device = clock.device
        self._places = places

    def load(
        self, names: Sequence[str], costs: list[StageCost], listen: Listener | None
    ) -> Mapping[str, Any]:
        """Load missing components; return all in memory, as a view that holds none of them."""
        for name in names:
            if name not in self.modules:
                with self._clock.stage("load", costs, component=name):
                    self.modules[name] = self.build(name, listen)
                    if self.on_load is not None:
                        self.on_load(name, self.modules[name])
        return MappingProxyType(self.modules)

    def build(self, name: str, listen: Listener | None) -> Any:
        """Read a component's weights; return it with the plan's fused kernels, compiled if so."""
        device = self._places.get(name, self._device)
        if device is not self._device:
            device.prepare()  # its first-thing settings; then this one is current again
            self._device.prepare()
        module = self._model.build(
            name,
            dtype=next(part.dtype for part in self._plan.components if part.name == name),
            device=device.torch_device,
            on_bytes=self._load_report(name, listen),
            streaming=self._open_streaming() if device is self._device else None,
        )
        if self._plan.fused and device.family == self._device.family:
            from danqing.networks.kernels import fuse

            fuse(module, {kernel: self._device.fused[kernel] for kernel in self._plan.fused})
        if self._plan.compiled != "off" and name in self._model.role("denoiser"):
            from danqing.networks.compiling import compile_blocks

            compile_blocks(module, self._device.compiler(self._plan.compiled))
        return module

    @contextlib.contextmanager
    def watched(self, hooks: Hooks | None) -> Iterator[None]:
        """Have hooks on all networks, those in memory and those that are loaded."""
        if hooks is None:
            yield
            return
        try:
            for name, module in self.modules.items():
                hooks.add(name, module)
            self.on_load = hooks.add
            yield
        finally:
            self.on_load = None
            hooks.remove()

    def drop_stage(self, stage: str) -> None:
        """Drop the components of a stage that has ended, except those that the plan keeps."""
        names = self.modules.keys() & set(self._model.stages[stage]) - set(self._plan.kept)
        if not names:
            return
        for name in names:
            if self.streaming is not None:
                self.streaming.detach(name)
            self._drop(name)
            self._model.checkpoint.component(name).close()
        self._end_streaming(after=stage)
        self._device.release()

    def clear(self) -> None:
        """Drop everything."""
        self._close_streaming()
        while self.modules:
            self._drop(next(iter(self.modules)))

    def _drop(self, name: str) -> None:
        from danqing.networks.kernels import let_go

        let_go(self.modules.pop(name))

    def _load_report(self, name: str, listen: Listener | None) -> Callable[[int], None]:
        total = self._model.checkpoint.component(name).size_bytes
        start = time.perf_counter()

        def on_bytes(done: int) -> None:
            if listen:
                seconds = time.perf_counter() - start
                listen(
                    Progress(
                        stage="load", item=name, done=done, total=total, unit="bytes",
                        seconds=seconds,
                    )
                )  # fmt: skip

        return on_bytes

    # --- streaming -------------------------------------------------------------------------------

    def _open_streaming(self) -> Streaming | None:
        """Return what components need to be streamed, if the plan says that some are."""
        from danqing.networks.quantising import in_int8
        from danqing.networks.streaming import Ring, Streaming
        from danqing.weights.ranges import RangeReader

        if self.streaming is None and self._plan.placement == "streamed":
            parts = [part for part in self._plan.components if part.placement == "streamed"]
            self.streaming = Streaming(
                self._device,
                Ring(self._plan.ring_bytes, self._device),
                RangeReader(direct=self._device.shares_host_memory()),
                # what stays in another form is read first like all else
                staying={p.name: () if p.arithmetic or p.compact else p.staying for p in parts},
                holding={p.name: p.staying for p in parts if p.compact},
                recoding={p.name: in_int8(self._device, p.staying) for p in parts if p.arithmetic},
            )
        return self.streaming

    def _end_streaming(self, *, after: str) -> None:
        """Give the memory for streaming back when no later stage wants it."""
        stages = list(self._model.stages)
        later = {
            name
            for stage in stages[stages.index(after) + 1 :]
            for name in self._model.stages[stage]
        }
        wanted = {part.name for part in self._plan.components if part.placement == "streamed"}
        if self.streaming is not None and not self.streaming.streamed and not wanted & later:
            self._close_streaming()

    def _close_streaming(self) -> None:
        if self.streaming is not None:
            self.streaming.close()
            self.streaming = None
