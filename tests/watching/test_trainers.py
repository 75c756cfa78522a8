"""Which trainer is at work is told by who calls and by wrappers around optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import update_watch as uw
from update_watch.cures import TRAINERS
from update_watch.watching.trainers import trainer_at_work


def called_from(*modules: str) -> str:
    """What is said where these modules call one another, the first the outermost."""
    call: Any = lambda: trainer_at_work([])  # noqa: E731
    for module in reversed(modules):
        space: dict[str, Any] = {"__name__": module, "call": call}
        exec("def outer(call=call):\n    return call()", space)
        call = space["outer"]
    return str(call())


@pytest.mark.parametrize(
    ("modules", "trainer"),
    [
        ((), "torch"),
        (("accelerated_training", "trlx.run"), "torch"),  # names that only begin alike
        (("torchtune.config._parse", "__main__"), "torchtune"),
        (("torchtitan.train",), "torchtitan"),
        (("trl.trainer.sft_trainer", "transformers.trainer", "accelerate.optimizer"), "trl"),
        (("transformers.trainer", "accelerate.optimizer"), "transformers"),
        (("lightning.pytorch.trainer.trainer", "lightning.fabric.wrappers"), "lightning"),
    ],
)
def test_the_outermost_trainer_is_told(modules: tuple[str, ...], trainer: str) -> None:
    assert called_from(*modules) == trainer and trainer in TRAINERS


def test_advice_and_journal_take_the_words_of_the_wrapper_around_an_optimizer(tmp_path: Any) -> None:
    model = torch.nn.Linear(4, 4).bfloat16()
    wrapper = type("AcceleratedOptimizer", (torch.optim.AdamW,), {"__module__": "accelerate.optimizer"})
    optimizer = wrapper(model.parameters(), lr=1e-6)
    journal = tmp_path / "run.jsonl"
    with uw.watch(model, optimizer, journal=journal, budget=None) as watch:
        for _ in range(8):
            model(torch.randn(2, 4).bfloat16()).sum().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None and "Accelerator(mixed_precision='bf16')" in report.headline
    assert '"trainer":"accelerate"' in journal.read_text().partition("\n")[0].replace(" ", "")
