"""A runner without a model, for what is hard to make a real one do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from danqing.generation import Generation, Picture, Progress, Provenance
from danqing.models.base import ModelSpec
from danqing.request import Request, Resolved

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping

    from danqing.runner import Inside, Listener, Probe, Probed

SPEC = ModelSpec(
    family="fake", kind="1", title="a fake", defaults={"height": 64, "width": 64}, no_effect={},
    size_multiple=16, limits={},
)  # fmt: skip
ORIGIN = Provenance(
    model={"name": "fake"}, device={}, dtype="float32", dtypes={}, dtype_reason="", attention="",
    placement="", versions={}, noise_sha256="", batch={},
)  # fmt: skip


@dataclass(frozen=True)
class FakeSetup:
    device: str = "cpu"
    chip: str = "none"
    dtype: str = "float32"
    placement: str = "resident"


@dataclass
class FakeRunner:
    """Makes one image after the other, of one color each.

    Attributes:
        gate: each request waits for it.
        raises: instead of the first image.
        closed: how often it was closed.
    """

    gate: threading.Event | None = None
    raises: BaseException | None = None
    spec: ModelSpec = SPEC
    plan: FakeSetup = field(default_factory=FakeSetup)
    fingerprint: str = "0" * 64
    closed: int = 0

    def load(self, listen: Listener | None = None) -> None:
        pass

    def answers(self) -> bool:
        return True

    def tokens(self, request: Request | Resolved) -> tuple[int, int, int]:
        return 1, 0, 1

    @property
    def memory(self) -> Mapping[str, int]:
        return {}

    @property
    def stages(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def paint(
        self,
        request: Request | Resolved,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        previews: int = 0,
    ) -> Iterator[Picture]:
        if self.gate is not None:
            self.gate.wait(10)
        if self.raises is not None:
            raise self.raises
        resolved = self._resolve(request)
        for index in range(resolved.num_images_per_prompt):
            if listen is not None:
                listen(Progress(stage="denoise", item="", done=1, total=1, unit="steps"))
            one = resolved.single(index)
            image = Image.new("RGB", (one.width, one.height), (index, 10, 10))
            yield Picture(
                image=image, request=one.request, index=index, stages=(), provenance=ORIGIN
            )

    def generate(
        self,
        prompt: str | Request | Resolved,
        /,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        **settings: object,
    ) -> Generation:
        request = Request(prompt=prompt, **settings) if isinstance(prompt, str) else prompt
        resolved = self._resolve(request)
        pictures = tuple(self.paint(resolved, batch=batch, listen=listen))
        return Generation(pictures=pictures, request=resolved.request)

    def probe(
        self,
        request: Request | Resolved,
        probe: Probe,
        /,
        *,
        inside: Inside | None = None,
        inputs: bool = False,
    ) -> Picture:
        return next(self.paint(request))

    def close(self) -> None:
        self.closed += 1

    def _resolve(self, request: Request | Resolved) -> Resolved:
        return request if isinstance(request, Resolved) else self.spec.resolve(request)


if TYPE_CHECKING:
    CHECKED: type[Probed] = FakeRunner
