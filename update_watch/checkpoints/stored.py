"""Tensors of safetensors files that are made as they are asked for: of a million most are only compared, many at a time."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from update_watch.checkpoints.header import Header, IntArray

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


class StoredFile(NamedTuple):
    """What is in one file."""

    memory: mmap.mmap
    names: list[str]
    begins: IntArray  # the byte of the file at which each begins
    codes: IntArray  # the kind of each: its place in `kinds`
    kinds: list[Kind]


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, and where they lie: in columns, as there may be a million."""

    def __init__(self, files: Sequence[StoredFile], names: Iterable[str] | None = None) -> None:
        """Of two tensors of one name the later one counts. `names`: other ones than the files have, in their order."""
        kinds: dict[Kind, int] = {}
        codes = [np.array([kinds.setdefault(kind, len(kinds)) for kind in file.kinds], np.int64) for file in files]
        self.kinds = list(kinds)
        self._memories = [file.memory for file in files]
        self._file = np.repeat(np.arange(len(files)), [len(file.names) for file in files])
        self._begin = np.concatenate([np.zeros(0, np.int64), *(file.begins for file in files)])
        self._code = np.concatenate(
            [np.zeros(0, np.int64), *(code[file.codes] for code, file in zip(codes, files, strict=True))]
        )
        found = itertools.chain.from_iterable(file.names for file in files) if names is None else names
        self._place = dict(zip(found, range(len(self._begin)), strict=True))
        self._files = files

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same under other names."""
        names = itertools.chain.from_iterable(file.names for file in self._files)
        return StoredTensors(self._files, map(rename, names))

    def __getitem__(self, name: str) -> Tensor:
        place = self._place[name]
        memory, begin = self._memories[self._file[place]], int(self._begin[place])
        dtype, shape, numel = self.kinds[self._code[place]]
        size = numel * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin).view(dtype).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._place  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def places(self, names: Sequence[str]) -> IntArray:
        """Where each is in the columns."""
        place = self._place
        if len(names) == len(place) and all(map(operator.eq, names, place)):  # a million look-ups take seconds
            return np.fromiter(place.values(), np.int64, len(place))
        return np.array([place[name] for name in names], np.int64)

    def codes(self, places: IntArray) -> IntArray:
        """The kind of each: its place in `kinds`."""
        found: IntArray = self._code[places]
        return found

    def rows(self, places: IntArray) -> Tensor:
        """Tensors of one format and size, a row each: (tensors, elements)."""
        kind = self.kinds[self._code[places[0]]]
        size = kind.numel * kind.dtype.itemsize
        found = np.empty((len(places), size), dtype=np.uint8)
        files = self._file[places]
        for file in np.unique(files).tolist():
            (mine,) = np.nonzero(files == file)
            begins = self._begin[places[mine]]
            data = np.frombuffer(self._memories[file], dtype=np.uint8)
            if size < _GATHERED:
                found[mine] = data[begins[:, None] + np.arange(size)]
            else:
                for row, begin in zip(mine.tolist(), begins.tolist(), strict=True):
                    found[row] = data[begin : begin + size]
        return torch.from_numpy(found).view(kind.dtype)


def stored_file(memory: mmap.mmap, start: int, header: Header) -> StoredFile:
    """The tensors that the header of a file describes, whose bytes begin at `start`.

    Raises:
        ValueError, TypeError, OverflowError: it is damaged.
    """
    kinds = [_kind(*kind) for kind in header.kinds]
    sizes = np.array([kind.numel * kind.dtype.itemsize for kind in kinds], np.int64)[header.codes]
    first, last = header.places.T
    damaged = (first < 0) | (last > len(memory) - start) | (last - first != sizes)
    if damaged.any():
        i = int(damaged.argmax())
        dtype, *shape = header.kinds[header.codes[i]]
        raise ValueError(f"bytes {first[i]} to {last[i]} cannot hold a {dtype} tensor of shape {shape}")
    return StoredFile(memory, header.names, start + first, header.codes, kinds)


@functools.lru_cache(4096)
def _kind(dtype: str, *lengths: Any) -> Kind:
    if dtype not in DTYPES:
        raise ValueError(f"a format that torch does not have: {dtype!r}")
    shape = tuple(map(int, lengths))
    if any(length < 0 for length in shape):
        raise ValueError(f"a tensor of shape {list(shape)}")
    kind = Kind(DTYPES[dtype], shape, math.prod(shape))
    if not kind.numel:
        torch.empty(shape, dtype=kind.dtype, device="meta")  # a shape that torch has no room for
    return kind
