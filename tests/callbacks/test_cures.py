"""Every cure of the table, run as it is printed: what stalled before moves afterwards."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import update_watch as uw
from tests.support.trainers.runs import Net, net
from update_watch.cures import TITLES, TRAINERS, Cure, code, code_line, extra_bytes, markdown, options_of, switch

LR, STEPS = 1e-5, 24
OPTIMIZERS = (Cure.stochastic_rounding, Cure.kahan)


def batches() -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(8, 64, generator=rng)


def plain_steps(
    model: nn.Module,
    optimizer: Any,
    loss_of: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> float | None:
    """Efficiency of the norm, watched over some steps."""
    with uw.watch(model, optimizer, window=STEPS) as watch:
        for _, batch in zip(range(STEPS), batches(), strict=False):
            optimizer.zero_grad()
            backward(loss_of(batch))
            optimizer.step()
        report = watch.flush()
    assert report is not None
    return {t.name: t for t in report.tensors}["norm.weight"].efficiency


def run(text: str, **names: Any) -> dict[str, Any]:
    space = {"torch": torch, "lr": LR, **names}
    exec(text, space)  # noqa: S102  a table of our own
    return space


def test_without_a_cure_the_norm_stalls() -> None:
    model = net()
    assert plain_steps(model, torch.optim.AdamW(model.parameters(), lr=LR), model) == pytest.approx(0.0, abs=0.01)


SLOW_COMPILER = pytest.param(Cure.stochastic_rounding, marks=pytest.mark.slow)  # torchao compiles its step


@pytest.mark.parametrize("cure", [SLOW_COMPILER, Cure.kahan], ids=str)
def test_an_optimizer_that_keeps_the_remainder_moves_the_norm(cure: Cure) -> None:
    pytest.importorskip({Cure.stochastic_rounding: "torchao", Cure.kahan: "optimi"}[cure])
    model = net()
    before = model.norm.weight.detach().clone()  # type: ignore[union-attr, operator]
    optimizer = run(code(cure, "torch"), model=model)["optimizer"]
    for _, batch in zip(range(600), batches(), strict=False):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    assert (model.norm.weight != before).any()  # type: ignore[union-attr]


def test_masters_in_plain_torch() -> None:
    model = net()
    text = code(Cure.masters, "torch")
    run(text, model=model, device="cpu", batch=next(batches()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    assert plain_steps(
        model, optimizer, lambda batch: run(text, model=model, device="cpu", batch=batch)["loss"]
    ) == pytest.approx(1.0, abs=0.02)


def test_masters_in_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from update_watch.callbacks import UpdateWatch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    callback = UpdateWatch(window=STEPS)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    kind = functools.partial(
        *(lightning.Trainer,),
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback],
        default_root_dir=tmp_path,
        **quiet,
    )
    data = torch.stack([batch for _, batch in zip(range(STEPS), batches(), strict=False)]).view(-1, 64)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    run(code(Cure.masters, "lightning"), Trainer=kind)["trainer"].fit(Module(), loader)
    assert callback.last is not None
    assert {t.name: t for t in callback.last.tensors}["net.norm.weight"].efficiency == pytest.approx(1.0, abs=0.02)


def test_masters_in_fabric() -> None:
    fabric = pytest.importorskip("lightning.fabric")
    model = Net()
    found = run(code(Cure.masters, "fabric"), Fabric=functools.partial(fabric.Fabric, accelerator="cpu"))["fabric"]
    wrapped, optimizer = found.setup(model, torch.optim.AdamW(model.parameters(), lr=LR))
    assert plain_steps(model, optimizer, wrapped, found.backward) == pytest.approx(1.0, abs=0.02)


def test_masters_in_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    kind = functools.partial(accelerate.Accelerator, cpu=True)
    accelerator = run(code(Cure.masters, "accelerate"), model=model, Accelerator=kind)["accelerator"]
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR))
    assert plain_steps(model, optimizer, prepared) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("cure", [Cure.masters, Cure.fp32_states, SLOW_COMPILER, Cure.kahan], ids=str)
@pytest.mark.slow
def test_the_cures_in_hf_trainer(cure: Cure, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if cure in OPTIMIZERS:
        pytest.importorskip({Cure.stochastic_rounding: "torchao", Cure.kahan: "optimi"}[cure])
    from update_watch.callbacks.transformers import UpdateWatch

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "checkpoint")
    tokens = torch.randint(0, 64, (64, 17)).tolist()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callback = UpdateWatch(window=STEPS, print_audit=False)
    arguments = functools.partial(
        *(transformers.TrainingArguments,), use_cpu=True, max_steps=STEPS, learning_rate=LR, report_to="none",
        save_strategy="no", dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = functools.partial(transformers.Trainer, train_dataset=data, callbacks=[callback])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert model.dtype is torch.bfloat16
    names = {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "name": tmp_path / "checkpoint",
        "output_dir": tmp_path / "out",
        "TrainingArguments": arguments,
        "Trainer": trainer,
        "args": arguments(tmp_path / "out"),
        "model": model,
    }
    space = run(code(cure, "transformers"), **names)
    (space["trainer"] if cure in OPTIMIZERS else trainer(space["model"], space["args"])).train()
    report = callback.last
    assert report is not None
    stalled = [t.name for t in report.tensors if t.health is uw.Health.stalled]
    assert stalled == []
    if cure not in OPTIMIZERS:
        assert all(t.efficiency == pytest.approx(1.0, abs=0.02) for t in report.tensors if t.efficiency is not None)


class Matrix(nn.Module):
    """One BF16 matrix whose gradient has signs in turn: what is left over many steps is the decay. Computes in FP32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 64).bfloat16())

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (F.linear(x.float(), self.weight.float()) * labels.float()).sum()}


