"""Flat partitions: one tensor that the optimizer steps, holding pieces of many parameters. Which piece is whose?

ZeRO puts the FP32 weights of a group of parameters into one flat tensor and gives each rank a part of it. Where the wrapper
tells what lies where, each piece is looked at by itself and reported under its parameter's name, as a shard of it. What
lies on other ranks only, is reported by them.

What is read, all of it as the wrappers have it once they are made:

- DeepSpeed ZeRO-1/2 and its BF16 optimizer: `param._hp_mapping.hp_fragment`, a view into the partition;
- DeepSpeed ZeRO-3: `fp32_partitioned_groups_flat` and `fp16_groups` of the wrapper; the pieces lie in it in the order of
  the parameters, `param.ds_tensor.ds_numel` elements each, the last one of a parameter padded;
- Megatron: `param.main_param`, the FP32 copy of a parameter or of this rank's part of it, which is None on ranks that have
  no part; of FP32 parameters the distributed optimizer steps a view into the parameter's memory; its `buffers` tell which
  parameters it has on any rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.sampling import Sampler, local

Names = Mapping[int, tuple[str, ...]]  # id of a parameter -> its names


class Piece(NamedTuple):
    """The elements of one parameter in a flat tensor."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # in the flat tensor
    held: int  # elements of it there


class PieceSampler(Sampler):
    """Sample positions in a piece; it is given the flat tensor, or one laid out like it."""

    __slots__ = ("_start",)

    def __init__(self, flat: Tensor, piece: Piece, samples: int, sets: int = 1) -> None:
        self._start = piece.start
        super().__init__(flat.detach().narrow(0, piece.start, piece.held), samples, sets)

    def view(self, tensor: Tensor) -> Tensor:
        """Samples of the piece; see `Sampler.view`."""
        return super().view(tensor.narrow(0, self._start, self._numel))


def wrappers(optimizer: Any) -> list[Any]:
    """The optimizer and what it wraps, from the outside in."""
    found: list[Any] = []
    while optimizer is not None and all(optimizer is not one for one in found):
        found.append(optimizer)
        attributes = getattr(optimizer, "__dict__", {})
        following = attributes.get("_optimizer")
        optimizer = following if following is not None else attributes.get("optimizer")
    return found


def keepers(params: Iterable[Any], optimizer: Any) -> list[Any]:
    """ZeRO-3's wrapper of an optimizer that came without it, as the parameters know it."""
    found = {id(one): one for one in (getattr(param, "_z3_optimizer", None) for param in params)}
    return [one for one in found.values() if getattr(one, "optimizer", None) is optimizer]


def chain(optimizer: Any) -> list[Any]:
    """The optimizers in Megatron's ChainedOptimizer, or in a container that is none itself; any other as it is."""
    chained = getattr(optimizer, "__dict__", {}).get("chained_optimizers")
    if not isinstance(chained, (list, tuple)) or not chained:
        return _kept_by(optimizer) or [optimizer]
    # a stub stands for parameters of which this rank has none
    members = [one for one in chained if not getattr(one, "is_stub_optimizer", False)] or chained
    return [inner for one in members for inner in chain(one)]


def _kept_by(holder: Any) -> list[Any]:
    """The optimizers that an object holds which is none itself, or was not made as one, and has none in the usual place."""
    attributes = getattr(holder, "__dict__", {})
    if "_optimizer_step_post_hooks" in attributes or not {"optimizer", "_optimizer"}.isdisjoint(attributes):
        return []
    found: dict[int, Any] = {}
    for value in attributes.values():
        values = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        )
        found |= {id(one): one for one in values if isinstance(one, Optimizer)}
    return list(found.values())


def fragments(params: Iterable[Tensor], names: Names, flats: Iterable[Tensor]) -> dict[int, list[Piece]]:
    """ZeRO-1/2: id of a flat tensor -> its pieces. A parameter knows the fragment that holds it, or a part of it."""
    memories = {flat.untyped_storage()._cdata: flat for flat in flats if is_flat(flat)}
    found: dict[int, list[Piece]] = {}
    for param in params:
        fragment = getattr(getattr(param, "_hp_mapping", None), "hp_fragment", None)
        flat = memories.get(fragment.untyped_storage()._cdata) if isinstance(fragment, Tensor) else None
        if isinstance(fragment, Tensor) and flat is not None:
            start = int(fragment.storage_offset()) - int(flat.storage_offset())
            piece = Piece(names[id(param)], tuple(param.shape), start, fragment.numel())
            _put(piece, flat, found)
    return found


def sub_groups(wrapper: Any, names: Names) -> tuple[dict[int, list[Piece]], set[int]]:
    """ZeRO-3: id of a flat tensor -> its pieces; ids of parameters that lie on other ranks. Nothing for other wrappers."""
    flats, groups = (getattr(wrapper, name, None) for name in ("fp32_partitioned_groups_flat", "fp16_groups"))
    found: dict[int, list[Piece]] = {}
    absent: set[int] = set()
    if not isinstance(flats, Sequence) or not isinstance(groups, Sequence) or len(flats) != len(groups):
        return found, absent
    for flat, params in zip(flats, groups, strict=True):
        start = 0
        for param in params:
            size = param.ds_tensor.ds_numel
            real = min(param.ds_numel - size * getattr(param, "ds_zero_partition_rank", 0), size)  # the rest is padding
            if real <= 0:
                absent.add(id(param))
            elif id(param) in names and is_flat(flat):
                _put(Piece(names[id(param)], tuple(param.ds_shape), start, real), flat, found)
            start += size
    return found, absent


def shard(param: Tensor, names: tuple[str, ...], master: Tensor) -> Piece | None:
    """Megatron: this rank's part of a parameter; None for a master of the parameter's own shape."""
    if master.shape == param.shape or not is_flat(master) or not 0 < master.numel() <= param.numel():
        return None
    return Piece(names, tuple(param.shape), 0, master.numel())


def view(flat: Tensor, params: Iterable[Tensor], names: Names) -> Piece | None:
    """A stepped vector that is a part of one parameter's own memory."""
    for param in params if is_flat(flat) else ():
        if param.dtype != flat.dtype or param.device != flat.device or not param.is_contiguous():
            continue
        begin, size = param.data_ptr(), param.element_size()
        if param.numel() and begin <= flat.data_ptr() < begin + param.numel() * size:
            fits = 0 < flat.numel() <= param.numel() - (flat.data_ptr() - begin) // size
            return Piece(names[id(param)], tuple(param.shape), 0, flat.numel()) if fits else None
    return None


def of_all_ranks(wrapper: Any) -> set[int]:
    """Megatron's distributed optimizer: ids of the parameters of which some rank steps a part."""
    found: set[int] = set()
    buffers = getattr(wrapper, "buffers", None)
    for buffer in buffers if isinstance(buffers, (list, tuple)) else ():
        found.update(map(id, getattr(buffer, "param_index_map", None) or ()))
    return found


def _put(piece: Piece, flat: Tensor, found: dict[int, list[Piece]]) -> None:
    if piece.start >= 0 and piece.held > 0 and piece.start + piece.held <= flat.numel():
        found.setdefault(id(flat), []).append(piece)


def is_flat(tensor: Tensor) -> bool:
    """Whether it is a vector in one piece."""
    return local(tensor) is tensor and tensor.dim() == 1 and tensor.is_contiguous() and not tensor.is_meta
