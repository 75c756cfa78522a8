"""Keys, groups and the heatmap's grid."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tests.support.wandb.samples import healthy_tensor, sample_report, stalled_tensor
from update_watch.dashboards.wandb.grid import LayerGrid
from update_watch.dashboards.wandb.names import KeyNames
from update_watch.dashboards.wandb.rows import ChosenTensors, KindGroups


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


def groups_of(limit: int, *names: str) -> dict[str, list[str]]:
    report = sample_report(128, tuple(healthy_tensor(name) for name in names))
    return {label: [t.name for t in tensors] for label, tensors in KindGroups(limit).of(report).items()}


NAMES = [f"h.{i}.{part}.weight" for i in range(3) for part in ("attn.q", "mlp.up", "ln")]


def test_tensors_are_together_by_kind_over_all_layers() -> None:
    assert groups_of(8, *NAMES, "head.weight") == {
        "q": [f"h.{i}.attn.q.weight" for i in range(3)],
        "up": [f"h.{i}.mlp.up.weight" for i in range(3)],
        "ln": [f"h.{i}.ln.weight" for i in range(3)],
        "head": ["head.weight"],
    }


@given(st.integers(1, 9), st.integers(1, 30))
def test_there_are_never_more_groups_than_the_limit(limit: int, count: int) -> None:
    names = [f"part{chr(97 + i % 26)}{chr(97 + i // 26)}.weight" for i in range(count)]
    groups = groups_of(limit, *names, *NAMES)
    assert len(groups) <= limit
    assert sorted(name for members in groups.values() for name in members) == sorted([*names, *NAMES])


def test_a_kind_keeps_its_label_when_others_appear() -> None:
    groups = KindGroups(8)
    first = sample_report(128, tuple(healthy_tensor(name) for name in ("a.proj.weight", "b.other.weight")))
    assert set(groups.of(first)) == {"proj", "other"}
    names = ("a.proj.weight", "b.other.weight", "b.proj.weight")
    assert list(groups.of(sample_report(256, tuple(healthy_tensor(name) for name in names)))) == [
        "proj",
        "other",
        "b.proj",
    ]


def test_tensors_with_a_series_are_the_worst_and_those_asked_for_and_they_keep_it() -> None:
    chosen = ChosenTensors(("*.ln.*",), 1)
    bad = [stalled_tensor("h.0.mlp.up.weight", efficiency=0.05), stalled_tensor("h.1.mlp.up.weight", efficiency=0.01)]
    found = chosen.of(sample_report(128, (*bad, healthy_tensor("h.0.ln.weight"), healthy_tensor("x.weight"))))
    assert [t.name for t in found] == ["h.1.mlp.up.weight", "h.0.ln.weight"]
    well = tuple(healthy_tensor(name) for name in ("h.0.mlp.up.weight", "h.1.mlp.up.weight"))
    assert [t.name for t in chosen.of(sample_report(256, well))] == ["h.1.mlp.up.weight"]


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
