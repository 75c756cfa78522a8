"""A second optimizer that shares nothing writable with the first: same class, same attributes, no `__init__`, no hooks."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay import kept_states
from update_watch.replay.absent import ReplayError
from update_watch.replay.attribute_copy import Copier, is_plain

# attributes of torch.optim.Optimizer that the twin gets anew
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
OWN = frozenset({"param_groups", "state", *_HOOKS})
# every function wrapped by torch to call step hooks runs this code
_HOOKED_CODE = Optimizer.profile_hook_step(lambda _: None).__code__
LIMIT = 4096  # elements of tensor attributes; more would be too much to copy at every step


def rule_of(optimizer: Optimizer) -> Callable[..., Any]:
    """The class's `step` without torch's hook-calling wrapper.

    A learning-rate scheduler's wrapper sits on the instance and is not met. Only torch's own wrapper is taken off:
    a decorator of the user's is part of the rule, even where `functools.wraps` gave it the same marks.
    """
    step: Any = type(optimizer).step
    while getattr(step, "__code__", None) is _HOOKED_CODE:
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def copy_of(
    optimizer: Optimizer,
    groups: list[dict[str, Any]] | None = None,
    state: defaultdict[Tensor, dict[str, Any]] | None = None,
    copier: Copier | None = None,
    *,
    are_synthetic: bool = False,
) -> Optimizer:
    """An optimizer of the same class with copies of all attributes, given parameters and state, and no hooks.

    `are_synthetic`: the parameters are not copies of the optimizer's, and nothing is known of their states. Raises `ReplayError`
    for attributes that cannot or must not be copied.
    """
    cls = type(optimizer)
    if hasattr(cls, "__del__"):  # DeepSpeedCPUAdam frees C++ state that a copy would share
        raise ReplayError(f"{cls.__name__} has a finalizer (__del__): the end of a copy could end what it uses itself")
    twin: Optimizer = object.__new__(cls)
    groups = [] if groups is None else groups
    state = defaultdict(dict) if state is None else state
    copier = Copier(LIMIT, optimizer=optimizer) if copier is None else copier
    # attributes that point back, bound methods among them, point to the twin and its parts
    copier.replace(optimizer, twin)
    copier.replace(optimizer.param_groups, groups)
    copier.replace(optimizer.state, state)
    kept = kept_states.attributes(optimizer)
    try:
        for name, value in _attributes(optimizer):
            if name in OWN or name in kept or shadows_method(cls, name, value):
                continue
            copied = value if is_plain(value) else copier.copy(value, f"{cls.__name__}.{name}")
            object.__setattr__(twin, name, copied)
        for name in _HOOKS:
            setattr(twin, name, OrderedDict())
        twin.param_groups, twin.state = groups, state
        kept_states.furnish(twin, optimizer, state, are_synthetic=are_synthetic)
        if twin.defaults.get("differentiable"):
            twin.defaults["differentiable"] = False  # same arithmetic; autograd through a replay helps nobody
    except AttributeError as error:
        raise ReplayError(f"{cls.__name__} cannot be built from its attributes: {error}") from error
    return twin


def settings_of(group: dict[str, Any], params: list[Tensor], copier: Copier) -> dict[str, Any]:
    """A copy of a parameter group's settings with other parameters."""
    copied: dict[str, Any] = {}
    copier.replace(group, copied)
    for name, value in group.items():
        if name != "params":
            # a list as long as the model has parameters, of names that nobody writes to
            is_shared = name == "param_names" or is_plain(value)
            copied[name] = value if is_shared else copier.copy(value, f"the group setting '{name}'")
    if copied.get("differentiable"):
        copied["differentiable"] = False
    copied["params"] = params
    return copied


def _attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    yield from vars(optimizer).items()
    for cls in type(optimizer).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(optimizer, name):
                yield name, getattr(optimizer, name)


def shadows_method(cls: type, name: str, value: Any) -> bool:
    # a scheduler's wrapped `step` or a compiled method: bound to the real optimizer; the class has the plain one
    return callable(value) and isinstance(getattr(cls, name, None), types.FunctionType)
