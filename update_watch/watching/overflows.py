"""Whether the gradients of backward passes without a step hold NaN or infinity: then something skips the steps on purpose.

A gradient scaler whose optimizer is not fused, or a check of one's own, does not call `step`: no hook of an optimizer runs. All
gradients are looked at when such a pass has ended, in a few passes of a window, and what is found stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch.measure.ledger.sheet import can_be_read
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.transfer import Batch, Part

_LOOKS = 16  # of a window, at most


class Overflows:
    """Counts, of the passes that were looked at, those whose gradients were not all finite. `window`: passes."""

    def __init__(self, window: int) -> None:
        self._every = max(1, window // _LOOKS)
        self._looks, self._bad = 0, dict[torch.device, Tensor]()

    def passes(self, count: int, tensors: Sequence[Tensor]) -> None:
        """Called within a backward pass, the `count`-th: the gradients of these are looked at when it ends, if it is its turn."""
        if count % self._every == 0:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._look(tensors))

    def _look(self, tensors: Sequence[Tensor]) -> None:
        """What goes wrong here would end training's backward pass: such a look is left out."""
        try:
            plain = PlainTorch()
            with plain, plain, torch.no_grad():
                by_device: dict[torch.device, list[Tensor]] = {}
                for tensor in tensors:
                    if tensor.grad is not None and type(tensor.grad) is Tensor and can_be_read(tensor.grad):
                        by_device.setdefault(tensor.grad.device, []).append(tensor.grad)
                for device, gradients in by_device.items():
                    sizes = torch.stack([g.float() for g in torch._foreach_norm(gradients, float("inf"))])
                    is_bad = sizes.isfinite().all().logical_not().float()
                    self._bad[device] = self._bad.get(device, 0.0) + is_bad
                self._looks += bool(by_device)
        except Exception:  # noqa: BLE001
            self._looks += 1  # as one in which they were finite: nothing is accused

    def close_window(self, batch: Batch, passes: int) -> tuple[Part, ...]:
        """Per device `passes` where the gradients of all that were looked at were not finite on it, else 0."""
        looks, bad = self._looks, list(self._bad.values())
        self._looks, self._bad = 0, {}
        return tuple(batch.add((passes * (one >= looks)).reshape(1).float()) for one in bad)
