"""Names for people: short labels of kinds, and groups of tensors in a few words ("all 65 norms, 12 of 32 o_proj").

What is of one kind is decided in `kinds`; this says it. Alerts, headlines, maps and tables use the same words.
"""

from __future__ import annotations

import collections
import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from update_watch.kinds import STAR, layer_label, tree_of

_NORM = re.compile(r"norm|(^|_)(ln|bn|rms)(_|\d|$)|(^|_)ln[_a-z]*$", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|^w[tp]e$|^tok(en)?s?$|^positions?$", re.IGNORECASE)
_PLURALS = {"bias": "biases", "matrix": "matrices"}
_ROLES = frozenset({"weight", "bias"})  # of a module's tensors
_LABEL_PARTS = 32  # of a name at its end; where they do not tell it apart the whole name is its label
_PHRASES = 3  # of one family; beyond, "180 of 226 matrices" says more


def family(name: str, shape: Sequence[int]) -> str:
    """What a tensor is, in a word everybody knows: norm, bias, embedding, matrix, kernel, vector, scalar.

    By its shape, and by the name of its module where that tells more.
    """
    *path, leaf = name.split(".")
    module = next((part for part in reversed(path) if not part.isdecimal()), leaf)
    dims = [n for n in shape if n != 1]
    if len(dims) >= 2:
        return "embedding" if _EMBEDDING.search(module) else "matrix" if len(dims) == 2 else "kernel"
    if "bias" in leaf.lower():
        return "bias"
    if _NORM.search(module) or _NORM.search(leaf):
        return "norm"
    return "vector" if dims else "scalar"


def plural_of(word: str) -> str:
    """ "matrix" -> "matrices"."""
    return _PLURALS.get(word, word + "s")


def kind_labels(kinds: Iterable[str]) -> dict[str, str]:
    """Kind -> the shortest end of it that no other kind has: "model.layers.*.self_attn.q_proj.weight" -> "q_proj"."""
    kinds = list(dict.fromkeys(kinds))
    stripped = {kind: kind.removesuffix(".weight") for kind in kinds}
    taken = collections.Counter(stripped.values())
    parts = {
        kind: [part for part in (short if taken[short] == 1 else kind).split(".") if STAR not in part]
        or [kind.replace(STAR, "").strip(".") or kind]
        for kind, short in stripped.items()
    }
    length = {kind: _least(kind, found) for kind, found in parts.items()}
    for _ in range(max(map(len, parts.values()), default=0)):
        groups: dict[str, list[str]] = {}
        for kind in kinds:
            groups.setdefault(".".join(parts[kind][-length[kind] :]), []).append(kind)
        clashing = [kind for alike in groups.values() if len(alike) > 1 for kind in alike]
        if not clashing:
            break
        for kind in clashing:
            more = length[kind] + 1 if length[kind] < _LABEL_PARTS else len(parts[kind])
            length[kind] = min(more, len(parts[kind]))
    return {kind: ".".join(parts[kind][-length[kind] :]) for kind in kinds}


def members_by_kind(names: Sequence[str]) -> dict[str, list[int]]:
    """Kind -> indices of its tensors, in the order of the model."""
    tree = tree_of(tuple(names))
    order = np.argsort(tree.kind_P, kind="stable")
    ends = np.flatnonzero(np.diff(tree.kind_P[order])) + 1
    groups = [part.tolist() for part in np.split(order, ends)] if len(order) else []
    groups.sort(key=lambda members: members[0])
    return {tree.kinds[tree.kind_P[members[0]]]: members for members in groups}


def _least(kind: str, parts: Sequence[str]) -> int:
    """How many parts a label must have: a number alone says nothing, and experts are always called so."""
    if f".{STAR}." in kind:
        for i, part in enumerate(parts):
            if "expert" in part.lower() and f"{part}.{STAR}" in kind:
                return len(parts) - i
    telling = (n for n, part in enumerate(reversed(parts), start=1) if not part.isdecimal() and part not in _ROLES)
    return next(telling, len(parts))


def group_words(chosen: Collection[str], shapes: Mapping[str, Sequence[int]], limit: int = 4) -> list[str]:
    """Tensors in a few phrases, whole families and kinds first, then the largest: ["all 5 norms", "q_proj in layers 17-31", "head.weight"].

    Args:
        chosen: names of the tensors to speak of; each must be in `shapes`.
        shapes: name -> shape, of all tensors of the model.
        limit: most phrases; the last then counts what is left ("9 more").
    """
    inside = set(chosen)
    members = [i for i, name in enumerate(shapes) if name in inside]
    return model_words(tuple(shapes), tuple(map(tuple, shapes.values()))).group(members, limit)


@functools.lru_cache(4)  # many groups of one model are spoken of
def model_words(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> ModelWords:
    """What is said of the tensors of a model, which have these names, all of them different, and shapes."""
    return ModelWords(names, shapes)


class ModelWords:
    """Names of a model's tensors, and groups of them, in words. Families and kinds are counted once for all groups.

    P is the number of tensors.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        self._names = names
        self._tree = tree = tree_of(tuple(names))
        self.labels = kind_labels([tree.kinds[kind] for kind in _in_order(tree.kind_P)])
        # tensors of one kind differ in their numbers; with as many dimensions they are one family
        dims = {shape: min(3, sum(n != 1 for n in shape)) for shape in set(shapes)}
        dims_P = np.fromiter(map(dims.__getitem__, shapes), dtype=np.int64, count=len(names))
        _, sample, at = np.unique(tree.kind_P * 4 + dims_P, return_index=True, return_inverse=True)
        found = [family(names[i], shapes[i]) for i in sample.tolist()]
        words = list(dict.fromkeys(found[k] for k in _in_order(at)))
        self.families = tuple(words)  # in the order of the model
        self.family_P = np.array([words.index(word) for word in found], dtype=np.int64)[at]  # index in `families`
        self._of_family = np.bincount(self.family_P, minlength=len(words))
        self._pair_P = self.family_P * len(tree.kinds) + tree.kind_P
        pairs, counts = np.unique(self._pair_P, return_counts=True)
        self._last: tuple[int, NDArray[np.int64], list[str]] | None = None
        self._of_pair = dict(zip(pairs.tolist(), counts.tolist(), strict=True))

    def group(self, members: Sequence[int] | NDArray[np.intp], limit: int) -> list[str]:
        """The tensors with these indices, in increasing order; see `group_words`."""
        inside = np.array(members, dtype=np.int64)
        last = self._last  # window after window it is the same
        if last is None or last[0] != limit or not np.array_equal(last[1], inside):
            last = self._last = limit, inside, self._group(inside, limit)
        return list(last[2])

    def _group(self, inside: NDArray[np.int64], limit: int) -> list[str]:
        if len(inside) > 1 and len(inside) == len(self._names):
            return [f"{_all(len(inside))} tensors"]
        phrases: list[tuple[int, str]] = []
        of_family = self.family_P[inside]
        for code, word in enumerate(self.families):
            mine, total = inside[of_family == code], int(self._of_family[code])
            if len(mine) == total > 1:
                phrases.append((total, f"{_all(total)} {plural_of(word)}"))
                continue
            spoken = self._kinds(mine) if len(mine) else []
            if len(spoken) > _PHRASES:
                spoken = [(len(mine), f"{len(mine):,} of {total:,} {plural_of(word)}")]
            phrases += spoken
        phrases.sort(key=lambda pair: (not pair[1].startswith(("all ", "both ")), -pair[0]))  # what is whole says most
        if len(phrases) > limit:
            rest = sum(count for count, _ in phrases[limit - 1 :])
            phrases = [*phrases[: limit - 1], (rest, f"{rest:,} more")]
        return [words for _, words in phrases]

    def _kinds(self, mine: NDArray[np.int64]) -> list[tuple[int, str]]:
        """(tensors, phrase) per kind of `mine`, which are of one family."""
        kinds, spoken = self._tree.kind_P[mine], []
        for kind in _in_order(kinds):
            alike = mine[kinds == kind]
            label, total = self.labels[self._tree.kinds[kind]], self._of_pair[int(self._pair_P[alike[0]])]
            if len(alike) == 1:
                words = self._names[int(alike[0])]
            elif len(alike) == total:
                words = f"{_all(total)} {label}"
            else:
                words = self._stretch(label, alike) or f"{len(alike):,} of {total:,} {label}"
            spoken.append((len(alike), words))
            if len(spoken) > _PHRASES:
                break  # a family in many pieces is counted
        return spoken

    def _stretch(self, label: str, alike: NDArray[np.int64]) -> str:
        """ "o_proj in layers 28-31", where they are neighbours and nothing else numbers them."""
        layers = sorted(self._tree.layers[code] for code in set(self._tree.layer_P[alike].tolist()))
        if (self._tree.expert_P[alike] >= 0).any() or not layers[0] or len(layers) != len(alike):
            return ""
        if len({layer[:-1] for layer in layers}) > 1 or layers[-1][-1] - layers[0][-1] != len(layers) - 1:
            return ""
        return f"{label} in layers {layer_label(layers[0])}-{layer_label(layers[-1])}"


def _in_order(codes: NDArray[np.int64]) -> list[int]:
    """The distinct ones as they come."""
    found, first = np.unique(codes, return_index=True)
    ordered: list[int] = found[np.argsort(first)].tolist()
    return ordered


def _all(count: int) -> str:
    return "both" if count == 2 else f"all {count:,}"


def shared_prefix(names: Sequence[str]) -> str:
    """The module path that all names share, with its dot; "" where there is none."""
    if len(names) < 2:
        return ""
    shared = os.path.commonprefix([min(names), max(names)])
    prefix = shared[: shared.rfind(".") + 1]
    at = len(prefix)
    if any(name[at : at + 1].isdigit() for name in names):  # "layers.3" says more than "3"
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    return prefix


def without_prefix(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without the module path that all of them share, and that path with its dot."""
    prefix = shared_prefix(names)
    return [name[len(prefix) :] for name in names], prefix


def cut_middle(text: str, width: int, dots: str = "…") -> str:
    """At most `width` characters, the middle left out: both the layer's number and the end of a name tell it apart."""
    if len(text) <= width:
        return text
    keep = max(width - len(dots), 0)
    head = (keep + 1) * 2 // 5
    return text[:head] + dots + text[len(text) - (keep - head) :]
