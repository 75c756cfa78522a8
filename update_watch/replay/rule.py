"""What was found out about an optimizer's rule: in which way its updates can be replayed, and what it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from update_watch.odd_tensors import described, unreadable
from update_watch.replay.scaled_weights import ScaledWeights


class Kind(Enum):
    elementwise = "elementwise"
    whole = "whole"
    together = "together"  # whole, and with all other tensors of the optimizer
    unknown = "unknown"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the updates of one group's parameters of one shape can be replayed."""

    kind: Kind
    reason: str = ""
    rows: bool = False  # the samples must be given as a matrix, not as a vector
    element_states: frozenset[str] = frozenset()  # states with one value per weight
    error: float = 0.0  # largest difference seen, as a share of the largest update
    exact_states: frozenset[str] = frozenset()  # of `element_states`, those whose replay may be judged as well
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)  # state -> as of `SyntheticTraining.form`
    widens: bool = True  # False: low-precision state must be replayed in its own format (`Twin.replay_whole`)
    # if not `widens`: these are kept so for FP32 weights too, and others are widened
    low_kept: frozenset[str] = frozenset()
    low_states: frozenset[str] = frozenset()  # made for low-precision weights and not in FP32
    scaled: ScaledWeights | None = None  # replays are made in the weight's own format
    has_failed: bool = False  # the rule did not run: it may do so once its optimizer has set itself up in a first step
    skips_first: bool = False  # the first step sets up what the later ones go by: it cannot be replayed
    may_draw: bool = False  # the rule throws dice, and its update does not depend on them
    steps_copy: bool = (
        False  # of an unknown one: in its trial it moved a state that began as the weight, and not the weight
    )
    is_bound_to_fp32: bool = False  # it casts to FP32 itself, and does not run on FP64 copies
    apart: bool = False  # scalar state differs by parameter, beyond step counts: replay each parameter on its own

    @property
    def formats(self) -> dict[str, Any]:
        """How the replay of a whole tensor is to take states below FP32."""
        return {"widen": self.widens or bool(self.low_kept), "kept": self.low_kept}

    def misfit(self, param: Tensor, state: Mapping[str, Any]) -> str:
        """Why what was found out does not hold for this parameter, judged by its state; "" when it fits.

        A rule may treat large parameters otherwise (factored, quantised): it then keeps other state than in the trial.
        Whole tensors are replayed with whatever state there is.
        """
        if self.kind in (Kind.whole, Kind.together):
            return ""
        plain = (Tensor, torch.nn.Parameter, type(param), type(param.data))
        for name, value in state.items():
            expected = self.forms.get(name)
            if expected is None:
                return f"its optimizer keeps state '{name}' for it, which was not met when the rule was probed"
            if not isinstance(value, Tensor):
                continue
            if expected == "element" and (unreadable(value) or value.shape != param.shape or type(value) not in plain):
                return f"state '{name}' is {described(value)}, not one value per weight"
            if expected == "none":
                return f"state '{name}' is a tensor, but was None when the rule was probed"
            if expected == "scalar" and value.numel() != 1:
                return f"state '{name}' has {value.numel()} values, but was one number when the rule was probed"
        return ""
