"""Names for people: short labels of kinds, and groups of tensors in a few words ("all 65 norms, 12 of 32 o_proj").

What is of one kind is decided in `kinds`; this says it. Alerts, headlines, maps and tables use the same words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from update_watch.kinds import STAR, Place, layer_label, places

_NORM = re.compile(r"norm|(^|_)(ln|bn|rms)(_|\d|$)|(^|_)ln[_a-z]*$", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|^w[tp]e$|^tok(en)?s?$|^positions?$", re.IGNORECASE)
_PLURALS = {"bias": "biases", "matrix": "matrices"}
_ROLES = frozenset({"weight", "bias"})  # of a module's tensors
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
    taken = list(stripped.values())
    parts = {
        kind: [part for part in (short if taken.count(short) == 1 else kind).split(".") if STAR not in part]
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
            length[kind] = min(length[kind] + 1, len(parts[kind]))
    return {kind: ".".join(parts[kind][-length[kind] :]) for kind in kinds}


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
    if len(inside) > 1 and len(inside) == len(shapes):
        return [f"{_all(len(inside))} tensors"]
    found = places(shapes)
    labels = kind_labels(place.kind for place in found.values())
    families: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        families.setdefault(family(name, shape), []).append(name)
    phrases: list[tuple[int, str]] = []
    for word, members in families.items():
        mine = [name for name in members if name in inside]
        if len(mine) == len(members) > 1:
            phrases.append((len(mine), f"{_all(len(mine))} {plural_of(word)}"))
            continue
        spoken = _kinds_in_words(mine, members, found, labels)
        if len(spoken) > _PHRASES:
            spoken = [(len(mine), f"{len(mine):,} of {len(members):,} {plural_of(word)}")]
        phrases += spoken
    phrases.sort(key=lambda pair: (not pair[1].startswith(("all ", "both ")), -pair[0]))  # what is whole says most
    if len(phrases) > limit:
        rest = sum(count for count, _ in phrases[limit - 1 :])
        phrases = [*phrases[: limit - 1], (rest, f"{rest:,} more")]
    return [words for _, words in phrases]


def _kinds_in_words(
    mine: Sequence[str], members: Sequence[str], found: Mapping[str, Place], labels: Mapping[str, str]
) -> list[tuple[int, str]]:
    """(tensors, phrase) per kind of `mine`, which are some of a family's `members`."""
    totals: dict[str, int] = {}
    for name in members:
        totals[found[name].kind] = totals.get(found[name].kind, 0) + 1
    groups: dict[str, list[str]] = {}
    for name in mine:
        groups.setdefault(found[name].kind, []).append(name)
    spoken = []
    for kind, alike in groups.items():
        label, total = labels[kind], totals[kind]
        if len(alike) == 1:
            words = alike[0]
        elif len(alike) == total:
            words = f"{_all(total)} {label}"
        else:
            words = _stretch(label, [found[name] for name in alike]) or f"{len(alike):,} of {total:,} {label}"
        spoken.append((len(alike), words))
    return spoken


def _all(count: int) -> str:
    return "both" if count == 2 else f"all {count:,}"


def _stretch(label: str, alike: Sequence[Place]) -> str:
    """ "o_proj in layers 28-31", where they are neighbours and nothing else numbers them."""
    if any(place.expert is not None or not place.layer for place in alike):
        return ""
    if len({place.layer[:-1] for place in alike}) > 1:
        return ""
    numbers = sorted(place.layer[-1] for place in alike)
    if numbers[-1] - numbers[0] != len(numbers) - 1:
        return ""
    first, last = min(place.layer for place in alike), max(place.layer for place in alike)
    return f"{label} in layers {layer_label(first)}-{layer_label(last)}"


def without_prefix(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without the module path that all of them share, and that path with its dot."""
    if len(names) < 2:
        return list(names), ""
    shared = os.path.commonprefix(list(names))
    prefix = shared[: shared.rfind(".") + 1]
    if any(name[len(prefix) :][:1].isdigit() for name in names):  # "layers.3" says more than "3"
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    return [name[len(prefix) :] for name in names], prefix


def cut_middle(text: str, width: int, dots: str = "…") -> str:
    """At most `width` characters, the middle left out: both the layer's number and the end of a name tell it apart."""
    if len(text) <= width:
        return text
    keep = max(width - len(dots), 0)
    head = (keep + 1) * 2 // 5
    return text[:head] + dots + text[len(text) - (keep - head) :]
