"""What is of one kind and what is a layer, for the ways in which real models name their tensors."""

from __future__ import annotations

import pytest

from update_watch.kinds import layer_label, places
from update_watch.naming import kind_labels

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(4)
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
]
MOE = [
    f"model.layers.{i}.{part}.weight"
    for i in range(3)
    for part in ("self_attn.o_proj", "mlp.gate", *(f"mlp.experts.{e}.w1" for e in range(8)))
]
RESNET = [
    "conv1.weight",
    *(f"layer{a}.{b}.{part}.weight" for a in (1, 2, 3) for b in (0, 1) for part in ("conv1", "bn1", "conv2", "bn2")),
    "fc.weight",
]
T5 = [
    f"encoder.block.{i}.layer.{part}.weight"
    for i in range(3)
    for part in ("0.SelfAttention.q", "0.layer_norm", "1.DenseReluDense.wi", "1.layer_norm")
]
PIPELINE = [f"stages.{s}.layers.{i}.attn.q.weight" for s in range(2) for i in range(2)]
ADAPTER = [
    f"base_model.model.layers.{i}.q_proj.{part}.weight" for i in range(3) for part in ("base_layer", "lora_A.default")
]


@pytest.mark.parametrize(
    ("names", "name", "kind", "layer", "expert"),
    [
        (LLAMA, LLAMA[4], "model.layers.*.self_attn.q_proj.weight", (1,), None),
        (LLAMA, "model.norm.weight", "model.norm.weight", (), None),
        (MOE, "model.layers.2.mlp.experts.7.w1.weight", "model.layers.*.mlp.experts.*.w1.weight", (2,), 7),
        (MOE, "model.layers.2.mlp.gate.weight", "model.layers.*.mlp.gate.weight", (2,), None),
        (RESNET, "layer3.1.bn2.weight", "layer*.*.bn2.weight", (3, 1), None),
        (RESNET, "conv1.weight", "conv1.weight", (), None),
        (T5, T5[1], "encoder.block.*.layer.0.layer_norm.weight", (0,), None),
        (T5, T5[3], "encoder.block.*.layer.1.layer_norm.weight", (0,), None),
        (PIPELINE, PIPELINE[-1], "stages.*.layers.*.attn.q.weight", (1, 1), None),
        (ADAPTER, ADAPTER[-1], "base_model.model.layers.*.q_proj.lora_A.default.weight", (2,), None),
        (["net.0.weight", "net.2.weight"], "net.2.weight", "net.2.weight", (), None),
        (["h.0.w", "h.1.w"], "h.1.w", "h.*.w", (1,), None),
        ([f"features.{i}.weight" for i in (0, 3, 6, 8, 10)], "features.6.weight", "features.*.weight", (6,), None),
    ],
)
def test_a_tensor_stands_in_its_kind_and_layer(names, name, kind, layer, expert) -> None:
    place = places(names)[name]
    assert (place.kind, place.layer, place.expert) == (kind, layer, expert)


def test_a_stack_ends_with_the_number_of_the_layer() -> None:
    assert {place.stack for place in places(MOE).values()} == {"model.layers.*"}
    assert places(LLAMA)["model.norm.weight"].stack == ""


def test_layers_of_two_alternating_makes_are_layers() -> None:
    names = [f"h.{i}.{part}.weight" for i in range(8) for part in (("mamba.in", "n") if i % 4 else ("attn.q", "n"))]
    found = places(names)
    assert found["h.0.attn.q.weight"].kind == "h.*.attn.q.weight"
    assert found["h.7.mamba.in.weight"].layer == (7,)


def test_wrappers_are_no_part_of_a_kind() -> None:
    found = places(["_orig_mod.h.0.a.b.weight", "_orig_mod.h.1.a.b.weight"])
    assert {place.kind for place in found.values()} == {"h.*.a.b.weight"}


@pytest.mark.parametrize(
    "name",
    ["", ".", "...", "a" * 5000, "x." * 5000, "²", "h.².weight", "*", "h.*.w", "🙂.0.w.w", "h." + "9" * 5000 + ".w"],
)
def test_any_name_is_a_place(name: str) -> None:
    place = places([name, "other.weight"])[name]
    assert (place.kind == name) == (place.layer == ())
    assert set(kind_labels([place.kind, "other.weight"])) == {place.kind, "other.weight"}


def test_layer_numbers_in_words() -> None:
    assert layer_label((17,)) == "17"
    assert layer_label((1, 3)) == "1.3"
