"""The engine: opens a checkpoint on a device under a plan, and turns requests into pictures."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danqing import devices, models, plan, weights
from danqing.arrays import Array
from danqing.errors import (
    BrokenPictureError,
    BusyError,
    DanqingError,
    DeviceFailedError,
    DoesNotFitError,
)
from danqing.generation import Generation, Picture, Progress, Provenance, StageCost, StageName
from danqing.references import tilde
from danqing.request import Request, Resolved, check_batch
from danqing.turns import LAZY_IMPORTS, Turns
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from typing_extensions import Self

    from danqing.models.base import ModelSpec
    from danqing.models.model import Model
    from danqing.models.prompt_cache import PromptCache
    from danqing.networks.compiling import CompileClock
    from danqing.networks.streaming import Streaming
    from danqing.options import Options
    from danqing.runner import Inside, Listener, Probe

KEPT_PROMPTS = 4
"""Prompts whose conditioning is kept; it is small beside the weights."""
_LIBRARIES = (
    "torch", "torch_npu", "diffusers", "transformers", "accelerate", "einops", "safetensors",
    "tokenizers", "numpy", "pillow",
)  # fmt: skip
"""Those that are installed are named in every picture."""


_TURNS: dict[str, Turns] = {}
"""By device, for all engines of this process: two that share a device take turns, too."""


class Engine:
    """One model on one device, for any number of threads.

    A device computes one request at a time. Calls from other threads wait, in order of arrival; a
    listener hears how many are ahead, and cancels by raising an exception.

    Attributes:
        checkpoint: the weights.
        spec: which model it is and what it takes.
        plan: what will happen, with reasons.
        options: how it was asked to run.
    """

    def __init__(
        self,
        checkpoint: weights.Checkpoint,
        model: Model,
        device: devices.Device,
        the_plan: plan.Plan,
        *,
        places: Mapping[str, devices.Device],
        options: Options,
    ) -> None:
        """Keep the parts; `Engine.open` finds and checks them."""
        self.checkpoint = checkpoint
        self.spec: ModelSpec = model.spec
        self.plan = the_plan
        self._model = model
        self._device = device
        self._places = dict(places)
        self._modules: dict[str, Any] = {}
        self._loads: list[StageCost] = []
        self._batch_bits: dict[tuple[int, ...], dict[str, Any]] = {}
        self._encoded: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}
        self._hooks: _Hooks | None = None
        self._probing = False
        self.options = options
        self._streaming: Streaming | None = None
        self._busy = False

    @classmethod
    def open(
        cls,
        weights_at: str | Path | weights.Checkpoint,
        options: Options,
        *,
        planned_for: Request | None = None,
        batch: int = 1,
    ) -> Engine:
        """Open a checkpoint, or take one that is open; see `danqing.open`.

        Args:
            weights_at: where the checkpoint is, or the checkpoint itself.
            options: how the model runs.
            planned_for: the request that memory is planned for; the model's own if left out.
            batch: images of it computed together.
        """
        with LAZY_IMPORTS:
            if options.allow_pt:
                devices.import_torch()  # before anything else does: it reads the file
            checkpoint = (
                weights_at
                if isinstance(weights_at, weights.Checkpoint)
                else models.open_checkpoint(
                    weights_at, options.components, allow_pt=options.allow_pt
                )
            )
            spec = models.identify(checkpoint)
            devices.import_torch()
            selection = devices.select(options.device)
            places = {name: devices.select(where).device for name, where in options.place.items()}
            model = models.open_model(checkpoint, spec)
            the_plan = plan.make_plan(
                model,
                selection,
                options,
                places=places,
                request=None if planned_for is None else spec.resolve(planned_for),
                images=batch,
            )
        return cls(checkpoint, model, selection.device, the_plan, places=places, options=options)

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give all memory back; the engine can be used again and then loads again.

        Waits for the requests of other threads that came before.
        """
        with self._turn(None):
            self._require_idle()
            if self._streaming is not None:
                self._streaming.close()
                self._streaming = None
            while self._modules:
                self._let_go(next(iter(self._modules)))
            self.forget()
            self.checkpoint.close()
            self._device.release()

    def forget(self) -> None:
        """Forget what earlier prompts became; weights stay."""
        with self._turn(None):
            self._encoded.clear()
            self._model.forget()

    # --- threads ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, listen: Listener | None) -> Iterator[None]:
        """Hold the device, and every other one that a component is placed on."""
        names = sorted({self._device.name, *(one.name for one in self._places.values())})
        with contextlib.ExitStack() as held:
            for name in names:  # all threads in the same order, so that none waits in a circle
                turns = _TURNS.setdefault(name, Turns())
                held.enter_context(turns.take(None if listen is None else _Queue(name, listen)))
            yield

    @contextlib.contextmanager
    def _computing(self, listen: Listener | None = None) -> Iterator[None]:
        """Hold the device to compute; afterwards no stage keeps what the plan does not keep.

        Raises:
            BusyError: this very thread is computing: a listener or a probe called the engine.
        """
        with self._turn(listen):
            self._require_idle()
            self._busy = True
            try:
                self._device.prepare()
                yield
            finally:
                for stage in self._model.stages:  # also those an error left loaded
                    self._drop_stage(stage)
                self._busy = False

    def _require_idle(self) -> None:
        """See that the thread whose turn it is did not come here from its own listener."""
        if self._busy:
            raise BusyError(
                "the engine is generating an image in this thread",
                seen="a call from its own listener or probe",
                hint="call it when generate has returned, or open a second engine",
            )

    @property
    def threads(self) -> int | None:
        """Threads that compute, where their number can change the bits of a result."""
        return self._device.threads

    def _resolve(self, request: Request | Resolved) -> Resolved:
        return request if isinstance(request, Resolved) else self.spec.resolve(request)

    def load(self, listen: Listener | None = None) -> None:
        """Read all weights now rather than at the first picture (if the plan keeps them)."""
        if self.plan.placement != "resident":
            return
        with self._computing(listen):
            for stage, names in self._model.stages.items():
                if (
                    stage != "encode" or self.options.prompt_cache is None
                ):  # else it may not be needed
                    self._load(names, self._loads, listen)

    def generate(
        self,
        prompt: str | Request | Resolved,
        /,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        **settings: Any,
    ) -> Generation:
        """Make the pictures of one request; those of other threads wait until all are there.

        Args:
            prompt: the prompt, or a whole request; one that this model resolved runs as it is.
            batch: pictures computed together. Together they can be faster, and can differ in the
                last bits from what each would be alone; the first batch of a shape is measured
                and the finding is in the provenance.
            listen: called with progress, also while it waits for its turn (stage `wait`); an
                exception it raises ends the work.
            settings: any field of `Request`: `seed=42, height=512, ...`.

        Returns:
            The pictures with the resolved request.

        Raises:
            RequestError: a setting cannot be, or would have no effect in this model.
            DoesNotFitError: the device ran out of memory.
            BrokenPictureError: the pixels are not finite, black, or one flat colour.
        """
        check_batch(batch)
        if isinstance(prompt, str):
            prompt = Request(prompt=prompt, **settings)
        elif settings:
            asked = prompt.request if isinstance(prompt, Resolved) else prompt
            prompt = asked.replace(**settings)
        resolved = self._resolve(prompt)  # invalid settings are refused before it waits its turn
        with self._turn(listen):
            pictures = tuple(self.paint(resolved, batch=batch, listen=listen))
        return Generation(pictures=pictures, request=resolved.request)

    def trace_bytes(self, request: Resolved) -> int:
        """Return how many bytes of tensors a probe of this request will be shown at the joints.

        Args:
            request: for one picture.
        """
        sizes = {part.name: plan.DTYPES[part.dtype] for part in self.plan.components}
        computes = plan.DTYPES[self.plan.dtype]
        draws = [draw.numel() for draw in self._model.draw(request, request.seed)]
        latents = 2 * request.num_inference_steps * draws[0]
        pixels = 3 * request.height * request.width
        conditioning = self._model.conditioning_size(request)
        return (conditioning + latents) * computes + 4 * sum(draws) + pixels * sizes["vae"]

    def tokens(self, request: Request | Resolved) -> tuple[int, int, int]:
        """Return the tokens of the prompt, of the pictures to edit, and of a picture painted."""
        return self._model.tokens(self._resolve(request))

    def answers(self) -> bool:
        """Say whether the device computes, by letting it add two numbers.

        A device that is at work computes: this does not wait for its turn.
        """
        import torch

        if (turns := _TURNS.get(self._device.name)) is not None and turns.taken:
            return True

        self._device.prepare()
        try:
            one = torch.ones(1, device=self._device.torch_device)
            return float(one + one) == 2.0  # noqa: PLR2004 - one and one
        except RuntimeError:
            return False

    @property
    def fingerprint(self) -> str:
        """Digest of the weights' headers."""
        return self.checkpoint.fingerprint

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the device: in all, free, and the peak since the last stage began; if known."""
        memory, peak = self._device.memory(), self._device.peak_bytes()
        found = {} if memory is None else {"total": memory.total_bytes, "free": memory.free_bytes}
        return found if peak is None else {**found, "peak": peak}

    def step_flops(self, request: Resolved) -> int:
        """Count the floating-point operations of one denoising step of one picture, by doing it.

        Those of matrix products and convolutions, a multiplication and an addition being two
        (torch.utils.flop_counter); attention counts as its two products.
        """
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from danqing.networks.kernels import attention

        one = self.spec.resolve(
            request.request.replace(num_inference_steps=1, num_images_per_prompt=1)
        )
        counter = FlopCounterMode(display=False)
        with self._computing():
            conditioning, _ = self._encode(one, [], None)
            modules = self._load(self._model.needs("denoise", one), [], None)
            drawn = [self._model.draw(one, one.seed)]
            # not all fused kernels are counted; the products they stand for are
            with torch.inference_mode(), attention("math"), counter:
                self._model.denoise(
                    modules, conditioning, drawn, one, lambda _, latents, __: latents
                )
        return int(counter.get_total_flops())

    @property
    def peak_flops(self) -> float | None:
        """Operations a second that the chip could do in the plan's dtype, where that is known."""
        return self._device.peak_flops(self.plan.dtype)

    @property
    def fused(self) -> tuple[str, ...]:
        """Fused kernels that the device has, by name."""
        return tuple(self._device.fused)

    @property
    def compilers(self) -> tuple[str, ...]:
        """Compilers that the device has by name, `off` among them."""
        return self._device.compilers

    @property
    def harmless_warnings(self) -> Mapping[str, str]:
        """Warnings that the device's libraries print and that mean nothing: text and why."""
        return self._device.harmless_warnings

    def layers(self, component: str) -> tuple[str, ...]:
        """Return the paths of a network's layers, from the files' headers: nothing is read."""
        network, _ = self._model.matched(component)
        return tuple(path for path, _ in network.named_modules() if path)

    def probe(
        self,
        request: Request | Resolved,
        probe: Probe,
        *,
        inside: Inside | None = None,
        inputs: bool = False,
    ) -> Picture:
        """Make a picture with every joint of the run shown to a probe.

        Nothing of an earlier run is reused. What the probe returns is taken in a tensor's place,
        cast to its dtype: so another run's noise, or its input to any step, can be put in.

        Args:
            request: for one picture; or for several, which are computed together, and the probe is
                shown what is the first one's and can put nothing in.
            probe: is shown the tensors.
            inside: which layers' outputs it is shown as well, and may replace.
            inputs: show what these layers were given too, as `inside/.../in/NUMBER`.
        """
        with self._turn(None):
            self._encoded.clear()
            self._probing = True
            self._hooks = _Hooks(probe, inside, inputs=inputs) if inside else None
            for name, module in self._modules.items():
                self._watch(name, module)
            try:
                count = request.num_images_per_prompt
                picture, *_ = self.paint(request, batch=count, probe=probe)
            finally:
                if self._hooks:
                    self._hooks.remove()
                self._hooks = None
                self._probing = False
                self._encoded.clear()
        return picture

    def _watch(self, name: str, module: Any) -> None:
        if self._hooks:
            self._hooks.add(name, module)

    def paint(
        self,
        request: Request | Resolved,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        probe: Probe | None = None,
        previews: int = 0,
    ) -> Iterator[Picture]:
        """Yield the pictures of one request as they are finished.

        Between two of them the device is free: a request of another thread may have its turn.

        Args:
            request: as in `generate`, like `batch` and `listen`.
            batch: pictures computed together.
            listen: told of progress.
            probe: as in `probe`.
            previews: how many steps of each picture the listener is shown a preview of; no more
                than there are steps between the first and the last, and none where the decoder is
                not kept in memory.
        """
        check_batch(batch)
        # 1. What is asked, with every default filled in.
        request = self._resolve(request)
        with self._computing(listen):
            costs, self._loads = self._loads, []  # what was read beforehand, the first one pays
            # 2. The prompt becomes conditioning, once for all its pictures.
            conditioning, more = self._encode(request, costs, listen)
            look = _Look(probe, pictures=request.num_images_per_prompt)
            seen = look.through(conditioning)
        work = _Work(request, seen, request.notes + more, listen, look, previews)
        # 3. Noise becomes latents becomes pixels, one picture or batch after the other.
        for first in range(0, request.num_images_per_prompt, batch):
            indexes = range(first, min(first + batch, request.num_images_per_prompt))
            with self._computing(listen):
                pictures = self._paint_batch(work, indexes, costs)
            yield from pictures
            costs = [cost for cost in costs if cost.name == "encode"]

    # --- stages ----------------------------------------------------------------------------------

    def _encode(
        self, request: Resolved, costs: list[StageCost], listen: Listener | None
    ) -> tuple[Any, tuple[str, ...]]:
        """Return the conditioning of a prompt; that of the last few is kept for other seeds."""
        key = tuple(getattr(request, name) for name in self._model.encode_reads)
        known = self._encoded.get(key) or self._from_disk(request)
        if known is not None:
            self._remember(key, known)
            count = request.num_images_per_prompt
            costs.append(
                StageCost(name="encode", seconds=0.0, peak_bytes=None, pictures=count, reused=True)
            )
            return known
        modules = self._load(self._model.needs("encode", request), costs, listen)
        with self._stage("encode", costs, pictures=request.num_images_per_prompt):
            conditioning, notes = self._model.encode(modules, request)
            for name, tensor in _tensors(conditioning):
                if not bool(tensor.isfinite().all()):
                    raise self._not_finite("encode", name)
        self._drop_stage("encode")
        self._remember(key, (conditioning, notes))
        if self._prompts is not None and not self._probing:
            self._prompts.keep(conditioning, notes, self._read_by_encode(request))
        return conditioning, notes

    def _remember(self, key: tuple[Any, ...], known: tuple[Any, tuple[str, ...]]) -> None:
        self._encoded.pop(key, None)
        while len(self._encoded) >= KEPT_PROMPTS:
            self._encoded.pop(next(iter(self._encoded)))
        self._encoded[key] = known

    def _from_disk(self, request: Resolved) -> tuple[Any, tuple[str, ...]] | None:
        """Return the conditioning of a prompt that was kept on disk; a probe sees real work."""
        if self._prompts is None or self._probing:
            return None
        return self._prompts.find(self._model.conditioning, self._read_by_encode(request))

    def _read_by_encode(self, request: Resolved) -> dict[str, Any]:
        asked = {name: getattr(request.request, name) for name in self._model.encode_reads}
        if asked.get("image"):
            asked["image"] = [one.pixels_sha256 for one in asked["image"]]
        return asked

    @cached_property
    def _prompts(self) -> PromptCache | None:
        from danqing.models.prompt_cache import PromptCache

        if self.options.prompt_cache is None:
            return None
        origin = self._origin
        kernels = (origin.attention, origin.device["fused"], origin.device["deterministic"])
        made_by = [
            origin.model["fingerprint"], origin.dtypes, origin.versions, kernels,
            origin.device["chip"], origin.device["threads"], origin.device["software"],
        ]  # fmt: skip
        return PromptCache(self.options.prompt_cache, {"made_by": made_by})

    def _paint_batch(
        self, work: _Work, indexes: Sequence[int], before: Sequence[StageCost]
    ) -> list[Picture]:
        """Make some pictures together; `before` is what was spent on them until here."""
        requests = [work.request.single(index) for index in indexes]
        drawn = [self._model.draw(request, request.seed) for request in requests]
        drawn[0] = [work.look(f"draw/{number}", one) for number, one in enumerate(drawn[0])]
        costs = list(before)
        images = self._render(work, drawn, indexes, costs)
        bits = self._batch_finding(work, drawn, images, indexes)
        return [
            Picture(
                image=image,
                request=request.request,
                index=index,
                stages=tuple(costs),
                provenance=replace(
                    self._origin,
                    noise_sha256=_digest(draws[0]),
                    batch={**bits, "position": index - indexes[0]},
                ),
                notes=work.notes,
            )
            for index, request, draws, image in zip(indexes, requests, drawn, images, strict=True)
        ]

    def _render(
        self,
        work: _Work,
        drawn: Sequence[Sequence[torch.Tensor]],
        indexes: Sequence[int],
        costs: list[StageCost],
    ) -> list[Image]:
        """Denoise, decode and check some pictures that are computed together."""
        request, count = work.request, len(drawn)
        steps = request.num_inference_steps
        modules = self._load(self._model.needs("denoise", request), costs, work.listen)
        with self._stage("denoise", costs, pictures=count, steps=steps):
            watch = _StepWatch(self._device, _item(indexes), steps, work, self._glimpse)
            latents = self._model.denoise(modules, work.conditioning, drawn, request, watch)
            if (bad := watch.first_bad_step()) is not None:
                raise self._not_finite("denoise", f"the latents after step {bad} of {steps}")
        self._drop_stage("denoise")
        modules = self._load(self._model.needs("decode", request), costs, work.listen)
        with self._stage("decode", costs, pictures=count):
            pixels = work.look.first("decode/pixels", self._decoded(modules, latents, request))
            if not bool(pixels.isfinite().all()):
                raise self._not_finite("decode", "the pixels")
        self._drop_stage("decode")
        images = [_to_image(picture) for picture in pixels]
        for image in images:
            _check_image(image)
        return images

    def _glimpse(
        self, step: int, latents: torch.Tensor, velocity: torch.Tensor, request: Resolved
    ) -> Image | None:
        """Return what the first of some pictures will look like, if the decoder is there."""
        needed = self._model.needs("decode", request)
        if not all(name in self._modules for name in needed):
            return None
        ends = self._model.glimpse(latents[:1], velocity[:1], step, request)
        return _to_image(self._decoded(self._modules, ends, request)[0])

    def _decoded(
        self, modules: Mapping[str, Any], latents: torch.Tensor, request: Resolved
    ) -> torch.Tensor:
        """Decode as the plan says: whole, or in tiles."""
        from danqing.networks.tiling import decode_in_tiles

        def decode(part: torch.Tensor) -> torch.Tensor:
            return self._model.decode(modules, part, request)

        tile = self.plan.tile * latents.shape[-2] // request.height
        return decode_in_tiles(decode, latents, tile) if tile else decode(latents)

    @contextlib.contextmanager
    def _stage(
        self,
        name: StageName,
        costs: list[StageCost],
        *,
        pictures: int = 1,
        steps: int = 0,
        component: str = "",
    ) -> Iterator[None]:
        """Time a stage and take its peak memory; no gradients; memory errors are translated."""
        import torch

        loads = name == "load"

        for device in (self._device, *self._places.values()):
            device.synchronize()
            device.reset_peak()
        start = time.perf_counter()
        try:
            repeats = name in ("encode", "denoise")
            same = self._device.repeating() if repeats else contextlib.nullcontext()
            gradless = torch.no_grad() if loads else torch.inference_mode()
            with gradless, self._kernels(), same, self._compile_clock() as clock:
                yield
                for device in (self._device, *self._places.values()):
                    device.synchronize()
        except DanqingError:
            raise
        except (RuntimeError, MemoryError) as error:
            if not self._device.is_out_of_memory(error):
                self._translate(error, name)
                raise
            self._device.release()
            raise DoesNotFitError(
                f"{self._device.name} ran out of memory in {name}",
                seen=str(error).splitlines()[0],
                hint="a smaller --dtype" + ("" if loads else ", picture or --batch"),
            ) from error
        costs.append(
            StageCost(
                name=name,
                seconds=time.perf_counter() - start,
                peak_bytes=self._device.peak_bytes(),
                pictures=pictures,
                steps=steps,
                component=component,
                compile_seconds=clock.seconds if clock else 0.0,
            )
        )

    def _compile_clock(self) -> contextlib.AbstractContextManager[CompileClock | None]:
        """Count what is spent compiling, if anything may be."""
        if self.plan.compiled == "off":
            return contextlib.nullcontext()
        from danqing.networks.compiling import clocked

        return clocked()

    def _translate(self, error: BaseException, stage: str) -> None:
        """Raise what an error of the device's own software means; return if it is none."""
        meaning = self._device.explain(error)
        if meaning is not None:
            what, advice = meaning
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = next((line for line in lines if "EZ1001" in line), lines[0])
            raise DeviceFailedError(
                f"{self._device.name} failed in {stage}: {what}",
                seen=detail[:300],
                hint=advice,
            ) from error

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """Compute with the kernels of the plan."""
        from danqing.networks.kernels import attention

        with (
            attention(self.plan.attention, self._device),
            self._device.deterministic(self.plan.deterministic),
        ):
            yield

    def _load(
        self, names: Sequence[str], costs: list[StageCost], listen: Listener | None
    ) -> Mapping[str, Any]:
        """Read components that are not there; return what is, as a view that holds none of it."""
        for name in names:
            if name not in self._modules:
                with self._stage("load", costs, component=name):
                    self._modules[name] = self._build(name, listen)
                    self._watch(name, self._modules[name])
        return MappingProxyType(self._modules)

    def _build(self, name: str, listen: Listener | None) -> Any:
        total = self.checkpoint.component(name).size_bytes
        start = time.perf_counter()

        def on_bytes(done: int) -> None:
            if listen:
                seconds = time.perf_counter() - start
                listen(
                    Progress(
                        stage="load",
                        item=name,
                        done=done,
                        total=total,
                        unit="bytes",
                        seconds=seconds,
                    )
                )

        dtype = next(part.dtype for part in self.plan.components if part.name == name)
        device = self._places.get(name, self._device)
        if device is not self._device:
            device.prepare()  # its first-thing settings; then this one is current again
            self._device.prepare()
        module = self._model.build(
            name,
            dtype=dtype,
            device=device.torch_device,
            on_bytes=on_bytes,
            streaming=self._open_streaming() if device is self._device else None,
        )
        if self.plan.fused and device.family == self._device.family:
            from danqing.networks.kernels import fuse

            fuse(module, {name: self._device.fused[name] for name in self.plan.fused})
        if name == "transformer" and self.plan.compiled != "off":
            from danqing.networks.compiling import compile_blocks

            compile_blocks(module, self._device.compiler(self.plan.compiled))
        return module

    def _open_streaming(self) -> Streaming | None:
        """Return what components need to be streamed, if the plan says that some are."""
        from danqing.networks.quantising import in_int8
        from danqing.networks.streaming import Ring, Streaming
        from danqing.weights.ranges import RangeReader

        if self._streaming is None and self.plan.placement == "streamed":
            parts = [part for part in self.plan.components if part.placement == "streamed"]
            self._streaming = Streaming(
                self._device,
                Ring(self.plan.ring_bytes, self._device),
                RangeReader(direct=self._device.shares_host_memory()),
                # what stays in another form is read first like all else
                staying={p.name: () if p.arithmetic or p.compact else p.staying for p in parts},
                holding={p.name: p.staying for p in parts if p.compact},
                recoding={p.name: in_int8(self._device, p.staying) for p in parts if p.arithmetic},
            )
        return self._streaming

    def _drop_stage(self, stage: str) -> None:
        names = self._modules.keys() & set(self._model.stages[stage]) - set(self.plan.kept)
        if not names:
            return
        for name in names:
            if self._streaming is not None:
                self._streaming.detach(name)
            self._let_go(name)
            self.checkpoint.component(name).close()
        self._end_streaming(after=stage)
        self._device.release()

    def _let_go(self, name: str) -> None:
        from danqing.networks.kernels import let_go

        let_go(self._modules.pop(name))

    def _end_streaming(self, *, after: str) -> None:
        """Give the memory for streaming back when no later stage wants it."""
        stages = list(self._model.stages)
        later = {
            name
            for stage in stages[stages.index(after) + 1 :]
            for name in self._model.stages[stage]
        }
        wanted = {part.name for part in self.plan.components if part.placement == "streamed"}
        if self._streaming is not None and not self._streaming.streamed and not wanted & later:
            self._streaming.close()
            self._streaming = None

    # --- checks ----------------------------------------------------------------------------------

    def _not_finite(self, stage: str, where: str) -> BrokenPictureError:
        """Say where the numbers went wrong, and whether the weights were wrong to begin with."""
        bad = [
            f"{name}: {tensor}"
            for name in self._model.stages[stage]
            if name in self._modules
            for tensor, value in self._modules[name].named_parameters()
            if not bool(value.isfinite().all())
        ]
        hint = "the weights are finite: try --dtype float32"
        if bad:
            hint = f"the weights themselves are not finite: {bad[0]}" + (
                f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            )
        return BrokenPictureError(
            f"the numbers stopped being finite in the stage {stage}",
            seen=f"{where}, computing in {self.plan.dtype}",
            hint=hint,
        )

    def _batch_finding(
        self,
        work: _Work,
        drawn: Sequence[Sequence[torch.Tensor]],
        images: Sequence[Image],
        indexes: Sequence[int],
    ) -> dict[str, Any]:
        """Measure, once for each shape of batch, what computing together does to the bits.

        The batch's last picture is made once more, alone.
        """
        if len(drawn) == 1:
            return {"size": 1}
        shape = (len(drawn), work.request.height, work.request.width)
        if shape not in self._batch_bits:
            quiet = replace(work, listen=None, look=_Look(None))
            alone = self._render(quiet, drawn[-1:], indexes[-1:], [])[0]
            self._batch_bits[shape] = {"size": len(drawn), **_difference(alone, images[-1])}
        return self._batch_bits[shape]

    # --- provenance ------------------------------------------------------------------------------

    @cached_property
    def _origin(self) -> Provenance:
        """What is the same for all pictures of this engine."""
        model = {
            "name": self.spec.name,
            "family": self.spec.family,
            "kind": self.spec.kind,
            "title": self.spec.title,
            "layout": self.checkpoint.layout,
            "path": self.checkpoint.name or tilde(self.checkpoint.path),
            "components": {name: tilde(path) for name, path in self.checkpoint.overrides.items()},
            "fingerprint": self.checkpoint.fingerprint,
            "sha256": weights.known_digests(self.checkpoint),
        }
        memory = self._device.memory()
        device = {
            "name": self._device.name,
            "chip": self._device.chip,
            "driver": self._device.driver,
            "software": dict(self._device.software()),
            "memory_bytes": memory.total_bytes if memory else None,
            "threads": self._device.threads,
            "deterministic": self.plan.deterministic,
            "compiled": self.plan.compiled,
            "fused": list(self.plan.fused),
            "tile": self.plan.tile,
            "quantised": {p.name: p.arithmetic for p in self.plan.components if p.arithmetic},
            "places": {name: device.name for name, device in self._places.items()},
            "reason": self.plan.device_reason,
        }
        return Provenance(
            model=model,
            device=device,
            dtype=self.plan.dtype,
            dtypes={part.name: part.dtype for part in self.plan.components},
            dtype_reason=self.plan.dtype_reason,
            attention=self.plan.attention,
            placement=self.plan.placement,
            versions=_versions(),
            noise_sha256="",
            batch={},
        )


