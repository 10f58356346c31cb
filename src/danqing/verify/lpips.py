"""LPIPS: how different two pictures look to a network, from weights on this disk.

Zhang, Isola, Efros, Shechtman, Wang: The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric, 2018; version 0.1 with AlexNet, in float64. The weights are not danqing's: they
are those of the authors' package, saved once as safetensors under their own names:

    import lpips, safetensors.torch
    safetensors.torch.save_file(lpips.LPIPS(net="alex").state_dict(), "lpips-alex.safetensors")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from danqing.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    Values = NDArray[np.float64]

_SHIFT = np.array([-0.030, -0.088, -0.188])[:, None, None]
_SCALE = np.array([0.458, 0.448, 0.450])[:, None, None]
_LAYERS = (("slice1.0", 4, 2), ("slice2.3", 1, 2), ("slice3.6", 1, 1), ("slice4.8", 1, 1),
           ("slice5.10", 1, 1))  # fmt: skip
"""Convolutions of AlexNet: name, stride, padding; each is followed by a ReLU and is looked at."""
_POOLED_BEFORE = {1, 2}
_SMALLEST = 64


def lpips(candidate: Image, reference: Image, weights: Path) -> float:
    """Return the distance, 0 for equal pictures.

    Args:
        candidate: RGB.
        reference: RGB, of the same size, at least 64 pixels a side.
        weights: safetensors with the names of the authors' package, net="alex".

    Raises:
        CheckpointError: the file is not that.
        RequestError: the sizes differ, or the pictures are too small.
    """
    if candidate.size != reference.size or min(candidate.size) < _SMALLEST:
        raise RequestError(
            "LPIPS compares pictures of one size",
            seen="{}x{} and {}x{}".format(*candidate.size, *reference.size),
            allowed=f"equal sizes of at least {_SMALLEST}",
        )
    tensors = _read(weights)
    features = [_features(_normal(image), tensors) for image in (candidate, reference)]
    total = 0.0
    for number, (one, other) in enumerate(zip(*features, strict=True)):
        away = np.square(_unit(one) - _unit(other))
        weight = tensors[f"lin{number}.model.1.weight"].reshape(-1, 1, 1)
        total += float((away * weight).sum(axis=0).mean())
    return total


def _read(place: Path) -> dict[str, Values]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    wanted = [f"net.{name}.{kind}" for name, *_ in _LAYERS for kind in ("weight", "bias")]
    wanted += [f"lin{number}.model.1.weight" for number in range(len(_LAYERS))]
    try:
        found: dict[str, Any] = load_file(place)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            "the weights of LPIPS cannot be read", seen=f"{place}: {error}"
        ) from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            "these are not the weights of LPIPS with AlexNet",
            seen=f"{place}: no {missing[0]}",
            hint="see danqing.verify.lpips for how to save them",
        )
    return {name: found[name].astype(np.float64) for name in wanted}


def _normal(image: Image) -> Values:
    values = np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1)
    normal: Values = (values / 127.5 - 1 - _SHIFT) / _SCALE
    return normal


def _features(states: Values, tensors: dict[str, Values]) -> list[Values]:
    seen = []
    for number, (name, stride, padding) in enumerate(_LAYERS):
        if number in _POOLED_BEFORE:
            states = _pool(states)
        weight, bias = tensors[f"net.{name}.weight"], tensors[f"net.{name}.bias"]
        states = np.maximum(_convolve(states, weight, stride, padding) + bias[:, None, None], 0)
        seen.append(states)
    return seen


def _windows(states: Values, side: int, stride: int) -> Values:
    """Return (channels, rows, columns, side, side)."""
    found: Values = np.lib.stride_tricks.sliding_window_view(states, (side, side), axis=(1, 2))
    return found[:, ::stride, ::stride]


def _convolve(states: Values, weight: Values, stride: int, padding: int) -> Values:
    padded = np.pad(states, ((0, 0), (padding, padding), (padding, padding)))
    windows = _windows(padded, weight.shape[-1], stride)
    result: Values = np.tensordot(weight, windows, axes=([1, 2, 3], [0, 3, 4]))
    return result


def _pool(states: Values) -> Values:
    pooled: Values = _windows(states, 3, 2).max(axis=(3, 4))
    return pooled


def _unit(states: Values) -> Values:
    unit: Values = states / (np.sqrt(np.square(states).sum(axis=0, keepdims=True)) + 1e-10)
    return unit