DECAY = {"lr": 1e-2, "weight_decay": 0.1}  # lr * decay = 0.001: below BF16's half gap at any weight


def turns(steps: int = STEPS) -> list[dict[str, Tensor]]:
    return [{"x": x[0], "labels": torch.tensor([(-1.0) ** i])} for i, x in zip(range(steps), batches(), strict=False)]


def decays(report: uw.Report | None) -> tuple[bool, uw.TensorReport]:
    """Whether the decay of the matrix is lost, and its report."""
    assert report is not None
    (tensor,) = report.tensors
    decay = tensor.accumulators.get("weight_decay")
    return decay is not None and decay.health is uw.Health.stalled, tensor


def shrunk(model: nn.Module) -> float:
    """The norm of the matrix against where it began; decay in FP32 would leave 0.976 of it."""
    return float(model.weight.detach().float().norm() / Matrix().weight.detach().float().norm())  # type: ignore[operator, union-attr]


def test_fused_decay_arrives_in_plain_torch() -> None:
    found = {}
    for name in ("without", "cured"):
        model, options = Matrix(), {"weight_decay": DECAY["weight_decay"]}
        kind = functools.partial(torch.optim.AdamW, **options)
        if name == "cured":
            space = {"optim": types.SimpleNamespace(AdamW=kind), "bfloat16": torch.bfloat16}
            text = code(Cure.fused_decay, "torch")
            optimizer = run(text, model=model, lr=DECAY["lr"], torch=types.SimpleNamespace(**space))["optimizer"]
        else:
            optimizer = kind(model.parameters(), lr=DECAY["lr"], foreach=False)
        with uw.watch(model, optimizer, window=STEPS, budget=None) as watch:
            for batch in turns():
                optimizer.zero_grad()
                model(**batch)["loss"].backward()
                optimizer.step()
            found[name] = (decays(watch.flush())[0], shrunk(model))
    assert found["without"][0] and found["without"][1] > 1.0
    assert not found["cured"][0] and found["cured"][1] < 0.99


