"""What of ours runs in a step of the user's runs in plain torch, whatever precision context the step is in."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from update_watch.replay.side_effects import Undone


class PlainTorch(Undone):
    """No autograd, no autocast, no inference mode, FP32 as default dtype; what was before comes back. Enter it twice.

    A step taken inside a trainer's step (Lightning's manual optimization) runs in its precision context: under
    "bf16-true" `torch.zeros(1)` is BF16 there, under "bf16-mixed" a product of FP32 tensors is. And what is made in
    inference mode, where trainers validate, can never be written to outside of it.
    """

    __slots__ = ("_autocast", "_dtype", "_grad", "_inference")

    def __init__(self, *optimizers: Optimizer) -> None:
        super().__init__()
        self._autocast: list[str] = []
        self._inference: Any = None
        self._grad, self._dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        if torch._C._is_any_autocast_enabled():
            groups = [group for opt in optimizers for group in opt.param_groups]
            kinds = {"cpu", *(p.device.type for group in groups for p in group["params"][:1])}
            available = filter(torch.amp.is_autocast_available, kinds)
            self._autocast = [kind for kind in available if torch.is_autocast_enabled(kind)]

    def change(self) -> None:
        if torch.is_inference_mode_enabled():
            self._inference = torch._C._InferenceMode(False)  # entered by being made
        torch._C._set_grad_enabled(False)  # torch.set_grad_enabled makes an object, whose code is cold in a step
        self._set(False, torch.float32)

    def undo(self) -> None:
        if self._inference is not None and not torch.is_inference_mode_enabled():
            self._inference.__exit__(None, None, None)
        self._set(True, self._dtype)
        torch._C._set_grad_enabled(self._grad)

    def _set(self, is_autocast: bool, dtype: torch.dtype) -> None:
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, is_autocast)
        if torch.get_default_dtype() is not dtype:
            torch.set_default_dtype(dtype)
