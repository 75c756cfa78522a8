"""Wrappers of optimizers, looked through: whoever is given one by a trainer needs the optimizer that steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer that runs torch's step hooks, behind the wrappers of Lightning, Fabric, Accelerate and DeepSpeed.

    Of a ZeroRedundancyOptimizer it is the optimizer of this rank's share. Others that contain one but step themselves
    (Lookahead) are returned as they are.

    Raises:
        TypeError: there is no torch optimizer in it.
    """
    inner: Any = optimizer
    seen: list[int] = []
    while not hasattr(inner, "__dict__") or "_optimizer_step_post_hooks" not in vars(inner):
        attributes = getattr(inner, "__dict__", {})
        seen.append(id(inner))
        following = attributes.get("_optimizer")
        inner = following if following is not None else attributes.get("optimizer")
        if inner is None or id(inner) in seen:
            raise TypeError(
                f"{type(optimizer).__name__} has no torch optimizer with step hooks in it: give a torch.optim.Optimizer, "
                "or a wrapper that keeps one in `.optimizer` or `._optimizer`"
            )
    share = vars(inner).get("optim")
    if type(inner).__name__ == "ZeroRedundancyOptimizer" and isinstance(share, Optimizer):
        return share
    return inner  # type: ignore[no-any-return]
