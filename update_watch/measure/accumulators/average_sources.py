"""Where an averaged model keeps its tensors and its decay: modules, objects of public libraries, lists, mappings.

| given | tensors | decay |
|---|---|---|
| torch.optim.swa_utils.AveragedModel | `.module` | of its averaging function; equal averages: 1 - 1/(n + 1) |
| ema-pytorch, timm, any wrapper of a module | `.ema_model`, `.module` | `.decay`, `.beta` |
| diffusers' EMAModel, torch-ema | `.shadow_params`, in the model's order | `.cur_decay_value`, `.decay` |
| objects with a mapping | `.shadow` by name | `.decay` |
| a module, (name, tensor) pairs, a mapping, a list of tensors in the model's order | itself | given as (it, decay) |

What is given may hold new tensors after every update: it is read again at every look, by `Source.get`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update_watch.kinds import without_wrappers
from update_watch.odd_tensors import shape_of, unreadable


class Source(NamedTuple):
    """One tensor of an average."""

    name: str  # of the model's tensor
    weight: Tensor
    get: Callable[[], Tensor | None]  # the average of it now


class Decay(NamedTuple):
    """How fast an average moves: `rate` = 1 - decay, None where it is not known; `counter` counts equal averages.

    `begins_late`: equal averages are begun in the last part of a training, and updated once in an epoch.
    """

    rate: float | None
    counter: Tensor | None = None
    begins_late: bool = False


class UnreadableAverage(Exception):
    """What was given cannot be read as an average of the model; the text says why."""


def decay_of(label: str, given: Any) -> tuple[Any, Decay]:
    """The averaged model and its decay: as given, or as its own settings tell.

    Raises:
        ValueError: a decay that is none.
    """
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], (int, float)):
        module, decay = given
        if not 0 <= decay < 1:
            raise ValueError(f"watch(averages={{{label!r}: (model, {decay!r})}}): the decay must be in [0, 1)")
        return module, Decay(1.0 - decay)
    functions = [getattr(given, name, None) for name in ("multi_avg_fn", "avg_fn")]
    for function in functions:  # torch.optim.swa_utils.AveragedModel
        decay = _closed_over(function)
        if decay is not None:
            return given, Decay(1.0 - decay)
    counter = getattr(given, "n_averaged", None)
    if isinstance(counter, Tensor) and not any(functions):
        return given, Decay(None, counter, begins_late=True)
    for name in ("decay", "beta", "ema_decay"):
        decay = getattr(given, name, None)
        if isinstance(decay, float) and 0 <= decay < 1:
            return given, Decay(1.0 - decay)
    return given, Decay(None, begins_late=getattr(type(given), "begins_late", False) is True)


def _closed_over(function: Any) -> float | None:
    """The variable `decay` that torch's averaging functions close over."""
    if function is None:
        return None
    function = inspect.unwrap(function)  # torch wraps it in no_grad
    code = getattr(function, "__code__", None)
    if code is None or "decay" not in code.co_freevars:
        return None
    decay = function.__closure__[code.co_freevars.index("decay")].cell_contents
    return decay if isinstance(decay, float) else None


def sources_of(given: Any, named: Sequence[tuple[str, Tensor]]) -> list[Source]:
    """The model's tensors with their averages, those that have one.

    Raises:
        UnreadableAverage: nothing in it has name or place, and shape, of the model's tensors.
    """
    holder = _holder(given)
    if isinstance(holder, Sequence) and holder and all(isinstance(t, Tensor) for t in holder):
        return _by_place(holder, named)
    pairs = _named(holder)
    if pairs is None:
        raise UnreadableAverage(
            f"{type(given).__name__} is no module, no object with shadow_params or shadow, no mapping or list of tensors"
        )
    return _by_name(holder, pairs, named)


def _holder(given: Any) -> Any:
    for name in ("ema_model", "module"):  # ema-pytorch; AveragedModel, timm
        inner = getattr(given, name, None)
        if isinstance(inner, torch.nn.Module):
            return inner
    if isinstance(given, torch.nn.Module):
        return given
    for name in ("shadow_params", "shadow"):  # diffusers, torch-ema; the EMA of many tutorials
        inner = getattr(given, name, None)
        if isinstance(inner, (Mapping, list, tuple)) and inner:
            return inner
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping, Tensor)):
        return list(given)
    return given


def _named(holder: Any) -> dict[str, Callable[[], Any]] | None:
    """Name -> how to get the tensor now."""
    if isinstance(holder, torch.nn.Module):
        tensors = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers(remove_duplicate=False)]
        return {without_wrappers(name): lambda t=tensor: t for name, tensor in tensors}  # type: ignore[misc]
    if isinstance(holder, Mapping):
        keys = [key for key in holder if isinstance(key, str) and isinstance(holder[key], Tensor)]
        return {without_wrappers(key): lambda k=key: holder.get(k) for key in keys} or None  # type: ignore[misc]
    try:
        pairs = list(holder)
        if pairs and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs):
            return {without_wrappers(name): lambda t=tensor: t for name, tensor in pairs}  # type: ignore[misc]
    except (TypeError, ValueError):
        pass
    return None


def _by_place(tensors: Sequence[Tensor], named: Sequence[tuple[str, Tensor]]) -> list[Source]:
    for those in (list(named), [(n, t) for n, t in named if t.requires_grad]):
        unique = list({id(t): (n, t) for n, t in reversed(those)}.values())[::-1]
        for pairs in (those, unique):
            if len(pairs) == len(tensors) and all(
                shape_of(a) == shape_of(t) for a, (_, t) in zip(tensors, pairs, strict=True)
            ):
                return [
                    Source(name, weight, lambda i=i: tensors[i] if i < len(tensors) else None)  # type: ignore[misc]
                    for i, (name, weight) in enumerate(pairs)
                ]
    raise UnreadableAverage(
        f"its {len(tensors)} tensors do not have the shapes of the model's {len(named)}, in their order"
    )


def _by_name(holder: Any, pairs: dict[str, Callable[[], Any]], named: Sequence[tuple[str, Tensor]]) -> list[Source]:
    for key in (str, _without_dots):
        by_key = {key(name): get for name, get in pairs.items()}
        for prefix in _prefixes([key(name) for name, _ in named], list(by_key)):
            found = [
                Source(name, weight, get)
                for name, weight in named
                if (get := by_key.get(prefix + key(without_wrappers(name)))) is not None and _fits(get(), weight)
            ]
            if found:
                return found
    own = next(iter(pairs), "")
    raise UnreadableAverage(
        f"none of its tensors has a name and shape of the model's (its first is {own!r}, the model's {named[0][0]!r});"
        " give the averaged copy of the watched model"
    )


def _prefixes(names: list[str], others: list[str]) -> list[str]:
    """What may stand before the model's names in the average's, the most likely first."""
    found = [""]
    for name in names[:4]:
        found += [other.removesuffix(name) for other in others if other.endswith(name)]
    return list(dict.fromkeys(found))


def _fits(average: Any, weight: Tensor) -> bool:
    if not isinstance(average, Tensor) or average is weight:
        return False
    # one that has no shape is told by its name alone: why it cannot be read is said in its row
    return shape_of(average) == shape_of(weight) or (average.is_nested and bool(unreadable(average)))


def _without_dots(name: str) -> str:
    return name.replace(".", "")  # LitEma keeps buffers, whose names have none
