"""Tensors from checkpoint files, without running anything in them.

safetensors files hold no code and are read here: a header in JSON, then the bytes. Torch files are pickles and are read
with `weights_only=True`, which builds tensors and plain data and refuses everything else. Both are mapped into memory,
so a large file costs only what is looked at.
"""

from __future__ import annotations

import mmap
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from update_watch.checkpoints.header import header_of
from update_watch.checkpoints.stored import StoredFile, StoredTensors, stored_file
from update_watch.columns.name_levels import WRAPPERS
from update_watch.kinds import without_wrappers
from update_watch.wording import first_line

_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
# where training loops put the weights, beside optimizer, counters and settings
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states")  # and an optimizer's state
_DEEPEST = 100  # containers within containers
_MOST = 2_000_000  # tensors and containers looked at in a torch file: lists that hold one another twice have no end


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message names it and says why."""


def read_tensors(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Args:
        path: a safetensors file, a folder of such, or a file written by `torch.save`. Where weights lie under
            "state_dict" or "model" in it, only those are returned.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, it is damaged, or it could only be read by running what is in it.
    """
    path = _present(path)
    tensors = _read_folder(path) if path.is_dir() else _read_file(path)
    if not tensors:
        raise CheckpointError(f"{path}: there are no tensors in it")
    has_wrappers = _has_wrappers(tensors)
    if isinstance(tensors, StoredTensors):
        return tensors.renamed(without_wrappers) if has_wrappers else tensors
    return {without_wrappers(name) if has_wrappers else name: tensor.detach() for name, tensor in tensors.items()}


def _read_folder(path: Path) -> Mapping[str, Tensor]:
    if (path / ".metadata").exists():
        raise CheckpointError(
            f"{path}: a folder of torch.distributed.checkpoint, whose index is a pickle and is not read; convert it"
            " with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: a folder without *.safetensors files; name the file itself")
    return StoredTensors([_read_safetensors(file) for file in files])


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if _is_safetensors(path):
        return StoredTensors([_read_safetensors(path)])
    content = _load(path)
    try:
        if isinstance(content, Mapping):
            for key in _WEIGHTS:
                weights = dict(_flatten(content.get(key)))
                if weights:
                    return weights
        return dict(_flatten(content))
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def _present(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise CheckpointError(f"{path}: a checkpoint is a file or a folder, and this is neither")
    return path


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    # 8 bytes of header length, then JSON: neither a zip archive nor a pickle begins like that
    return path.suffix == ".safetensors" or start[8:] == b"{"


def read_optimizer(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """The `state_dict()` of an optimizer in a file written by `torch.save`: by itself, or beside the weights; None where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or only by running what is in it.
    """
    path = _present(path)
    if path.is_dir() or _is_safetensors(path):
        return None
    content = _load(path)
    within = [content.get(key) for key in _OPTIMIZERS] if isinstance(content, Mapping) else []
    first = [one[0] if isinstance(one, (list, tuple)) and one else one for one in (content, *within)]
    return next((one for one in first if isinstance(one, Mapping) and {"state", "param_groups"} <= set(one)), None)


def _load(path: Path) -> Any:
    """What is in a file written by `torch.save`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch calls new
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: it is damaged, or holds objects other than tensors and plain data, which could run code and are"
            f" not loaded; save the model's state_dict() by itself ({first_line(error)})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damage makes torch's reader fail in any way
        raise CheckpointError(f"{path}: not a readable checkpoint ({first_line(error)})") from error


def _flatten(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in containers, named by the path to them, in order. ValueError where there is no end of it."""
    waiting: list[tuple[str, int, Any]] = [("", 0, value)]
    seen = 0
    while waiting:
        name, depth, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
            continue
        items: list[tuple[Any, Any]] = []
        if isinstance(value, Mapping):
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        # a tuple as key could be as deep as the rest
        keys = [str(key) if isinstance(key, (str, int, float)) else type(key).__name__ for key, _ in items]
        children = [
            (f"{name}.{key}" if name else key, depth + 1, item)
            for key, (_, item) in zip(keys, items, strict=True)
            if isinstance(item, (Tensor, Mapping, list, tuple))
        ]
        seen += len(children) + len(items) // 50
        if items and (depth >= _DEEPEST or seen > _MOST):
            raise ValueError(
                f"its containers are nested more than {_DEEPEST} deep, or hold more than {_MOST:,} things: no checkpoint"
                " of weights; save the model's state_dict() by itself"
            )
        waiting += reversed(children)


def _read_safetensors(path: Path) -> StoredFile:
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: damaged: {size} bytes are too few for a safetensors file")
    with path.open("rb") as file:
        # a private copy: torch wants memory that may be written to
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(memory[:8], "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path}: damaged: a header of {length} bytes in a file of {size}")
    try:
        return stored_file(memory, 8 + length, header_of(memory[8 : 8 + length]))
    except Exception as error:  # whatever a damaged header makes of it: JSON 5,000 deep, numbers without end
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error


def _has_wrappers(names: Iterable[str]) -> bool:
    together = "\n".join(names)
    return any(f"{wrapper}." in together for wrapper in (*WRAPPERS, "module"))
