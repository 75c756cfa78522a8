"""Which tensors can be read element by element, and how to ask odd ones without an error.

torch holds many kinds of tensors that it cannot compute with: formats without arithmetic (four bits, shell types),
layouts without strides (sparse, nested, MKL-DNN), tensors without values (meta). Models and optimizers hold them, and
asking for as little as their shape may raise.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def unreadable(tensor: Tensor) -> str:
    """Why the elements of a (local) tensor cannot be read one by one, as a claim about "it"; "" when they can."""
    if is_lazy(tensor):
        return "it has no shape yet: it is made in the first forward pass that uses it"
    if tensor.is_nested:
        return "it is a nested tensor, without one shape"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout} has no strided storage"
    if tensor.is_meta:
        return "it is on the meta device: there are no values yet"
    if tensor.is_quantized:
        return f"it is quantised ({_name(tensor.dtype)})"
    if not is_computable(tensor.dtype):
        return f"torch cannot compute with {_name(tensor.dtype)}"
    return ""


@functools.cache
def is_computable(dtype: torch.dtype) -> bool:
    """Whether torch turns numbers of this format into FP32 (complex ones into complex)."""
    try:
        # torch calls complex32 experimental: no news here, and an error where warnings are errors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _is_computable(dtype)
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _is_computable(dtype: torch.dtype) -> bool:
    zeros = torch.zeros(dtype.itemsize, dtype=torch.uint8, device="cpu").view(dtype)
    torch.stack([zeros, zeros]).to(torch.complex64 if dtype.is_complex else torch.float32)
    return True


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; () where it has none (nested tensors, parameters that are made later)."""
    try:
        return tuple(int(size) for size in tensor.shape)
    except Exception:  # of many kinds
        return ()


def described(value: object) -> str:
    """ "a sparse_coo Tensor of shape (3, 4)", for reasons."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.').strip('_')} "
    return f"a {layout}{type(value).__name__} of shape {shape_of(value)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
