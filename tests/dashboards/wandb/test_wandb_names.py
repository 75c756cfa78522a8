"""Keys, groups and the heatmap's grid."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from update_watch.dashboards.wandb.grid import LayerGrid
from update_watch.dashboards.wandb.names import KeyNames, group_names


def test_dots_and_other_characters_become_underscores() -> None:
    names = KeyNames()
    assert names["blocks.0.attn.weight"] == "blocks_0_attn_weight"
    assert names["a/b-c d"] == "a_b_c_d"
    assert names[""] == "unnamed"


def test_names_that_collide_once_mapped_stay_apart_and_keep_their_keys() -> None:
    names = KeyNames()
    first, second, third = names["a.b"], names["a_b"], names["A_B"]
    assert first == "a_b"
    assert re.fullmatch(r"a_b_[0-9a-f]{6}", second)
    assert re.fullmatch(r"A_B_[0-9a-f]{6}", third)
    assert (names["a.b"], names["a_b"], names["A_B"]) == (first, second, third)
    again = KeyNames()
    assert [again[n] for n in ("a.b", "a_b", "A_B")] == [first, second, third]


@given(st.lists(st.text(alphabet="aA._-é", max_size=4), unique=True, max_size=30))
def test_any_names_get_keys_that_differ_and_that_wandb_can_sort(texts: list[str]) -> None:
    names = KeyNames()
    keys = [names[text] for text in texts]
    assert len({key.lower() for key in keys}) == len(texts)
    assert all(re.fullmatch(r"[0-9A-Za-z_]+", key) for key in keys)


LAYER_OF = {f"blocks.{i}.{part}.weight": f"blocks.{i}.{part}" for i in range(4) for part in ("attn", "mlp")}


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (8, list(LAYER_OF)),
        (7, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        (4, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        (3, ["blocks.0-1", "blocks.2-3"]),
        (1, ["blocks"]),
    ],
)
def test_tensors_are_grouped_as_finely_as_the_limit_allows(limit: int, groups: list[str]) -> None:
    assert list(dict.fromkeys(group_names(LAYER_OF, limit).values())) == groups


def test_two_hundred_blocks_stay_apart_as_ranges_of_blocks() -> None:
    layer_of = {f"blocks.{i}.{part}.weight": f"blocks.{i}.{part}" for i in range(200) for part in ("attn", "mlp")}
    groups = group_names(layer_of, 64)
    assert groups["blocks.7.mlp.weight"] == "blocks.4-7"
    assert len(set(groups.values())) == 50


@given(
    st.lists(st.text(alphabet="ab.", min_size=1, max_size=7), unique=True, min_size=1, max_size=40), st.integers(1, 9)
)
def test_there_are_never_more_groups_than_the_limit(paths: list[str], limit: int) -> None:
    groups = group_names({f"{path}.w": path for path in paths}, limit)
    assert len(set(groups.values())) <= limit
    assert list(groups) == [f"{path}.w" for path in paths]


def test_tensors_of_one_layer_are_grouped_by_layer_first() -> None:
    layer_of = {"fc.weight": "fc", "fc.bias": "fc", "head.weight": "head"}
    assert group_names(layer_of, 2) == {"fc.weight": "fc", "fc.bias": "fc", "head.weight": "head"}


def test_more_top_level_modules_than_the_limit_become_ranges() -> None:
    layer_of = {f"layer{i}.w": f"layer{i}" for i in range(5)}
    assert list(group_names(layer_of, 3).values()) == ["layer0-layer1"] * 2 + ["layer2-layer3"] * 2 + ["layer4"]


def test_the_grid_shows_every_window_while_there_is_room() -> None:
    grid = LayerGrid(columns=4)
    for step in (10, 20, 30):
        grid.add(step - 10, step, {"a": step / 100, "b": None, "c": float("nan")})
    assert grid.rows() == [["a", 0, 10, 0.1], ["a", 10, 20, 0.2], ["a", 20, 30, 0.3]]


def test_a_full_grid_joins_windows_and_keeps_the_smallest_value() -> None:
    grid = LayerGrid(columns=4)
    for step in range(1, 10):
        grid.add(step - 1, step, {"a": 0.0 if step == 3 else 1.0})
    # 1..4 in pairs after the fifth window, in fours after the ninth
    assert grid.rows() == [["a", 0, 4, 0.0], ["a", 4, 8, 1.0], ["a", 8, 9, 1.0]]


@given(st.integers(1, 300))
def test_the_grid_is_bounded_and_its_last_column_is_the_present(windows: int) -> None:
    grid = LayerGrid(columns=8)
    for step in range(1, windows + 1):
        grid.add(step - 1, step, {"a": float(step)})
    assert len(grid.spans) <= 8
    # without gaps from the first step to the last
    assert [begin for begin, _ in grid.spans] == [0, *(end for _, end in grid.spans[:-1])]
    assert grid.spans[-1][1] == windows
    assert min(value for _, _, _, value in grid.rows()) == 1.0


def test_a_layer_that_appears_late_has_no_cells_before() -> None:
    grid = LayerGrid(columns=4)
    grid.add(0, 1, {"a": 1.0})
    grid.add(1, 2, {"a": 1.0, "b": 0.5})
    assert grid.rows() == [["a", 0, 1, 1.0], ["a", 1, 2, 1.0], ["b", 1, 2, 0.5]]
