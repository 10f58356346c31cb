"""What the service takes on, and the check of an order against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from danqing.errors import RequestError

if TYPE_CHECKING:
    from danqing.runner import Runner
    from danqing.serve.jobs import Order


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes on.

    Attributes:
        queue: jobs that wait.
        per_client: jobs of one client that wait or run.
        side: of a picture, in pixels.
        steps: of one picture.
        pictures: of one job.
        deadline: seconds from acceptance to the last picture.
        grace: seconds that a running job has to finish when the server is stopped.
    """

    queue: int = 64
    per_client: int = 16
    side: int = 1024
    steps: int = 100
    pictures: int = 10
    deadline: float = 600.0
    grace: float = 30.0


def plan_order(runner: Runner, order: Order, limits: Limits) -> Order:
    """Fill in an order's request, and see that it is one the service takes.

    Raises:
        RequestError: a setting cannot be, would have no effect, or is beyond a limit.
    """
    resolved = runner.spec.resolve(order.request)
    _check_limit("num_inference_steps", resolved.num_inference_steps, limits.steps)
    _check_limit("n", resolved.num_images_per_prompt, limits.pictures)
    for name in ("height", "width"):
        _check_limit(name, getattr(resolved, name), limits.side)
    return replace(order, request=resolved.request, notes=(*order.notes, *resolved.notes))


def _check_limit(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(
            f"{name} is too large for this server", seen=value, allowed=f"1 to {most}", setting=name
        )
