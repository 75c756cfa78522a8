"""What is of one kind, and what is a layer: the one place that reads the structure of a model out of its names.

"model.layers.17.self_attn.q_proj.weight" is of the kind "model.layers.*.self_attn.q_proj.weight" and lies in layer 17.
A number is the number of a layer (or of an expert) where what is numbered repeats: modules built alike, one after the
other. Where it does not ("mlp.0.weight", "mlp.2.weight": two matrices of one network; "layer.0", "layer.1" in T5: an
attention and a network) it belongs to the name of the kind. So two tensors are of one kind exactly when one stands in
the same place of another layer or of another expert.

Maps, alerts, groups of series and the terminal all read it here. All names go down the tree of a model together, a level
at a time, and modules built alike are worked out once: a million names take one second. P is the number of names, N
that of nodes (modules and tensors); node 0 is the model.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from update_watch.columns.name_levels import WRAPPERS, Ints, Level, distinct, levels_of, mixed

STAR = "*"
_LAYER_WORDS = frozenset({"h", "layers", "blocks", "stages", "cells"})
_LEAVES_MANY = 4  # from more numbered leaves than this on ("features.0.weight" to "features.28.weight") they are layers
_ALIKE = 0.4  # of what two numbered modules hold together, the share both hold: two of one kind
_NUMBERED_WORD = re.compile(r"([A-Za-z_]*[A-Za-z])([0-9]{1,18})$")
_DIGITS = 18  # longer ones are no numbers
_NONE = -1


def without_wrappers(name: str) -> str:
    """ "_orig_mod.layers.0.weight" -> "layers.0.weight": the name that the tensor has in the model that was wrapped."""
    for part in WRAPPERS:
        name = name.replace(f"{part}.", "")
    return name.removeprefix("module.")


class Place(NamedTuple):
    """Where a tensor stands in its model."""

    kind: str  # its name, with a star for the number of the layer and of the expert
    stack: str  # what its layer is one of: "model.layers.*"; "" outside of layers
    layer: tuple[int, ...]  # number of the layer, of the outermost first ("stages.1.blocks.3": (1, 3)); () outside
    expert: int | None  # number of the expert, or None


@dataclasses.dataclass(frozen=True)
class NameTree:
    """Where names stand. A kind is its text, a layer its numbers, both by index."""

    kinds: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]  # the first is (): outside of layers
    kind_P: Ints  # index in `kinds`
    stack_P: Ints  # index in `kinds`: of what its layer is one; 0, which is "", outside of layers
    layer_P: Ints  # index in `layers`
    expert_P: Ints  # number of the expert; -1: none


class _Places(Mapping[str, Place]):
    """Made as they are asked for: of a million names hardly any is."""

    def __init__(self, names: Sequence[str], tree: NameTree) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        self._tree = tree

    def __getitem__(self, name: str) -> Place:
        i, tree = self._index[name], self._tree
        expert = int(tree.expert_P[i])
        return Place(
            tree.kinds[tree.kind_P[i]],
            tree.kinds[tree.stack_P[i]],
            tree.layers[tree.layer_P[i]],
            None if expert < 0 else expert,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def places(names: Iterable[str]) -> Mapping[str, Place]:
    """Name -> where it stands; for all names of a model together, as it takes the others to see what repeats."""
    found = tuple(dict.fromkeys(names))
    return _Places(found, tree_of(found))


@functools.lru_cache(4)  # a page asks for the same model again and again
def tree_of(names: tuple[str, ...]) -> NameTree:
    """The same of distinct names as columns, for those who look at all of them."""
    texts, levels, node_P = levels_of(names)
    shape_N, shapes = _shapes(texts, levels)
    return _walked(texts, levels, node_P, shape_N, shapes)


def layer_label(layer: Sequence[int]) -> str:
    """(17,) -> "17"; (1, 3) -> "1.3"."""
    return ".".join(str(number) for number in layer)


class _Shape(NamedTuple):
    """What lies below a module, in the order of its children."""

    called: tuple[str, ...]  # each child's part in a kind: "*" for a number, "layer*" for a numbered word
    numbers: tuple[int, ...]  # -1 where it is none
    are_experts: tuple[bool, ...]
    suffixes: frozenset[str]  # kinds of what lies below, from here on


# --- from the leaves up: what repeats -----------------------------------------------------------------------


def _shapes(texts: Sequence[str], levels: Sequence[Level]) -> tuple[Ints, list[_Shape]]:
    """Of each node the shape it has, by index; the first is that of a leaf."""
    count = 1 + sum(len(level.part) for level in levels)
    shapes = [_Shape((), (), (), frozenset({""}))]
    shape_N = np.zeros(count, dtype=np.int64)
    word_N = np.full(count, _NONE, dtype=np.int64)  # by which a module is called
    for level in levels:
        word_N[level.first : level.first + len(level.part)] = level.part
    # its own name matters to what a module holds in these two ways only
    way_of = np.array([2 * _is_expert(text) + (text in _LAYER_WORDS) for text in texts] + [0], dtype=np.int64)
    for level in reversed(levels):
        below = shape_N[level.first : level.first + len(level.part)]
        begins = _begins(level.parent)
        parents = level.parent[begins]
        ways = way_of[word_N[parents]]
        marks = mixed(np.add.reduceat(mixed(level.part, below), begins), ways)
        _, sample, at = np.unique(marks, return_index=True, return_inverse=True)
        ends = np.append(begins[1:], len(level.part))
        for i in sample.tolist():
            children = slice(int(begins[i]), int(ends[i]))
            parts = [texts[part] for part in level.part[children].tolist()]
            inside = [shapes[shape].suffixes for shape in below[children].tolist()]
            shapes.append(_shape(parts, inside, ways[i] >= 2, ways[i] % 2 == 1))
        shape_N[parents] = len(shapes) - len(sample) + at
    return shape_N, shapes


def _begins(parents: Ints) -> Ints:
    """Where the children of each parent begin."""
    return np.flatnonzero(np.concatenate(([True], parents[1:] != parents[:-1])))


def _shape(parts: Sequence[str], below: Sequence[frozenset[str]], is_expert: bool, is_called_layers: bool) -> _Shape:
    suffixes_of = dict(zip(parts, below, strict=True))
    stems: dict[str, str] = {}  # part -> the word before its number
    for stem, members in _numbered(parts).items():
        is_of_experts = _is_expert(stem) if stem else is_expert
        if is_of_experts or _repeats([suffixes_of[part] for part in members], is_called_layers, bool(stem)):
            stems.update(dict.fromkeys(members, stem))
    called = tuple(stems[part] + STAR if part in stems else part for part in parts)
    children = set(zip(called, below, strict=True))
    return _Shape(
        called,
        tuple(int(part[len(stems[part]) :]) if part in stems else _NONE for part in parts),
        tuple(part in stems and (_is_expert(stems[part]) if stems[part] else is_expert) for part in parts),
        frozenset(f"{word}.{suffix}".rstrip(".") for word, found in children for suffix in found),
    )


def _is_expert(word: str) -> bool:
    return "expert" in word.lower()


def _numbered(parts: Sequence[str]) -> dict[str, list[str]]:
    """Parts that differ in a number, by the word before it: "" for plain numbers, "layer" for layer1, layer2."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        if len(part) <= _DIGITS and part.isascii() and part.isdecimal():
            groups.setdefault("", []).append(part)
        elif match := _NUMBERED_WORD.match(part):
            groups.setdefault(match[1], []).append(part)
    return groups


