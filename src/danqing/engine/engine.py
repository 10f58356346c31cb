"""The engine: opens a checkpoint on a device under a plan, and turns requests into images."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

from danqing import devices, models, plan, weights
from danqing.engine.active import ActiveRequest
from danqing.engine.batches import Batches
from danqing.engine.clock import StageClock
from danqing.engine.conditions import Conditions
from danqing.engine.flops import count_flops
from danqing.engine.probe import Hooks, Look, joint_bytes
from danqing.engine.provenance import origin_of
from danqing.engine.queue import DeviceQueue, is_taken
from danqing.engine.residence import Residence
from danqing.engine.stages import Stages
from danqing.generation import Generation, Picture, Provenance, StageCost
from danqing.request import Request, Resolved, check_batch
from danqing.turns import LAZY_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from danqing.models.base import ModelSpec
    from danqing.models.model import Model
    from danqing.options import Options
    from danqing.runner import Inside, Listener, Probe


class Engine:
    """One model on one device, for any number of threads.

    A device computes one request at a time. Calls from other threads wait, in order of arrival; a
    listener hears how many are ahead, and cancels by raising an exception.

    Attributes:
        checkpoint: the weights.
        spec: which model it is and what it takes.
        plan: what will happen, with reasons.
        options: how it was asked to run.
        device: what computes.
    """

    def __init__(
        self,
        model: Model,
        device: devices.Device,
        the_plan: plan.Plan,
        *,
        places: Mapping[str, devices.Device],
        options: Options,
    ) -> None:
        """Keep the parts; `Engine.open` finds and checks them."""
        self.checkpoint = model.checkpoint
        self.spec: ModelSpec = model.spec
        self.plan = the_plan
        self.options = options
        self.device = device
        self._model = model
        self._places = dict(places)
        self._queue = DeviceQueue([device.name, *(other.name for other in places.values())])
        self._clock = StageClock(the_plan, device, places)
        self._residence = Residence(model, the_plan, self._clock, places)
        self._conditions = Conditions(model, options.prompt_cache, lambda: self._origin)
        self._stages = Stages(model, the_plan, self._clock, self._residence, self._conditions)
        self._batches = Batches(model, self._stages, lambda: self._origin)
        self._loads: list[StageCost] = []

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
        return cls(model, selection.device, the_plan, places=places, options=options)

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
        with self._queue.work(None):
            self._residence.clear()
            self.forget()
            self.checkpoint.close()
            self.device.release()

    def forget(self) -> None:
        """Forget what earlier prompts became; weights stay."""
        with self._queue.hold(None):
            self._conditions.clear()
            self._model.forget()

    def load(self, listen: Listener | None = None) -> None:
        """Read all weights now rather than at the first picture (if the plan keeps them)."""
        if self.plan.placement != "resident":
            return
        with self._computing(listen):
            for stage, names in self._model.stages.items():
                # a cached prompt may need no text encoder
                if stage != "encode" or self.options.prompt_cache is None:
                    self._residence.load(names, self._loads, listen)

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
        with self._queue.hold(listen):
            pictures = tuple(self.paint(resolved, batch=batch, listen=listen))
        return Generation(pictures=pictures, request=resolved.request)

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
        hooks = Hooks(probe, inside, inputs=inputs) if inside else None
        with self._queue.hold(None), self._conditions.bypassed(), self._residence.watched(hooks):
            count = request.num_images_per_prompt
            picture, *_ = self.paint(request, batch=count, probe=probe)
        return picture

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
            listen: called with progress.
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
            conditioning, more = self._stages.encode(request, costs, listen)
            look = Look(probe, pictures=request.num_images_per_prompt)
            seen = look.through(conditioning)
        work = ActiveRequest(request, seen, request.notes + more, listen, look, previews)
        # 3. Noise becomes latents becomes pixels, one picture or batch after the other.
        for first in range(0, request.num_images_per_prompt, batch):
            indexes = range(first, min(first + batch, request.num_images_per_prompt))
            with self._computing(listen):
                pictures = self._batches.paint(work, indexes, costs)
            yield from pictures
            costs = [cost for cost in costs if cost.name == "encode"]

    def _resolve(self, request: Request | Resolved) -> Resolved:
        return request if isinstance(request, Resolved) else self.spec.resolve(request)

    @contextlib.contextmanager
    def _computing(self, listen: Listener | None = None) -> Iterator[None]:
        """Hold the device to compute; afterwards no stage keeps what the plan does not keep.

        Raises:
            BusyError: this very thread is computing: a listener or a probe called the engine.
        """
        with self._queue.work(listen):
            try:
                self.device.prepare()
                yield
            finally:
                for stage in self._model.stages:  # also those an error left loaded
                    self._residence.drop_stage(stage)

    @cached_property
    def _origin(self) -> Provenance:
        return origin_of(self._model, self.plan, self.device, self._places, options=self.options)

    # --- what others ask -------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Digest of the weights' headers."""
        return self.checkpoint.fingerprint

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the device: in all, free, and the peak since the last stage began; if known."""
        memory, peak = self.device.memory(), self.device.peak_bytes()
        found = {} if memory is None else {"total": memory.total_bytes, "free": memory.free_bytes}
        return found if peak is None else {**found, "peak": peak}

    @property
    def stages(self) -> Mapping[str, tuple[str, ...]]:
        """Components that each stage may need, in the order of the work."""
        return self._model.stages

    def answers(self) -> bool:
        """Return whether the device computes.

        A device that is at work computes: this does not wait for its turn.
        """
        return is_taken(self.device.name) or self.device.answers()

    def tokens(self, request: Request | Resolved) -> tuple[int, int, int]:
        """Return the tokens of the prompt, of the pictures to edit, and of a picture painted."""
        return self._model.tokens(self._resolve(request))

    def trace_bytes(self, request: Resolved) -> int:
        """Return how many bytes of tensors a probe of this request will be shown at the joints."""
        return joint_bytes(self._model, self.plan, request)

    def step_flops(self, request: Resolved) -> int:
        """Count the floating-point operations of one denoising step of one image, by doing it."""
        asked = request.request.replace(num_inference_steps=1, num_images_per_prompt=1)
        request = self.spec.resolve(asked)
        with self._computing():
            conditioning, _ = self._stages.encode(request, [], None)
            modules = self._residence.load(self._model.needs("denoise", request), [], None)
            return count_flops(self._model, modules, conditioning, request)

    def layers(self, component: str) -> tuple[str, ...]:
        """Return the paths of a network's layers, from the files' headers: nothing is read."""
        network, _ = self._model.matched(component)
        return tuple(path for path, _ in network.named_modules() if path)
