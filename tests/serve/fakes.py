"""A painter without a model, for what is hard to make a real one do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from PIL import Image

from danqing.generation import Picture, Progress, Provenance
from danqing.models.base import ModelSpec
from danqing.request import Request
from danqing.serve.jobs import Order
from danqing.serve.service import Limits, Service, Worker

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping

    from danqing.runner import Listener

SPEC = ModelSpec(
    family="fake", kind="1", title="a fake", defaults={"height": 64, "width": 64}, no_effect={},
    size_multiple=16, limits={},
)  # fmt: skip
PLAN = SimpleNamespace(device="cpu", chip="none", dtype="float32", placement="resident")
ORIGIN = Provenance(
    model={"name": "fake"}, device={}, dtype="float32", dtypes={}, dtype_reason="", attention="",
    placement="", versions={}, noise_sha256="", batch={},
)  # fmt: skip


class FakePainter:
    spec = SPEC
    plan: Any = PLAN

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.raises: Exception | None = None
        self.closed = 0

    def load(self, listen: Listener | None = None) -> None:
        pass

    def tokens(self, request: Request) -> tuple[int, int, int]:
        return 1, 0, 1

    def paint(
        self, request: Request, *, listen: Listener | None = None, previews: int = 0
    ) -> Iterator[Picture]:
        if self.gate is not None:
            self.gate.wait(10)
        if self.raises is not None:
            raise self.raises
        for index in range(request.num_images_per_prompt):
            if listen is not None:
                listen(Progress(stage="denoise", item="", done=1, total=1, unit="steps"))
            image = Image.new("RGB", (64, 64), (index, 10, 10))
            yield Picture(
                image=image,
                request=request.select(index),
                index=index,
                stages=(),
                provenance=ORIGIN,
            )

    def answers(self) -> bool:
        return True

    @property
    def memory(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        self.closed += 1

    def order(self, *, seed: int = 0, count: int = 1) -> Order:
        request = Request(prompt="x", seed=seed, height=64, width=64, num_images_per_prompt=count)
        return Order(model="fake", request=request)


def make_service(painter: FakePainter, **options: Any) -> Service:
    """Return a service at work; limits and parts by name."""
    limits = {name: options.pop(name) for name in list(options) if name in vars(Limits())}
    service = Service(
        [Worker("cpu", {"fake": lambda: painter})],
        {"fake": SPEC},
        limits=Limits(**limits),
        **options,
    )
    service.load()
    return service
