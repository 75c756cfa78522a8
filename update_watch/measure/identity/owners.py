"""Which modules hold a tensor: asked when an optimizer steps one that nobody has named.

There is no way back from a parameter to its module, so all objects of the process are looked through. That takes some
tenths of a second: not for use in every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor


def modules_with(tensors: Iterable[Tensor]) -> list[torch.nn.Module]:
    """The modules of which one of these tensors is a parameter."""
    wanted = set(map(id, tensors))
    return [module for module in all_modules() if not wanted.isdisjoint(map(id, module._parameters.values()))]


def roots_of(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The outermost modules these are parts of, those that people wrote before graphs that were traced of them.

    A compiler's graph modules hold the parameters under names of its own.
    """
    parents: dict[int, list[torch.nn.Module]] = {}
    for module in all_modules():
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    roots: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            if id(module) in parents:
                waiting += parents[id(module)]
            else:
                roots[id(module)] = module
    written = [root for root in roots.values() if not isinstance(root, torch.fx.GraphModule)]
    return written or list(roots.values())


def all_modules() -> list[torch.nn.Module]:
    """Every module of this process that has been made and not let go."""
    found = []
    for one in gc.get_objects():
        # the type is asked, not the object: a proxy's `__class__` would run somebody's code
        if issubclass(type(one), torch.nn.Module) and "_parameters" in one.__dict__:
            found.append(one)
    return found
