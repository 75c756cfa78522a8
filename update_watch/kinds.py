"""What is of one kind, and what is a layer: the one place that reads the structure of a model out of its names.

"model.layers.17.self_attn.q_proj.weight" is of the kind "model.layers.*.self_attn.q_proj.weight" and lies in layer 17.
A number is the number of a layer (or of an expert) where what is numbered repeats: modules built alike, one after the
other. Where it does not ("mlp.0.weight", "mlp.2.weight": two matrices of one network; "layer.0", "layer.1" in T5: an
attention and a network) it belongs to the name of the kind. So two tensors are of one kind exactly when one stands in
the same place of another layer or of another expert.

Maps, alerts, groups of series and the terminal all read it here. Plain Python on names.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

STAR = "*"
# parts of a path that stand for a wrapper and not for a module of the model
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_LAYER_WORDS = frozenset({"h", "layers", "blocks", "stages", "cells"})
_LEAVES_MANY = 4  # from more numbered leaves than this on ("features.0.weight" to "features.28.weight") they are layers
_ALIKE = 0.4  # of what two numbered modules hold together, the share both hold: two of one kind
_NUMBERED_WORD = re.compile(r"([A-Za-z_]*[A-Za-z])([0-9]+)$")
_DEEPEST = 64  # parts of a name that are told apart


class Place(NamedTuple):
    """Where a tensor stands in its model."""

    kind: str  # its name, with a star for the number of the layer and of the expert
    stack: str  # what its layer is one of: "model.layers.*"; "" outside of layers
    layer: tuple[int, ...]  # number of the layer, of the outermost first ("stages.1.blocks.3": (1, 3)); () outside
    expert: int | None  # number of the expert, or None


@dataclasses.dataclass
class _Node:
    children: dict[str, _Node] = dataclasses.field(default_factory=dict)
    stars: dict[str, str] = dataclasses.field(default_factory=dict)  # part -> how it is called in a kind
    suffixes: frozenset[str] = frozenset({""})  # kinds of what lies below, from here on


def places(names: Iterable[str]) -> Mapping[str, Place]:
    """Name -> where it stands; for all names of a model together, as it takes the others to see what repeats."""
    return _places(tuple(dict.fromkeys(names)))


@functools.lru_cache(4)  # a page asks for the same model again and again
def _places(names: tuple[str, ...]) -> Mapping[str, Place]:
    root = _Node()
    for name in names:
        node = root
        for part in _parts(name):
            node = node.children.setdefault(part, _Node())
    _find_repeats(root)
    return MappingProxyType({name: _place(root, _parts(name)) for name in names})


def layer_label(layer: Sequence[int]) -> str:
    """(17,) -> "17"; (1, 3) -> "1.3"."""
    return ".".join(str(number) for number in layer)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split(".", _DEEPEST) if part not in _WRAPPERS]
    return parts or [name]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _is_expert(word: str) -> bool:
    return "expert" in word.lower()


def _find_repeats(node: _Node, word: str = "") -> None:
    """Fill `stars` and `suffixes` below `node`, from the leaves up."""
    for part, child in node.children.items():
        _find_repeats(child, part)
    for stem, members in _numbered(node).items():
        below = [node.children[part].suffixes for part in members]
        if _is_expert(stem or word) or _repeats(below, word in _LAYER_WORDS, bool(stem)):
            node.stars.update(dict.fromkeys(members, stem + STAR))
    if node.children:
        found = {
            f"{node.stars.get(part, part)}.{suffix}".rstrip(".")
            for part, child in node.children.items()
            for suffix in child.suffixes
        }
        node.suffixes = frozenset(found)


def _numbered(node: _Node) -> dict[str, list[str]]:
    """Children that differ in a number, by the word before it: "" for plain numbers, "layer" for layer1, layer2."""
    groups: dict[str, list[str]] = {}
    for part in node.children:
        if _is_number(part):
            groups.setdefault("", []).append(part)
        elif match := _NUMBERED_WORD.match(part):
            groups.setdefault(match[1], []).append(part)
    return groups


def _repeats(below: Sequence[frozenset[str]], is_called_layers: bool, is_word: bool) -> bool:
    """Whether numbered modules, given what each holds, are one module again and again."""
    is_leaf = all("." not in suffix for suffixes in below for suffix in suffixes)
    if is_leaf:
        return (is_called_layers or len(below) > _LEAVES_MANY) and not is_word
    if is_word and len(below) < 3:
        return False
    if len(set(below)) * 2 <= len(below) or len(below) == 1:
        return True
    largest = max(below, key=len)
    alike = [len(suffixes & largest) / len(suffixes | largest) for suffixes in below]
    return sum(share >= _ALIKE for share in alike) * 2 > len(alike)


def _place(root: _Node, parts: Sequence[str]) -> Place:
    node, kind, layer, stack_end = root, list[str](), list[int](), 0
    expert: int | None = None
    word = ""
    for part in parts:
        called = node.stars.get(part, part)
        node = node.children[part]
        kind.append(called)
        if called != part:
            number = int(part[len(called) - len(STAR) :])
            if _is_expert(called if called != STAR else word):
                expert = number
            elif expert is None:
                layer.append(number)
                stack_end = len(kind)
        word = part
    return Place(".".join(kind), ".".join(kind[:stack_end]), tuple(layer), expert)
