"""Do replicas agree? A checksum of stored values at fixed positions, the same on every rank that holds the same elements.

Replicas of a tensor (DDP, `Replicate`, the outer dimension of a hybrid mesh) take the same updates and must stay equal to
the bit. One that does not (a broadcast left out, a gradient that was not reduced, a rank that loaded other weights, a
hardware fault) trains another model, and nothing fails. Looked at once a window, at 64 elements per tensor: more of them
differ once one does. Compared by `joint`.

Legend: n tensors, K samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from update_watch.measure.parameters import Row
from update_watch.measure.sampling import Sampler, gather, local, unsamplable
from update_watch.measure.transfer import Batch, Part

_SAMPLES = 64
_BITS = 24  # exact in FP32


class ChecksumWindow(NamedTuple):
    """Checksums on their way to the host."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    values: Part


class Checksums:
    """Takes checksums of parameters; keeps their positions."""

    def __init__(self) -> None:
        self._samplers: dict[int, tuple[Tensor, Sampler]] = {}

    def take(self, rows: Iterable[Row], batch: Batch) -> list[ChecksumWindow]:
        """Send the checksums of all rows that have elements here along with `batch`."""
        by_device: dict[torch.device, list[Row]] = {}
        for row in rows:
            shard = local(row.param)
            if not unsamplable(shard) and not shard.is_complex() and shard.numel() and part_of(row.param) is not None:
                by_device.setdefault(shard.device, []).append(row)
        windows = []
        for members in by_device.values():
            members.sort(key=lambda row: str(row.param.dtype))
            samplers = [self._sampler(row.param) for row in members]
            views = [s.view(local(row.param.detach())) for s, row in zip(samplers, members, strict=True)]
            held_nK = gather(views, samplers)
            names = tuple(row.names[0] for row in members)
            parts = tuple(part_of(row.param) or "" for row in members)
            windows.append(ChecksumWindow(names, parts, batch.add(_checksums(held_nK))))
        return windows

    def _sampler(self, param: Tensor) -> Sampler:
        kept = self._samplers.get(id(param))
        if kept is None or kept[0] is not param:
            kept = self._samplers[id(param)] = param, Sampler(local(param), _SAMPLES)
        return kept[1]


def _checksums(held_nK: Tensor) -> Tensor:
    """[n] FP32 whole numbers below 2^24, of the bits and their places."""
    bits_nK = held_nK.view(torch.int32).to(torch.int64)
    places_K = torch.arange(held_nK.shape[1], device=held_nK.device) * 40503 + 1
    sums_n = (bits_nK * places_K).sum(-1)
    return (sums_n ^ (sums_n >> _BITS)).bitwise_and(2**_BITS - 1).to(torch.float32)


def read(windows: Iterable[ChecksumWindow]) -> Mapping[str, tuple[str, int]]:
    """name -> (part, checksum). Waits for the device."""
    found = {}
    for window in windows:
        for name, part, value in zip(window.names, window.parts, window.values.wait(), strict=True):
            found[name] = part, int(value)
    return found


def part_of(param: Tensor) -> str | None:
    """Which part of a tensor this rank holds: ranks that answer alike hold the same elements. None: not known."""
    if local(param) is param:
        # FSDP1 gives each rank a flat piece, cut out of a larger memory, without saying which
        is_piece = param.dim() == 1 and param.untyped_storage().nbytes() > param.numel() * param.element_size()
        return None if is_piece else ""
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]  # a DTensor
    at = mesh.get_coordinate()
    if at is None or any(place.is_partial() for place in placements):
        return None
    return ",".join(f"{i}:{at[i]}" for i, place in enumerate(placements) if not place.is_replicate())