def test_fused_decay_arrives_in_hf_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from update_watch.callbacks.transformers import UpdateWatch

    kind = functools.partial(
        *(transformers.TrainingArguments,), use_cpu=True, max_steps=STEPS, report_to="none", save_strategy="no",
        learning_rate=DECAY["lr"], weight_decay=DECAY["weight_decay"], lr_scheduler_type="constant",
        per_device_train_batch_size=1, dataloader_pin_memory=False,
    )  # fmt: skip
    cured = run(code(Cure.fused_decay, "transformers"), output_dir=tmp_path, TrainingArguments=kind)["args"]
    found = {}
    for name, args in {"without": kind(tmp_path, optim="adamw_torch"), "cured": cured}.items():
        model, callback = Matrix(), UpdateWatch(window=STEPS, print_audit=False, budget=None, journal=None)
        transformers.Trainer(model, args, train_dataset=turns(), callbacks=[callback]).train()
        found[name] = (decays(callback.last)[0], shrunk(model))
    assert found["without"][0] and found["without"][1] > found["cured"][1] + 0.01
    assert not found["cured"][0] and found["cured"][1] < 0.995


def test_an_average_in_fp32_follows() -> None:
    model = net()
    names = {"copy": copy, "AveragedModel": AveragedModel}
    ema = run(code(Cure.fp32_average, "torch"), model=model, **names)["ema"]
    ema.update_parameters(model)  # the first only copies
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    before = ema.module.norm.weight.detach().clone()
    ema.update_parameters(model)
    assert (ema.module.norm.weight != before).all()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_has_an_answer_for_the_first_cure(trainer: str) -> None:
    text = code(Cure.masters, trainer)
    assert text
    assert len(text.splitlines()) <= 3
    assert switch(trainer, "bfloat16")
    assert switch(trainer, "float16") != "" and "bf16" not in switch(trainer, "float16")


def test_a_trainer_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'keras'.*lightning"):
        code(Cure.masters, "keras")


def held_bytes(dtype: torch.dtype, make: Callable[[Any], torch.optim.Optimizer]) -> int:
    """Weight, gradient and states of 1,000 parameters that have taken a step."""
    w = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    w.grad = torch.ones_like(w)
    optimizer = make([w])
    optimizer.step()
    states = [s for s in optimizer.state[w].values() if torch.is_tensor(s) and s.numel() == w.numel()]
    return sum(t.numel() * t.element_size() for t in (w.detach(), w.grad, *states))


@pytest.mark.parametrize(("make", "states"), [(torch.optim.AdamW, 2), (torch.optim.SGD, 0), (torch.optim.RMSprop, 1)])
def test_costs_are_the_bytes_that_are_then_held(make: Any, states: int) -> None:
    more = held_bytes(torch.float32, make) - held_bytes(torch.bfloat16, make)
    assert extra_bytes(Cure.masters, 1000, states) == more


def test_kahan_costs_one_more_buffer() -> None:
    optimi = pytest.importorskip("optimi")
    plain, kahan = (
        held_bytes(torch.bfloat16, lambda p, k=k: optimi.AdamW(p, lr=1e-3, kahan_sum=k)) for k in (False, True)
    )
    assert extra_bytes(Cure.kahan, 1000, states=2) == kahan - plain
    assert set(TITLES) == set(Cure)


def test_the_page_of_cures_is_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs" / "fix.md").read_text() == markdown()


def test_what_an_optimizer_can_be_told_is_read_from_it() -> None:
    w = [torch.nn.Parameter(torch.zeros(2, 2))]
    assert options_of(torch.optim.AdamW(w).param_groups[0]) == ("fused", "foreach", "betas")
    assert options_of(torch.optim.AdamW(w, fused=True).param_groups[0]) == ("fused=True", "foreach", "betas")
    assert options_of(torch.optim.Adafactor(w).param_groups[0]) == ("foreach",)
    optimi = pytest.importorskip("optimi")
    found = options_of(optimi.AdamW(w, lr=1e-3, kahan_sum=True).param_groups[0])
    assert "fused" not in found and {"kahan_sum=True", "beta1", "beta2"} <= set(found)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_cure_has_a_line_that_needs_no_import_before_it(trainer: str) -> None:
    for cure in Cure:
        line = code_line(cure, trainer)
        assert bool(line) == bool(code(cure, trainer))
        assert "\n" not in line and " import " not in line and "#" not in line
    assert code_line(Cure.kahan, "torch") == "optimizer = optimi.AdamW(model.parameters(), lr=lr, kahan_sum=True)"
    assert code_line(Cure.kahan, "torchtune") == "optimizer: {_component_: optimi.AdamW, kahan_sum: True}"