def _repeats(below: Sequence[frozenset[str]], is_called_layers: bool, is_word: bool) -> bool:
    """Whether numbered modules, given what each holds, are one module again and again."""
    counts = collections.Counter(below)
    if all("." not in suffix for suffixes in counts for suffix in suffixes):  # leaves
        return (is_called_layers or len(below) > _LEAVES_MANY) and not is_word
    if is_word and len(below) < 3:
        return False
    if len(counts) * 2 <= len(below) or len(below) == 1:
        return True
    largest = max(counts, key=lambda found: (len(found), counts[found], sorted(found)))
    alike = [n for found, n in counts.items() if len(found & largest) >= _ALIKE * len(found | largest)]
    return sum(alike) * 2 > len(below)


# --- from the model down: kinds and layers ----------------------------------------------------------------


def _walked(
    texts: Sequence[str], levels: Sequence[Level], node_P: Ints, shape_N: Ints, shapes: Sequence[_Shape]
) -> NameTree:
    words = {word: code for code, word in enumerate(dict.fromkeys(word for shape in shapes for word in shape.called))}
    calls = list(words)
    # the children of all shapes one after the other
    begin_S = np.cumsum([0, *(len(shape.called) for shape in shapes)])
    called = np.array([words[word] for shape in shapes for word in shape.called], dtype=np.int64)
    number = np.array([n for shape in shapes for n in shape.numbers], dtype=np.int64)
    of_expert = np.array([is_expert for shape in shapes for is_expert in shape.are_experts], dtype=bool)
    kinds, layers, layer_codes = [""], [()], {(): 0}
    kind_N, stack_N, layer_N = (np.zeros(len(shape_N), dtype=np.int64) for _ in range(3))
    expert_N = np.full(len(shape_N), _NONE, dtype=np.int64)
    for level in levels:
        nodes = slice(level.first, level.first + len(level.part))
        begins = _begins(level.parent)
        within = np.arange(len(level.part)) - np.repeat(begins, np.diff(np.append(begins, len(level.part))))
        at = begin_S[shape_N[level.parent]] + within
        inside, which = distinct(kind_N[level.parent] * len(calls) + called[at])
        kind_N[nodes] = len(kinds) + which
        for one in inside.tolist():
            above, call = kinds[one // len(calls)], calls[one % len(calls)]
            kinds.append(f"{above}.{call}" if one >= len(calls) else call)
        is_number, above_expert = number[at] != _NONE, expert_N[level.parent]
        expert_N[nodes] = np.where(of_expert[at], number[at], above_expert)
        is_layer = is_number & ~of_expert[at] & (above_expert == _NONE)
        stack_N[nodes] = np.where(is_layer, kind_N[nodes], stack_N[level.parent])
        layer_N[nodes] = layer_N[level.parent]
        paths = (layer_N[level.parent] * len(texts) + level.part)[is_layer]
        inside, sample, which = np.unique(paths, return_index=True, return_inverse=True)
        numbers = number[at][is_layer][sample].tolist()
        found = [(*layers[one // len(texts)], n) for one, n in zip(inside.tolist(), numbers, strict=True)]
        for layer in found:
            if layer not in layer_codes:
                layer_codes[layer] = len(layers)
                layers.append(layer)
        layer_N[nodes][is_layer] = np.array([layer_codes[layer] for layer in found], dtype=np.int64)[which]
    return NameTree(tuple(kinds), tuple(layers), kind_N[node_P], stack_N[node_P], layer_N[node_P], expert_N[node_P])
