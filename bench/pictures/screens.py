"""The report's screens, for every kind of run: journals of really measured windows, pages, pictures.

    python bench/pictures/screens.py FOLDER [--only NAME ...] [--pictures docs/screens]

Makes in FOLDER a journal and a page for each run of `RUNS` that is not there yet (about ten minutes on two cores), and
pictures of them. "moe" and "moe 5" are synthetic: they are for volume, their numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import update_watch as uw
from bench.shared.small_llama import SmallLlama, tokens
from tests.support.run_samples import Spec, synthetic_run
from update_watch.dashboards import Journal
from update_watch.dashboards.report import write_report
from update_watch.dashboards.report.picture import write_picture

PEAK, WINDOW = 3e-4, 16


def llama(
    journal: Path,
    windows: int = 80,
    peak: float = PEAK,
    floor: float = 0.02,
    layers: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    poison: int | None = None,
    done: float = 1.0,
    **facts: Any,
) -> None:
    """Train a small Llama under a cosine schedule and keep the journal.

    Args:
        floor: of the learning rate, as a share of `peak`.
        poison: step at which one weight becomes NaN.
        done: share of the schedule after which the run ends.
    """
    torch.manual_seed(0)
    model = SmallLlama(layers, dtype)
    rule = optimizer(model.parameters(), lr=peak)
    steps = windows * WINDOW

    def share(step: int) -> float:
        warm = max(1, steps // 20)
        if step < warm:
            return (step + 1) / warm
        return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(rule, share)
    run = {"name": journal.stem, "optimizer": type(rule).__name__, "lr_end": peak * floor, "peak": peak, **facts}
    coming = uw.Schedule(share, steps)
    sinks = [Journal(journal, run=run)]
    with uw.watch(model, rule, window=WINDOW, samples=32, budget=None, sinks=sinks, schedule=coming) as watch:
        for step in range(round(done * steps)):
            model.loss(tokens(step)).backward()
            if step == poison:
                model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
            rule.step()
            rule.zero_grad()
            schedule.step()
        watch.flush()


class Gambler(torch.optim.AdamW):
    """AdamW that draws whether to step: no two replays of it agree."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(torch.rand(()) * torch.rand_like(p.grad).mean())
        return super().step(closure)


def mixture(layers: int = 33, experts: int = 18) -> tuple[Spec, ...]:
    """The tensors of a mixture of experts, about 2,000 of them."""
    found = [Spec("model.embed_tokens.weight", (32000, 512), 0.02)]
    for i in range(layers):
        at = f"model.layers.{i}"
        found += [Spec(f"{at}.self_attn.{part}_proj.weight", (512, 512), 0.02) for part in "qkvo"]
        found += [Spec(f"{at}.{part}_layernorm.weight", (512,), 1.0) for part in ("input", "post_attention")]
        found.append(Spec(f"{at}.mlp.gate.weight", (experts, 512), 0.05))
        for e in range(experts):
            sizes = (("w1", 0.04), ("w2", 0.025), ("w3", 0.03))
            found += [Spec(f"{at}.mlp.experts.{e}.{part}.weight", (512, 1024), rms) for part, rms in sizes]
    return (*found, Spec("model.norm.weight", (512,), 1.0))


def moe(journal: Path, windows: int = 3000, **options: Any) -> None:
    sink = Journal(journal, run={"name": journal.stem, "optimizer": "AdamW"})
    for report in synthetic_run(mixture(), windows=windows, has_states=False, **options):
        sink(report)
    sink.close()


def demo(folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "update_watch", "demo", "--out", str(folder / "demo"), "--wandb", "disabled"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [folder / "demo" / "bf16.jsonl"]


# name -> how its journals are made
RUNS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "stalled": {"llama-bf16": lambda path: llama(path, done=0.6)},
    "healthy": {"llama-fp32": lambda path: llama(path, 10, layers=16, dtype=torch.float32)},
    "idle": {"llama-idle": lambda path: llama(path, 6, peak=0.0, layers=4)},
    "broken": {"llama-nan": lambda path: llama(path, 6, layers=8, poison=60)},
    "unknown": {"llama-unknown": lambda path: llama(path, 6, layers=4, optimizer=Gambler)},
    "moe": {"moe": moe},
    "five": {
        "bf16 lr 3e-4": lambda path: llama(path, 12, layers=4, precision="bf16"),
        "bf16 lr 1e-3": lambda path: llama(path, 12, 1e-3, layers=4, precision="bf16"),
        "bf16 lr 3e-5": lambda path: llama(path, 12, 3e-5, layers=4, precision="bf16"),
        "bf16 lr 3e-4 floor 0.3": lambda path: llama(path, 12, floor=0.3, layers=4, precision="bf16"),
        "fp32 lr 3e-4": lambda path: llama(path, 12, layers=4, dtype=torch.float32, precision="fp32"),
    },
}


def made(folder: Path, only: set[str]) -> Iterator[tuple[str, list[Path]]]:
    """(name, journals) of each run, made where they are not there yet."""
    if not only or "demo" in only:
        done = folder / "demo" / "bf16.jsonl"
        yield "demo", [done] if done.exists() else demo(folder)
    for name, journals in RUNS.items():
        if only and name not in only:
            continue
        paths = []
        for stem, make in journals.items():
            path = folder / f"{stem}.jsonl"
            if not path.exists():
                started = time.perf_counter()
                make(path)
                print(f"{path}: {time.perf_counter() - started:.0f} s", flush=True)
            paths.append(path)
        yield name, paths


# name of a page, and how its pictures for the docs are taken: (suffix, width, height)
PICTURES = {
    "stalled": (("", 1440, 900), ("-phone", 390, 1900)),
    "healthy": (("", 1440, 620),),
    "unknown": (("", 1440, 620),),
    "idle": (("", 1440, 620),),
    "broken": (("", 1440, 720),),
    "five": (("", 1440, 1500),),
    "moe": (("", 1440, 900),),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"of demo, {', '.join(RUNS)}")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="take the pictures of the docs, too")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, journals in made(given.folder, set(given.only)):
        page = given.folder / f"{name}.html"
        started = time.perf_counter()
        write_report(journals, page)
        if given.pictures is not None:
            for suffix, width, height in PICTURES.get(name, ()):
                write_picture(page, given.pictures / f"{name}{suffix}.png", width, 1.0, height)
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
