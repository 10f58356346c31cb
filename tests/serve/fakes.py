"""A service at work whose runner is a fake, and orders for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.request import Request
from danqing.serve.jobs import Order
from danqing.serve.limits import Limits
from danqing.serve.service import Service
from danqing.serve.worker import Worker
from tests.fakes import SPEC

if TYPE_CHECKING:
    from danqing.runner import Runner


def make_order(*, seed: int = 0, count: int = 1) -> Order:
    request = Request(prompt="x", seed=seed, height=64, width=64, num_images_per_prompt=count)
    return Order(model="fake", request=request)


def make_service(runner: Runner, **options: Any) -> Service:
    """Return a service at work; limits and parts by name."""
    limits = {name: options.pop(name) for name in list(options) if name in vars(Limits())}
    service = Service(
        [Worker("cpu", {"fake": lambda: runner})],
        {"fake": SPEC},
        limits=Limits(**limits),
        **options,
    )
    service.load()
    return service
