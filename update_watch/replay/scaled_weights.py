"""A rule in the weight's own format, on weights 2^-k as large: the third way of replay, for rules bound to that format.

Where the weight acts through weight decay alone, a step of (2^-k w, g, states, 2^k decay) computes the same update as one of
(w, g, states, decay): w * decay is what it was. Multiplying by 2^-k moves exponents only, so it is exact, while the gaps of
the format around the weight are 2^k finer. What comes back is the intended update to the format's own relative precision,
whether the rule rounds to nearest, truncates into two halves, keeps what it rounded away in a state, or throws dice.

`ScaledWeights` translates between FP32, in which everything else here reckons, and the rule's own format. Whether a rule may
be replayed in this way, `scaled_trial` finds out: norm ratios, projections on the weight and clipped weights may not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.replay.absent import ReplayError
from update_watch.replay.rounding_scheme import Scheme

_SHARE = (
    3 / 8
)  # of the exponents below 1: far enough that updates of 1e-12 of a weight stand out of it, and as far from underflow


def exponent_of(dtype: torch.dtype) -> int:
    """k for weights of `dtype`: 47 for BF16, where weights from 2^-79 on stay normal numbers.

    Raises `ReplayError` for formats with too few exponents.
    """
    room = -round(torch.log2(torch.tensor(torch.finfo(dtype).smallest_normal)).item())
    k = int(room * _SHARE)
    if k < 2 * -round(torch.log2(torch.tensor(torch.finfo(dtype).eps)).item()):
        name = str(dtype).removeprefix("torch.")
        raise ReplayError(
            f"its rule is bound to {name}, whose smallest normal number is 2^-{room}: no room to scale weights"
        )
    return k


@dataclasses.dataclass(frozen=True)
class ScaledWeights:
    """How a run in FP32 becomes one in the stored format, and its result one in FP32 again."""

    dtype: torch.dtype  # of weights and gradients
    exponent: int  # k
    scheme: Scheme  # the state that holds the rest of the weight is scaled with it, or joined
    decays: tuple[str, ...] = ()  # group settings multiplied by 2^k
    state_dtypes: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)  # as the rule keeps them
    keeps_others: bool = True  # there are other states beside the carrier

    @property
    def changes(self) -> dict[str, Any]:
        """What is done to the settings of a group."""
        factor = 2.0**self.exponent

        def scale(value: Any) -> Any:
            return value * factor if isinstance(value, (int, float, Tensor)) else value

        return dict.fromkeys(self.decays, scale)

    def stored(
        self, param: Tensor, grad: Tensor | None, state: dict[str, Any], *, is_whole: bool = False
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Weights, gradients and states in the stored format; the carrier holds what the weights cannot.

        `param` and `grad`: FP32, whole (weights and carrier joined). `is_whole`: states come as they are stored.
        """
        scaled = param * 2.0**-self.exponent
        own: dict[str, Any] = {}
        for name, value in state.items():
            kind = None if is_whole else self.state_dtypes.get(name)
            own[name] = value.to(kind) if kind is not None and isinstance(value, Tensor) else value
        weight, carrier = scaled.to(self.dtype), self.scheme.carrier
        if carrier:
            own.pop(carrier, None)
            kind = self.state_dtypes[carrier]
            weight, rest = self.scheme.parted(scaled, self.dtype, kind)
            if own or not self.keeps_others:
                own[carrier] = rest
        return weight, None if grad is None else grad.to(self.dtype), own

    def whole(self, weight: Tensor, state: Mapping[str, Any]) -> Tensor:
        """FP32 weights, still scaled, of stored ones and their carrier."""
        value, rest = weight.detach().float(), state.get(self.scheme.carrier)
        if not isinstance(rest, Tensor):
            return value
        fmt = formats.of(self.dtype)
        assert fmt is not None
        return self.scheme.joined(value, rest.detach().float(), fmt)
