"""A closed watch that somebody still holds, as a notebook's variable does: it knows what it found, and holds nobody's memory."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import update_watch as uw


def closed_watch(kind: str) -> tuple[uw.Watch, dict[str, weakref.ref[Any]]]:
    """A watch of ten steps, closed, and all that it looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)).bfloat16()
    masters = [param.detach().float() for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters if kind == "masters" else model.parameters(), lr=1e-3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    options: dict[str, Any] = {
        "average": {"averages": {"ema": average}},
        "schedule": {"schedule": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 100)},
        "trainer's step": {"step": lambda: len(optimizer.state)},
        "replicas": {"check_replicas": True},
    }.get(kind, {})
    watched = list(model.named_parameters()) if kind == "pairs" else model
    is_found = kind in ("found", "masters")
    watch = uw.watch(watched, None if is_found else optimizer, window=4, budget=None, **options)
    for _ in range(10):
        model.zero_grad()
        model(torch.randint(0, 50, (4,))).float().pow(2).mean().backward()
        if kind == "masters":
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad = param.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        if kind == "masters":
            with torch.no_grad():
                for master, param in zip(masters, model.parameters(), strict=True):
                    param.copy_(master)
        average.update_parameters(model)
    watch.close()
    held: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": average}
    held |= {name: param for name, param in model.named_parameters()}
    held |= {f"average of {name}": param for name, param in average.named_parameters()}
    held |= {f"master {i}": master for i, master in enumerate(masters)}
    return watch, {name: weakref.ref(one) for name, one in held.items()}


KINDS = ("given", "found", "masters", "average", "schedule", "trainer's step", "replicas", "pairs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_watch_that_is_held_holds_nothing_of_what_it_watched(kind: str) -> None:
    watch, refs = closed_watch(kind)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # its threads end a moment later
        gc.collect()
        left = [name for name, ref in refs.items() if ref() is not None]
        if not left:
            break
        time.sleep(0.05)
    assert left == []
    assert watch.last is not None and len(watch.last.tensors) == 7
    assert watch.flush() is watch.last
    watch.close()


def test_a_closed_watch_knows_its_step() -> None:
    watch, _ = closed_watch("given")
    assert watch.step == watch.state_dict()["step"] == 10 and "step 10:" in repr(watch)
    of_trainer, refs = closed_watch("trainer's step")
    gc.collect()
    assert refs["optimizer"]() is None and of_trainer.step == 7  # as many tensors as had states


def test_steps_go_on_where_an_optimizer_is_attached_again() -> None:
    weight = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    reports: list[uw.Report] = []
    with uw.watch([("w", weight)], optimizer, window=2, budget=None, sinks=[reports.append]) as watch:
        for step in range(8):
            if step == 4:
                watch.detach()
                assert watch.step == 4
                watch.attach(optimizer)
            weight.grad = torch.ones(8)
            optimizer.step()
    assert [report.step for report in reports] == [2, 4, 6, 8]
