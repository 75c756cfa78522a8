"""Tensors of safetensors files that are made as they are asked for: of a million most are only compared, many at a time."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_GATHERED = 256  # bytes of a tensor, from which on it is copied by itself


class Kind(NamedTuple):
    """Format and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int


# where a tensor lies: the memory of its file, the byte it begins at, its kind (a plain tuple: there may be a million)
Stored = tuple[mmap.mmap, int, Kind]


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name; `stored` says where they lie."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        memory, begin, (dtype, shape, numel) = self.stored[name]
        size = numel * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin).view(dtype).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Tensors of one kind, a row each: (tensors, elements)."""
        first = self.stored[names[0]][2]
        size = first.numel * first.dtype.itemsize
        found = np.empty((len(names), size), dtype=np.uint8)
        by_memory: dict[int, list[int]] = {}
        for row, name in enumerate(names):
            by_memory.setdefault(id(self.stored[name][0]), []).append(row)
        for mine in by_memory.values():
            begins = np.array([self.stored[names[row]][1] for row in mine])
            data = np.frombuffer(self.stored[names[mine[0]]][0], dtype=np.uint8)
            if size < _GATHERED:
                found[mine] = data[begins[:, None] + np.arange(size)]
            else:
                for row, begin in zip(mine, begins.tolist(), strict=True):
                    found[row] = data[begin : begin + size]
        return torch.from_numpy(found).view(first.dtype)


def stored_tensors(memory: mmap.mmap, start: int, header: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors that the header of a file describes, whose bytes begin at `start`.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: it is damaged.
    """
    room = len(memory) - start
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, size = _kind(entry["dtype"], *entry["shape"])
            first, last = entry["data_offsets"]
            if (
                last - first != size
                or type(first) is not int
                or type(last) is not int
                or not 0 <= first <= last <= room
            ):
                raise ValueError(
                    f"bytes {first} to {last} cannot hold a {entry['dtype']} tensor of shape {entry['shape']}"
                )
            found[name] = (memory, start + first, kind)
    return found


@functools.lru_cache(4096)
def _kind(dtype: str, *lengths: Any) -> tuple[Kind, int]:
    """The kind, and its bytes."""
    if dtype not in DTYPES:
        raise ValueError(f"a format that torch does not have: {dtype!r}")
    shape = tuple(map(int, lengths))
    if any(length < 0 for length in shape):
        raise ValueError(f"a tensor of shape {list(shape)}")
    kind = Kind(DTYPES[dtype], shape, math.prod(shape))
    size = kind.numel * kind.dtype.itemsize
    if not size:
        torch.empty(shape, dtype=kind.dtype, device="meta")  # a shape that torch has no room for
    return kind, size