class _Queue:
    """Tells a listener how many requests are ahead."""

    def __init__(self, device: str, listen: Listener) -> None:
        self._device = device
        self._listen = listen
        self._start = time.perf_counter()
        self._most = 0

    def __call__(self, ahead: int) -> None:
        self._most = max(self._most, ahead)
        self._listen(
            Progress(
                stage="wait",
                item=self._device,
                done=self._most - ahead,
                total=self._most,
                unit="requests",
                seconds=time.perf_counter() - self._start,
            )
        )


@dataclass(frozen=True)
class _Work:
    """One request under way, its prompt encoded."""

    request: Resolved
    conditioning: Any
    notes: tuple[str, ...]
    listen: Listener | None
    look: _Look
    previews: int = 0


class _Look:
    """Shows tensors to a probe, and takes what it returns in their place."""

    def __init__(self, probe: Probe | None, *, pictures: int = 1) -> None:
        self._probe = probe
        self._pictures = pictures

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._probe is None:
            return tensor
        other = self._probe(name, _to_array(tensor))
        if other is None or self._pictures > 1:
            return tensor
        return _to_tensor(other).to(tensor.device, tensor.dtype)

    def first(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Show what is the first picture's of something that has one row a picture."""
        if self._pictures == 1:
            return self(name, rows)
        self(name, rows[:1])
        return rows

    def through(self, conditioning: Any) -> Any:
        """Show every tensor of a conditioning; return it with what came back."""
        if self._probe is None:
            return conditioning
        changed: dict[str, Any] = {}
        for name, value in vars(conditioning).items():
            if isinstance(value, tuple):
                parts = (self(f"encode/{name}/{i}", one) for i, one in enumerate(value))
                changed[name] = tuple(parts)
            else:
                changed[name] = self(f"encode/{name}", value)
        return replace(conditioning, **changed)


class _Hooks:
    """Shows layers' outputs to a probe."""

    def __init__(self, probe: Probe, inside: Inside, *, inputs: bool) -> None:
        self._look = _Look(probe)
        self._inside = inside
        self._inputs = inputs
        self._handles: list[Any] = []

    def add(self, component: str, module: Any) -> None:
        """Watch every layer of a network."""
        for path, layer in module.named_modules():
            if path:
                hook = self._hook(component, path)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Watch nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, component: str, path: str) -> Any:
        calls = 0

        def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            nonlocal calls
            calls += 1
            if not self._inside(component, path, calls):
                return None
            name = f"inside/{component}/{path}/{calls:04}"
            if self._inputs:
                self._through(f"{name}/in", given)
                for key, one in named.items():
                    self._through(f"{name}/in/{key}", one)
            return self._through(name, output)

        return hook

    def _through(self, name: str, output: Any) -> Any:
        """Show what a layer gave, a tensor or a tuple of such; anything else is left alone."""
        import torch

        if isinstance(output, torch.Tensor):
            return self._look(f"{name}/0", output) if output.is_floating_point() else output
        if type(output) is tuple:
            return tuple(
                self._look(f"{name}/{number}", one)
                if isinstance(one, torch.Tensor) and one.is_floating_point()
                else one
                for number, one in enumerate(output)
            )
        return None


