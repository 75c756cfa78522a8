"""Trials of torch's own optimizers, remembered: what is found out about a rule is found out once in a process.

Every `watch` and every audit tries the rule on synthetic parameters before anything else, for a tenth of a second and more.
In a test of what comes after, that is most of the time. Whatever could change the outcome is in the key; optimizers of other
origin, and those that have stepped, are tried each time. Tests of the trials themselves try all of them always: see `tests/conftest.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure import parameters
from update_watch.replay import rule_properties, state_forms

# of torch's; a scheduler's wrapped `step` is that of the instance, and copies run the one of the class
_WITHOUT_MEANING = {"state", "param_groups", "step", "_opt_called"}
_AUDIT = importlib.import_module("update_watch.audit.audit")  # a function has its name
_PLACES: tuple[tuple[Any, str], ...] = (
    (parameters, "find_rule"),
    (parameters, "find_scaled_rule"),
    (parameters, "find_scheme"),
    (rule_properties, "find_decay"),
    (state_forms, "find_states"),
    (_AUDIT, "find_states"),
    (_AUDIT, "find_properties"),
)
_known: dict[Hashable, Any] = {}


def remember(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone."""
    for place, name in _PLACES:
        patch.setattr(place, name, _remembered(getattr(place, name)))


def _remembered(trial: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(trial)
    def known(optimizer: Optimizer, group: int, *given: Any, **options: Any) -> Any:
        alike = _alike(optimizer, group)
        if alike is None:
            return trial(optimizer, group, *given, **options)
        arguments = [_form(one) for one in (*given, *sorted(options.items()))]
        key = (trial.__module__, trial.__qualname__, alike, repr(arguments))
        if key not in _known:
            _known[key] = trial(optimizer, group, *given, **options)
        found = _known[key]
        return dict(found) if isinstance(found, dict) else found

    return known


def _form(value: Any) -> Any:
    return (type(value), value.dtype, value.device, tuple(value.shape)) if isinstance(value, Tensor) else value


def _alike(optimizer: Optimizer, group: int) -> Hashable:
    """Optimizers that are equal in this have one outcome in the same trial; None: it must be tried."""
    cls, params = type(optimizer), optimizer.param_groups[group]["params"]
    if not cls.__module__.startswith("torch.optim.") or any(optimizer.state.values()) or any(map(vars, params)):
        return None
    settings = {k: v for k, v in optimizer.param_groups[group].items() if k != "params"}
    attributes = {k: v for k, v in vars(optimizer).items() if k not in _WITHOUT_MEANING and not k.endswith("hooks")}
    around = (
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_dispatch_stack(),
    )
    kinds = {(str(p.device), type(p), p.dtype) for p in params}
    return (
        cls,
        cls.step,
        group,
        len(optimizer.param_groups),
        repr(settings),
        repr(attributes),
        around,
        frozenset(kinds),
    )
