"""Names as a tree: the way to each node is the name, and names share the nodes of what they have in common."""

from __future__ import annotations

import random

import numpy as np
import pytest

from update_watch.columns.name_levels import distinct, levels_of

WORDS = [
    "layers",
    "h",
    "0",
    "1",
    "10",
    "weight",
    "weighs",
    "weight0",
    "weight01",
    "",
    "é",
    "²",
    "\ud800",
    "\x00",
    "\x00\x00",
]
WORDS += [sign * n for sign in "xyé" for n in (7, 8, 9, 15, 16, 17, 63, 64, 65, 200)]
WORDS += ["x" * 70 + end for end in "ab"] + ["x" * 8 + end for end in ("a", "b", "\x00")]


def paths(names: list[str]) -> list[tuple[str, ...]]:
    """Of each name the texts on the way to its node; fails where two ways are one, or levels are not in order."""
    texts, levels, node_P = levels_of(names)
    way: dict[int, tuple[str, ...]] = {0: ()}
    for level in levels:
        assert level.first == len(way) and (np.diff(level.parent) >= 0).all()
        for n, (parent, part) in enumerate(zip(level.parent.tolist(), level.part.tolist(), strict=True), level.first):
            way[n] = (*way[parent], texts[part])
    assert len(set(way.values())) == len(way) and len(set(texts)) == len(texts)
    return [way[node] for node in node_P.tolist()]


def test_the_way_to_a_node_is_the_name_in_parts() -> None:
    generator = random.Random(0)
    for _ in range(300):
        words = generator.sample(WORDS, generator.randint(1, 12))
        count = generator.choice((1, 2, 30, 200))
        names = [".".join(generator.choices(words, k=generator.choice((1, 2, 3, 5)))) for _ in range(count)]
        assert paths(names) == [tuple(name.split(".")) for name in names]


@pytest.mark.parametrize("length", [64, 65, 66, 200])
def test_what_lies_deeper_than_64_parts_is_one(length: int) -> None:
    names = [".".join("abc"[i % 3] for i in range(length)), "a.b", ".".join(["a"] * length)]
    assert paths(names) == [tuple(name.split(".", 64)) for name in names]


def test_wrappers_are_no_part() -> None:
    names = ["_orig_mod.a.b", "a._fsdp_wrapped_module.c", "_orig_mod", "a._orig_modern"]
    assert paths(names) == [("a", "b"), ("a", "c"), ("_orig_mod",), ("a", "_orig_modern")]


def test_of_no_names_there_is_the_model_alone() -> None:
    assert paths([]) == []


@pytest.mark.parametrize("values", [[], [3], [1, 2, 5], [2, 2, 1, 1, 2], [5, 5, 5], list(range(50)) * 2])
def test_the_distinct_ones_and_where_each_is_among_them(values: list[int]) -> None:
    found, at = distinct(np.array(values, dtype=np.int64))
    assert found.tolist() == sorted(set(values)) and found[at].tolist() == values
