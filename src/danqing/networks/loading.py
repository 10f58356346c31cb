"""From tensors on disk to a module: strict, lazy, mapped where the dtype stays.

Key maps are data: a `Row` says which tensor of the file holds which tensors of the module. The
same rows are used to load and to write.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from danqing.errors import TensorMismatchError
from danqing.networks.of_torch import WithoutInitialization, put_tensor
from danqing.networks.of_transformers import unsaved_buffer
from danqing.weights import QUANTISED
from danqing.weights.quantised import BYTES
from danqing.weights.tensor_file import FLOAT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from danqing.weights import Component
    from danqing.weights.tensor_file import TensorEntry

Change = Literal["", "swap_halves", "conv_to_linear"]
"""`swap_halves`: the two halves of the rows change places. `conv_to_linear`: (O, I, 1, 1) is
(O, I)."""

CASTABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"} | QUANTISED
"""Dtypes whose values are known; whole numbers need a scale."""
SHOWN = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a file and the tensors of the module it is cut into along its rows."""

    source: str
    targets: tuple[str, ...]
    change: Change = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor of the module comes from: rows `start` to `stop` of a source."""

    source: str
    start: int
    stop: int
    change: Change


def identity_rows(targets: Iterable[str]) -> list[Row]:
    """Return rows for a file that uses the module's own names."""
    return [Row(name, (name,)) for name in targets]


def both(source: str, *targets: str, change: Change = "") -> Iterator[Row]:
    """Yield the rows of a layer's weight and bias."""
    for leaf in ("weight", "bias"):
        yield Row(f"{source}.{leaf}", tuple(f"{target}.{leaf}" for target in targets), change)


def match(
    component: Component,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Iterable[Row],
    *,
    ignored: Callable[[str], bool] = lambda _: False,
) -> dict[str, Piece]:
    """Compare a file's tensors with a module's, and return where each of the module's comes from.

    Args:
        component: the weights.
        shapes: of the module's tensors.
        rows: the key map.
        ignored: tensors known to be of no use to this module.

    Raises:
        TensorMismatchError: listing everything missing, unexpected and misshapen.
    """
    rows = list(rows)
    held = component.entries
    sources = {row.source for row in rows}
    missing = sorted(sources - held.keys())
    unexpected = sorted(name for name in held.keys() - sources if not ignored(name))
    pieces: dict[str, Piece] = {}
    misshapen = []
    for row in rows:
        if row.source not in held:
            continue
        if not shapes.keys() >= set(row.targets):
            unexpected.append(row.source)
            continue
        start = 0
        for target in row.targets:
            stop = start + (shapes[target][0] if shapes[target] else 1)
            pieces[target] = Piece(row.source, start, stop, row.change)
            start = stop
        wanted = _wanted_shape(row, shapes)
        if held[row.source].shape != wanted:
            misshapen.append(f"{row.source} is {held[row.source].shape}, not {wanted}")
        elif not _is_castable(held[row.source]):
            misshapen.append(f"{row.source} is of dtype {held[row.source].dtype}")
    if missing or unexpected or misshapen:
        raise _mismatch(component, missing, unexpected, misshapen)
    return pieces


def _is_castable(entry: TensorEntry) -> bool:
    """Say whether a tensor's values are known: whole numbers are, if they have a scale."""
    return entry.dtype in CASTABLE or (entry.dtype in BYTES and entry.scale is not None)


