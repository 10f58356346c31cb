"""Showing a run's tensors to a probe, and taking what it returns in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from danqing.arrays import Array
from danqing.plan import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from danqing.models.model import Model
    from danqing.plan import Plan
    from danqing.request import Resolved
    from danqing.runner import Inside, Probe


class Look:
    """Shows tensors to a probe, and takes what it returns in their place."""

    def __init__(self, probe: Probe | None, *, pictures: int = 1) -> None:
        """Keep the probe; of several images together it sees the first, and replaces nothing."""
        self._probe = probe
        self._pictures = pictures

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Show a tensor; return it, or what the probe returned instead."""
        if self._probe is None:
            return tensor
        other = self._probe(name, to_array(tensor))
        if other is None or self._pictures > 1:
            return tensor
        return to_tensor(other).to(tensor.device, tensor.dtype)

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


class Hooks:
    """Shows layers' outputs to a probe."""

    def __init__(self, probe: Probe, inside: Inside, *, inputs: bool) -> None:
        """Keep which layers are shown, and whether their inputs are shown too."""
        self._look = Look(probe)
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


def joint_bytes(model: Model, plan: Plan, request: Resolved) -> int:
    """Return the bytes of all tensors that a probe of one image is shown at the joints."""
    sizes = {part.name: DTYPES[part.dtype] for part in plan.components}
    draws = [draw.numel() for draw in model.draw(request, request.seed)]
    latents = 2 * request.num_inference_steps * draws[0]
    conditioning = model.conditioning_size(request)
    pixels = 3 * request.height * request.width * sizes[model.role("decoder")[-1]]
    return (conditioning + latents) * DTYPES[plan.dtype] + 4 * sum(draws) + pixels


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor's values on the host, read-only."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    held = tensor.detach().cpu().contiguous()
    bits = (held.view(torch.uint16) if dtype == "bfloat16" else held).numpy()
    bits.flags.writeable = False  # on a CPU it is the run's own memory
    return Array(dtype, bits)


def to_tensor(array: Array) -> torch.Tensor:
    """Return a copy of an array as a tensor on the host."""
    import torch

    found = torch.from_numpy(array.bits.copy())
    return found.view(torch.bfloat16) if array.dtype == "bfloat16" else found


def tensors_of(conditioning: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a conditioning holds, one tensor or several under each name."""
    for name, value in vars(conditioning).items():
        for tensor in value if isinstance(value, tuple) else (value,):
            yield name, tensor