class _StepWatch:
    """Reports each denoising step, and remembers on the device whether its latents were finite."""

    def __init__(
        self,
        device: devices.Device,
        item: str,
        total: int,
        work: _Work,
        glimpse: Callable[..., Image | None],
    ) -> None:
        self._device = device
        self._request = work.request
        self._glimpse = glimpse
        self._shown = {
            round(total * (number + 1) / (work.previews + 1)) for number in range(work.previews)
        } - {0, total}
        self._item = item
        self._total = total
        self._listen = work.listen
        self._look = work.look
        self._finite: list[torch.Tensor] = []
        self._start = time.perf_counter()

    def __call__(self, step: int, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        self._look.first(f"denoise/{step:04}/velocity", velocity)
        latents = self._look.first(f"denoise/{step:04}/latents", latents)
        self._finite.append(latents.isfinite().all())
        if self._listen is not None:
            preview = None
            if step in self._shown:
                preview = self._glimpse(step, latents, velocity, self._request)
            self._report(step, self._listen, preview)
        return latents

    def _report(self, step: int, listen: Listener, preview: Image | None) -> None:
        self._device.synchronize()  # or the time shown would be that of asking, not of computing
        listen(
            Progress(
                stage="denoise",
                item=self._item,
                done=step,
                total=self._total,
                unit="steps",
                seconds=time.perf_counter() - self._start,
                preview=preview,
            )
        )

    def first_bad_step(self) -> int | None:
        """Return the first step after which something was not finite, counted from 1."""
        import torch

        finite = torch.stack(self._finite).tolist() if self._finite else []
        return finite.index(False) + 1 if False in finite else None


def _tensors(conditioning: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a conditioning holds, one tensor or several under each name."""
    for name, value in vars(conditioning).items():
        for tensor in value if isinstance(value, tuple) else (value,):
            yield name, tensor


def _to_array(tensor: torch.Tensor) -> Array:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    held = tensor.detach().cpu().contiguous()
    bits = (held.view(torch.uint16) if dtype == "bfloat16" else held).numpy()
    bits.flags.writeable = False  # on a CPU it is the run's own memory
    return Array(dtype, bits)


def _to_tensor(array: Array) -> torch.Tensor:
    import torch

    found = torch.from_numpy(array.bits.copy())
    return found.view(torch.bfloat16) if array.dtype == "bfloat16" else found


def _item(indexes: Sequence[int]) -> str:
    if len(indexes) == 1:
        return f"picture {indexes[0]}"
    return f"pictures {indexes[0]} to {indexes[-1]}"


def _to_image(pixels: torch.Tensor) -> Image:
    """Turn (3, height, width) from -1..1 into 8 bits, rounded to nearest as diffusers does."""
    from PIL import Image as Images

    unit = (pixels.cpu().float() / 2 + 0.5).clamp(0, 1)
    levels = (unit * 255).round().byte().permute(1, 2, 0).contiguous()
    return Images.fromarray(levels.numpy())


def _check_image(image: Image) -> None:
    """Refuse a picture of a single colour; every stage before was finite."""
    ranges: Any = image.getextrema()
    if any(low != high for low, high in ranges):
        return
    colour = tuple(low for low, _ in ranges)
    what = "black" if not any(colour) else "one flat colour"
    raise BrokenPictureError(
        f"the picture is {what}",
        seen=f"every pixel is RGB {colour}; all stages gave finite numbers",
        hint="the weights may be wrong for this model; or try --dtype float32",
    )


def _difference(alone: Image, together: Image) -> dict[str, Any]:
    """Compare the pixels of one picture made alone and in a batch."""
    from PIL import ImageChops

    ranges: Any = ImageChops.difference(alone, together).getextrema()
    largest = max(high for _, high in ranges)
    return {"bits": "close" if largest else "identical", "max_pixel_difference": largest}


def _digest(noise: torch.Tensor) -> str:
    data = noise.numpy()
    if sys.byteorder == "big":
        data = data.byteswap()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"danqing": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    versions["torch"] = str(devices.import_torch().__version__)  # with its build: +cpu, +cu128
    return versions