def _wanted_shape(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[row.targets[0]]
    if not first:
        return first
    rows = sum(shapes[target][0] for target in row.targets)
    tail = (1, 1) if row.change == "conv_to_linear" else ()
    return (rows, *first[1:], *tail)


def _mismatch(
    component: Component, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> TensorMismatchError:
    lists = {"missing": missing, "unexpected": unexpected, "of the wrong shape or dtype": misshapen}
    seen = []
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            seen.append(f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    place = component.files[0].parent if component.files else component.folder
    return TensorMismatchError(
        f"the tensors of {component.name} are not those of its architecture",
        seen=f"{place}: " + "; ".join(seen),
        hint="the files are of another model, of another version of it, or not complete",
    )


def fill(
    module: torch.nn.Module,
    component: Component,
    pieces: Mapping[str, Piece],
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    on_bytes: Callable[[int], None],
    streamed: Collection[str] = (),
    read: Callable[[Component, Piece, torch.dtype], torch.Tensor | None] | None = None,
    looked_up: Collection[str] = (),
) -> None:
    """Put a component's tensors into a module that was built on the meta device.

    On a CPU, a tensor whose dtype stays is not copied but stays mapped (see `place`).

    Args:
        module: on the meta device; afterwards on `device`.
        component: the weights.
        pieces: from `match`.
        dtype_of: the dtype wanted for each of the module's tensors.
        device: where they go.
        on_bytes: called with the number of bytes read so far.
        streamed: the module's tensors that are read when they are needed; they are empty here.
        read: reads a tensor instead of mapping it, or says None; without it all are mapped.
        looked_up: tables of which few rows are used: these are mapped all the same, if they are
            used as they are.
    """
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[tuple[Piece, torch.dtype], torch.Tensor] = {}
    for target, piece in pieces.items():
        if target in streamed:
            tensors[target] = torch.empty(0, dtype=dtype_of(target), device=device)
            continue
        dtype = dtype_of(target)
        key = (piece, dtype)
        if key not in tied:
            maps = target in looked_up and stays_mapped(component, piece, dtype, device)
            own = None if read is None or maps else read(component, piece, dtype)
            if own is None:
                mapped = component.read(piece.source, piece.start, piece.stop, dtype)
                tied[key] = place(changed(mapped, piece.change), dtype, device)
            else:
                tied[key] = changed(own, piece.change).to(device)
            entry = component.entries[piece.source]
            rows = max(entry.shape[0], 1) if entry.shape else 1
            done += entry.size_bytes * (piece.stop - piece.start) // rows
        tensors[target] = tied[key]
        on_bytes(done)
    with warnings.catch_warnings():
        # torch warns that a mapped tensor's file is read-only; nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        _assign(module, tensors)
    _compute_buffers(module, device)
    module.requires_grad_(requires_grad=False).eval()


def stays_mapped(
    component: Component, piece: Piece, dtype: torch.dtype, device: torch.device
) -> bool:
    """Say whether a tensor is used as it lies in the file."""
    if piece.source in component.adapters:
        return False
    stored = FLOAT_DTYPES.get(component.entries[piece.source].dtype)
    same = stored is not None and getattr(torch, stored) is dtype is not torch.float32
    return same and device.type == "cpu"


def _assign(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors where those of the meta device were; `match` saw to it that all are there."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        put_tensor(module.get_submodule(owner), leaf, tensor)
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if left:
        msg = f"nothing was loaded for {left[:SHOWN]}"
        raise RuntimeError(msg)


def place(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cast and move a tensor; on a CPU, bring float32 into memory aligned as torch aligns it.

    MKL's float32 product of a matrix with one row has other last bits on a matrix that is not
    aligned to 16 bytes (seen with torch 2.9 and 2.13), and where a tensor lies in its file depends
    on the layout. Copied, the same weights give the same picture from every layout. Products in
    bfloat16 do not mind, so the large checkpoints stay mapped.
    """
    placed = tensor.to(dtype).to(device)
    if dtype is torch.float32 and placed.data_ptr() == tensor.data_ptr():
        placed = placed.clone()
    return placed


def _compute_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Make the buffers that no file keeps, which the meta device left empty; move the others."""
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if not buffer.is_meta:
            setattr(module.get_submodule(owner), leaf, buffer.to(device))
            continue
        made = unsaved_buffer(leaf, buffer.shape).to(device)
        module.get_submodule(owner).register_buffer(leaf, made, persistent=False)


def changed(tensor: torch.Tensor, change: Change) -> torch.Tensor:
    """Return the rows of a source tensor, changed as their row of the key map says."""
    if change == "swap_halves":
        first, second = tensor.chunk(2)
        return torch.cat([second, first])
    if change == "conv_to_linear":
        return tensor[:, :, 0, 0]
    return tensor


def joined(row: Row, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Undo `changed` for a whole row: return the source tensor made of the module's tensors."""
    tensor = (
        torch.cat([tensors[target] for target in row.targets])
        if len(row.targets) > 1
        else (tensors[row.targets[0]])
    )
    if row.change == "swap_halves":
        first, second = tensor.chunk(2)
        return torch.cat([second, first])
    if row.change == "conv_to_linear":
        return tensor[:, :, None, None]
    return tensor


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor a module keeps."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_meta(make: Callable[[], Any]) -> Any:
    """Build a module without memory for its weights."""
    with torch.device("meta"), WithoutInitialization():
        return make()
