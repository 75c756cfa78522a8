"""Which tensors of a checkpoint would stall at a rate: held against steps that are really made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from update_watch.checkpoints.at_rate import at_rate, of_files, text
from update_watch.checkpoints.files import CheckpointError
from update_watch.cli import main

LOW = (torch.bfloat16, torch.float16)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)).to(torch.bfloat16)


def trained(
    rate: float, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = kind(net.parameters(), lr=rate, **options)  # type: ignore[call-arg]
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.randn(8, 16).bfloat16()).float().square().mean().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.AdamW, {"weight_decay": 0.0}), (torch.optim.SGD, {"momentum": 0.9})]
)
def test_what_is_said_to_arrive_is_what_a_step_with_this_state_stores(
    kind: type[torch.optim.Optimizer], options: dict[str, float]
) -> None:
    rate = 1e-4 if kind is torch.optim.AdamW else 1e-2
    net, optimizer = trained(rate, kind, **options)
    found = {t.name: t for t in at_rate(net.state_dict(), rate, optimizer.state_dict())}
    assert {t.basis for t in found.values()} == {"optimizer state"}
    for name, p in net.named_parameters():
        state = optimizer.state[p]
        if kind is torch.optim.AdamW:
            step = float(state["step"])
            direction = (state["exp_avg"].double() / (1 - 0.9**step)) / (
                (state["exp_avg_sq"].double() / (1 - 0.999**step)).sqrt() + 1e-8
            )
        else:
            direction = state["momentum_buffer"].double()
        update = -rate * direction
        applied = (p.detach().double() + update).bfloat16().double() - p.detach().double()
        assert found[name].efficiency == pytest.approx(
            float((applied * update).sum() / update.square().sum()), abs=1e-9
        )
        least = found[name].least_lr
        if least is not None and found[name].efficiency < 0.8:
            assert least > rate


def test_without_a_state_updates_are_as_large_as_the_rate() -> None:
    weights = {
        "norm.weight": torch.ones(100).bfloat16(),
        "small": torch.full((10,), 2**-10).bfloat16(),
        "full": torch.ones(3),
    }
    found = at_rate(weights, 1e-3)
    # below 1.0 half a gap is 2^-9
    assert [(t.name, t.efficiency) for t in found] == [("norm.weight", 0.0), ("small", pytest.approx(1.0, abs=0.01))]
    # from there on: of one to one and a half gaps only one is stored, which is less than 0.8 from 1.25 on
    assert found[0].least_lr == pytest.approx(1.5 * 2**-8, rel=0.06)
    said = text(found, 1e-3)
    assert "1 tensor of 2 would lose updates: norm.weight" in said and "as large as the rate" in said
    assert text(at_rate({"full": torch.ones(3)}, 1e-3), 1e-3).endswith("none is lost to their format.")


def test_a_state_of_another_model_is_not_used_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    net, optimizer = trained(1e-4)
    other: dict[str, Tensor] = {"w": torch.ones(7).bfloat16()}
    assert [t.basis for t in at_rate(other, 1e-4, optimizer.state_dict())] == ["update = rate"]
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no state of an optimizer"):
        of_files(tmp_path / "weights.pt", 1e-4, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="must be a learning rate above 0"):
        at_rate(other, 0.0)


def test_the_command_reads_the_state_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, optimizer = trained(1e-4)
    for name in ("a.pt", "b.pt"):
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / name)
    main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--at", "1e-6", "--json"])
    found = json.loads(capsys.readouterr().out)["at_rate"]
    assert {t["name"] for t in found} == set(net.state_dict()) and {t["basis"] for t in found} == {"optimizer state"}
    main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--at", "1e-6"])
    assert "would lose updates" in capsys.readouterr().out


def test_weights_in_a_file_with_any_name_have_no_state_beside_them(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).bfloat16()}, tmp_path / "model.bin")
    assert [t.basis for t in of_files(tmp_path / "model.bin", 1e-3)] == ["update = rate"]


def test_what_no_rate_reaches_stands_behind_what_one_does(tmp_path: Path) -> None:
    found = at_rate({"nan": torch.tensor([1.0, math.nan]).bfloat16(), "w": torch.ones(2).bfloat16()}, 1e-3)
    assert [t.name for t in found] == ["w", "nan"] and found[1].least_lr is None
    assert "1 tensor of 2 would lose updates: w." in text(found, 1e-3)


def test_what_its_state_does_not_move_and_what_is_not_dense_is_left_out() -> None:
    p, still = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = torch.optim.SGD([p, still], lr=1e-3, momentum=0.9)
    p.grad, still.grad = torch.ones_like(p), torch.zeros_like(p)
    optimizer.step()
    weights = {"p": p.detach(), "still": still.detach(), "sparse": torch.eye(2).bfloat16().to_sparse()}
    assert [(t.name, t.basis) for t in at_rate(weights, 1e-3, optimizer.state_dict())] == [("p", "optimizer state")]


def test_many_tensors_are_looked_at_together_and_each_as_if_it_were_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = [(6, 8), (48,), (8, 6), (3,), (2**14 + 5,), (1,)]
    weights = {f"w{i}": (torch.randn(shapes[i % 6]) * 4.0 ** (i % 5)).to(LOW[i % 2]) for i in range(30)}
    alone = [at_rate({name: w}, 1e-3)[0] for name, w in weights.items()]
    assert at_rate(weights, 1e-3) == tuple(sorted(alone, key=lambda t: t.efficiency))
    save_file(weights, tmp_path / "w.safetensors")
    assert sorted(of_files(tmp_path / "w.safetensors", 1e-3), key=repr) == sorted(alone, key=repr)
