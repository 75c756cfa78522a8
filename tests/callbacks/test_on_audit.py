"""`on_audit`: what a callback does before the first step where something will stall, on fresh and on loaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import Strategy

from tests.support.lightning_fits import LOW, STALLS, Watched, fit
from tests.support.lightning_models import Module, trainer
from update_watch.audit.table import Audit, StallExpected


class Counting(Module):
    """Counts its steps; its norm begins at `scale`, so that a loaded one differs from a fresh one."""

    def __init__(self, scale: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_raise_ends_a_run_that_will_stall_before_its_first_step() -> None:
    module = Counting(lr=LOW)
    with pytest.raises(StallExpected, match=r"(?s)expected to stall.*nets\.0\.1\.weight"):
        fit(module, Watched(on_audit="raise"), **STALLS)
    assert module.steps == 0


@pytest.mark.parametrize("on_audit", ["raise", "warn"])
def test_its_healthy_twin_trains(on_audit: Any) -> None:
    module = Counting()
    fit(module, Watched(on_audit=on_audit))  # FP32, at a rate that its decay takes too
    assert module.steps == module.batches


def test_warn_trains_on_though_it_will_stall() -> None:
    module = Counting(lr=LOW)
    fit(module, Watched(), **STALLS)
    assert module.steps == module.batches


def test_a_function_is_given_the_audit_and_ends_the_run_by_raising() -> None:
    heard: list[Audit] = []
    fit(Counting(lr=LOW), Watched(on_audit=heard.append), **STALLS)
    (found,) = heard
    assert "nets.0.1.weight" in found.rows[0].names and found.health == "stalled"

    def refuse(audit: Audit) -> None:
        raise RuntimeError(f"{audit.rows[0].tensors} tensors, ask the owner")

    module = Counting(lr=LOW)
    with pytest.raises(StallExpected, match=r"\d tensors, ask the owner"):
        fit(module, Watched(on_audit=refuse), **STALLS)
    assert module.steps == 0


def test_weights_from_a_checkpoint_are_checked_again(tmp_path: Path) -> None:
    """Small weights can take the rate that the loaded ones, near 1, cannot: what counts is what is trained from here."""
    lr, fresh = 1e-4, 1e-3

    def weights_only(audit: Audit) -> None:
        audit.check(allow=("state *", "weight decay"))

    saved = trainer(**STALLS)
    saved.fit(Counting(1.0, lr=lr))
    path = tmp_path / "large.ckpt"
    saved.save_checkpoint(path)

    twin = Counting(fresh, lr=lr)
    fit(twin, Watched(on_audit=weights_only), max_epochs=2, **STALLS)
    assert twin.steps == 2 * twin.batches

    module = Counting(fresh, lr=lr)
    resumed = trainer(callbacks=[Watched(on_audit=weights_only)], max_epochs=2, **STALLS)
    with pytest.raises(StallExpected, match=r"weights \(bfloat16\): .*nets\.0\.0\.weight"):
        resumed.fit(module, ckpt_path=path)
    assert module.steps == 0


@pytest.mark.parametrize("on_audit", ["raise", "warn"])
def test_what_ends_rank_0_ends_every_rank(on_audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank asks the others, where the audit may end the run; else nothing is asked and nobody waits."""
    asked: list[bool] = []

    def reduce(strategy: Any, decision: bool, all: bool = True) -> bool:
        asked.append(decision)
        return True  # some other rank's is

    monkeypatch.setattr(Strategy, "reduce_boolean_decision", reduce)
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    module = Counting()
    if on_audit == "raise":
        with pytest.raises(StallExpected, match="rank 0's audit ends the run"):
            fit(module, Watched(on_audit=on_audit))
    else:
        fit(module, Watched(on_audit=on_audit), max_steps=1)
    assert (module.steps, asked) == ((0, [False]) if on_audit == "raise" else (1, []))
