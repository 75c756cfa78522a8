"""Names for people: families, labels of kinds, groups of tensors in a few words."""

from __future__ import annotations

import time

import pytest

from update_watch.kinds import places
from update_watch.naming import cut_middle, family, group_words, kind_labels, plural_of, without_prefix

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    **{
        f"model.layers.{i}.{part}.weight": (8,) if "norm" in part else (8, 8)
        for i in range(32)
        for part in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}
NORMS = [name for name in SHAPES if "norm" in name]


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        ("transformer.h.0.ln_1.weight", (8,), "norm"),
        ("model.norm.weight", (8,), "norm"),
        ("layer1.0.bn1.weight", (8,), "norm"),
        ("ln_f.bias", (8,), "bias"),
        ("wte.weight", (9, 8), "embedding"),
        ("model.embed_tokens.weight", (9, 8), "embedding"),
        ("blocks.0.attention.qkv.weight", (24, 8), "matrix"),
        ("conv1.weight", (8, 3, 3, 3), "kernel"),
        ("net.1.weight", (8,), "vector"),
        ("alpha", (), "scalar"),
    ],
)
def test_families(name: str, shape: tuple[int, ...], word: str) -> None:
    assert family(name, shape) == word


def test_plurals() -> None:
    assert [plural_of(w) for w in ("norm", "bias", "matrix")] == ["norms", "biases", "matrices"]


def test_labels_are_as_short_as_can_be_told_apart() -> None:
    names = [
        *(f"h.{i}.{part}" for i in range(2) for part in ("ln_1.weight", "ln_1.bias", "attn.c_proj.weight")),
        *(f"h.{i}.{part}" for i in range(2) for part in ("mlp.c_proj.weight", "mlp.experts.0.w1.weight")),
        "net.0.weight",
        "net.0.bias",
    ]
    labels = kind_labels(place.kind for place in places(names).values())
    assert sorted(labels.values()) == sorted(
        ["ln_1", "ln_1.bias", "attn.c_proj", "mlp.c_proj", "experts.w1", "net.0", "net.0.bias"]
    )


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (list(SHAPES), ["all 163 tensors"]),
        (NORMS, ["all 65 norms"]),
        ([*NORMS, "lm_head.weight"], ["all 65 norms", "lm_head.weight"]),
        ([f"model.layers.{i}.self_attn.o_proj.weight" for i in (30, 31)], ["o_proj in layers 30-31"]),
        ([f"model.layers.{i}.self_attn.o_proj.weight" for i in (3, 9)], ["2 of 32 o_proj"]),
        ([n for n in SHAPES if "q_proj" in n], ["all 32 q_proj"]),
        (["lm_head.weight"], ["lm_head.weight"]),
        ([], []),
    ],
)
def test_groups_in_words(chosen: list[str], words: list[str]) -> None:
    assert group_words(chosen, SHAPES) == words


def test_many_phrases_are_counted() -> None:
    scattered = [n for n in SHAPES if n.split(".")[2:3] in (["3"], ["7"], ["20"])] + [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    words = group_words(scattered, SHAPES, limit=3)
    assert len(words) == 3
    assert words[0] == "10 of 97 matrices"
    assert words[-1].endswith(" more")
    counts = [int(w.split()[0]) if w[0].isdigit() else 1 for w in words]
    assert sum(counts) == len(scattered)


def test_what_all_names_share_is_left_out() -> None:
    assert without_prefix(["m.h.0.a", "m.h.1.a"]) == (["h.0.a", "h.1.a"], "m.")
    assert without_prefix(["one.name"]) == (["one.name"], "")


def test_names_are_cut_in_the_middle() -> None:
    cut = cut_middle("layers.17.post_attention_layernorm.weight", 26)
    assert len(cut) == 26
    assert cut.startswith("layers.17")
    assert cut.endswith("norm.weight")
    assert cut_middle("short", 26) == "short"


def test_labels_of_names_of_many_thousand_parts_take_no_time() -> None:
    kinds = [".".join(["x"] * (20_000 + i)) for i in range(40)] + [f"{i}.a.b" for i in range(2)]
    started = time.process_time()
    found = kind_labels(kinds)
    assert time.process_time() - started < 5  # a part more at a time: a minute
    assert len(set(found.values())) == len(kinds) and found["1.a.b"] == "1.a.b"
