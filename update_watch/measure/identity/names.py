"""What the model's tensors are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """All names of a module's parameters with the tensors; (name, tensor) pairs as they are.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, torch.nn.Module):
        return list(model.named_parameters(remove_duplicate=False))
    try:
        pairs = [(str(name), tensor) for name, tensor in model]
    except (TypeError, ValueError):
        pairs = None  # type: ignore[assignment]
    if pairs is None or not all(isinstance(tensor, Tensor) for _, tensor in pairs):
        raise TypeError(
            f"watch(model={short(model)}): expected a torch module or (name, tensor) pairs, as model.named_parameters()"
            " gives"
        )
    return pairs


def names_of(model: Any) -> dict[int, tuple[str, ...]]:
    """id(parameter) -> all its names. `model`: a module or (name, tensor) pairs."""
    pairs: Iterable[tuple[str, Tensor]]
    if isinstance(model, torch.nn.Module):
        pairs = model.named_parameters(remove_duplicate=False)
    else:
        pairs = model
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in pairs:
        names[id(tensor)] = (*names.get(id(tensor), ()), _clean(name))
    return names


def _clean(name: str) -> str:
    # prefixes of wrappers say nothing about the model
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def short(value: Any) -> str:
    """For messages: small values as they are, of others the type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
