"""What is of one kind, and what is a layer: the one place that reads the structure of a model out of its names.

"model.layers.17.self_attn.q_proj.weight" is of the kind "model.layers.*.self_attn.q_proj.weight" and lies in layer 17.
A number is the number of a layer (or of an expert) where what is numbered repeats: modules built alike, one after the
other. Where it does not ("mlp.0.weight", "mlp.2.weight": two matrices of one network; "layer.0", "layer.1" in T5: an
attention and a network) it belongs to the name of the kind. So two tensors are of one kind exactly when one stands in
the same place of another layer or of another expert.

Maps, alerts, groups of series and the terminal all read it here; `name_tree` works it out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from update_watch.name_tree import STAR, NameTree, name_tree

__all__ = ["STAR", "Place", "layer_label", "places", "tree_of"]


class Place(NamedTuple):
    """Where a tensor stands in its model."""

    kind: str  # its name, with a star for the number of the layer and of the expert
    stack: str  # what its layer is one of: "model.layers.*"; "" outside of layers
    layer: tuple[int, ...]  # number of the layer, of the outermost first ("stages.1.blocks.3": (1, 3)); () outside
    expert: int | None  # number of the expert, or None


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
    return name_tree(names)


def layer_label(layer: Sequence[int]) -> str:
    """(17,) -> "17"; (1, 3) -> "1.3"."""
    return ".".join(str(number) for number in layer)
