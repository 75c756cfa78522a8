"""A small watched training in a process of its own, for the tests of faults: `python fault_training.py FOLDER HOW STEPS`.

Writes FOLDER/journal.jsonl, and FOLDER/steps: the number of the last step that is done. Weights go to FOLDER/weights.pt
where the training comes to its end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import update_watch as uw
from update_watch.dashboards.journal.journal import Journal
from update_watch.replay.side_effects import HOOKS
from update_watch.report import Report

WINDOW = 8


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.RMSNorm(32), nn.Linear(32, 16)).to(torch.bfloat16)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(4, 16, generator=rng).to(torch.bfloat16)
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()


class Progress:
    """Tells the test how far training is."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "steps"

    def __call__(self, step: int) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(str(step))
        temporary.replace(self._path)


def train(
    folder: Path, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, pause_from: int = 10**9
) -> None:
    tell = Progress(folder)
    for n in range(1, steps + 1):
        one_step(model, optimizer, n)
        tell(n)
        if n >= pause_from:
            time.sleep(0.02)


def run_bare(folder: Path, steps: int, sinks: list[Any]) -> None:
    """No `with`, no `close`."""
    model, optimizer = model_and_optimizer()
    uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None)
    train(folder, steps, model, optimizer, pause_from=12)
    torch.save(model.state_dict(), folder / "weights.pt")


def run_context(folder: Path, steps: int, sinks: list[Any]) -> None:
    model, optimizer = model_and_optimizer()
    with uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None):
        train(folder, steps, model, optimizer, pause_from=12)
    torch.save(model.state_dict(), folder / "weights.pt")


def run_raising(folder: Path, steps: int, sinks: list[Any]) -> None:
    model, optimizer = model_and_optimizer()
    with uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None):
        train(folder, steps, model, optimizer)
        raise RuntimeError("CUDA out of memory")


def run_bare_raising(folder: Path, steps: int, sinks: list[Any]) -> None:
    model, optimizer = model_and_optimizer()
    uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None)
    train(folder, steps, model, optimizer)
    raise RuntimeError("CUDA out of memory")


def run_hanging_sink(folder: Path, steps: int, sinks: list[Any]) -> None:
    """A sink that never returns, behind one that works."""

    def hang(report: Report) -> None:
        time.sleep(3600)

    run_bare(folder, steps, [*sinks, hang])


def run_signal_in_hook(folder: Path, steps: int, sinks: list[Any]) -> None:
    """SIGTERM comes while the watch is in the middle of measuring step 12."""
    from update_watch.measure.watched_optimizer import Watched

    after = Watched.after

    def interrupted(self: Any, measured: Any) -> bool:
        if self.window_steps == 3 and self.steps == 11:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return after(self, measured)

    Watched.after = interrupted  # type: ignore[method-assign]
    run_bare(folder, steps, sinks)


def run_forking(folder: Path, steps: int, sinks: list[Any]) -> None:
    """Forks in mid-window; the child trains too, and ends like a program of its own."""
    model, optimizer = model_and_optimizer()
    uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None)
    train(folder, 12, model, optimizer)
    child = os.fork()
    for n in range(13, steps + 1):
        one_step(model, optimizer, n)
    if child == 0:
        torch.save(model.state_dict(), folder / "child.pt")
        sys.exit(0)
    status = os.waitpid(child, 0)[1]
    (folder / "child").write_text(str(status))
    torch.save(model.state_dict(), folder / "weights.pt")


def run_worker(folder: Path, steps: int, sinks: list[Any]) -> None:
    """A process of `multiprocessing`, forked: it ends by `os._exit`."""
    worker = multiprocessing.get_context("fork").Process(target=run_bare, args=(folder, steps, sinks))
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)


def run_watching_anew(folder: Path, steps: int, sinks: list[Any]) -> None:
    """Forks in mid-window; the child watches what it trains."""
    model, optimizer = model_and_optimizer()
    uw.watch(model, optimizer, window=WINDOW, budget=None)
    train(folder, 12, model, optimizer)
    child = os.fork()
    if child == 0:
        with uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None):
            train(folder, steps, model, optimizer)
        sys.exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run_forking_beside_a_thread(folder: Path, steps: int, sinks: list[Any]) -> None:
    """Forks while another thread is in the middle of our code; the child goes on, and watches anew."""
    model, optimizer = model_and_optimizer()
    watch = uw.watch(model, optimizer, window=WINDOW, budget=None)
    train(folder, 12, model, optimizer)
    begun = threading.Event()

    def hold() -> None:
        with watch._tap.lock, HOOKS:
            begun.set()
            time.sleep(3600)

    threading.Thread(target=hold, daemon=True).start()
    begun.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it if it waits for ever
        one_step(model, optimizer, 13)
        with uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None):
            train(folder, steps, model, optimizer)
        sys.exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Numbers(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, n: int) -> Tensor:
        return torch.randn(16, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16)


def run_loader(folder: Path, steps: int, sinks: list[Any], context: str) -> None:
    """Two data-loader workers, begun anew in mid-window in every epoch."""
    model, optimizer = model_and_optimizer()
    with uw.watch(model, optimizer, window=WINDOW, sinks=sinks, budget=None):
        done = 0
        while done < steps:
            loader = torch.utils.data.DataLoader(
                Numbers(), batch_size=8, num_workers=2, multiprocessing_context=context
            )
            for x in loader:
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()
                done += 1
    Progress(folder)(done)


def run_loader_fork(folder: Path, steps: int, sinks: list[Any]) -> None:
    run_loader(folder, steps, sinks, "fork")


def run_loader_spawn(folder: Path, steps: int, sinks: list[Any]) -> None:
    run_loader(folder, steps, sinks, "spawn")


def run_lightning(folder: Path, steps: int, sinks: list[Any]) -> None:
    """`Trainer(callbacks=[UpdateWatch()])`; raises where steps is odd."""
    import lightning

    from update_watch.callbacks import UpdateWatch

    tell = Progress(folder)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, _ = model_and_optimizer()

        def training_step(self, x: Tensor) -> Tensor:
            if self.global_step >= steps:
                raise RuntimeError("CUDA out of memory")
            tell(self.global_step)
            if self.global_step >= 12:  # now: a signal comes when it is told, and here nothing is being measured
                time.sleep(0.02)
            loss: Tensor = (self.net(x) - x).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(Numbers(), batch_size=8)
    trainer = lightning.Trainer(
        callbacks=[UpdateWatch(window=WINDOW, sinks=sinks, print_audit=False)],
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), loader)


def main() -> None:
    torch.set_num_threads(1)
    folder, how, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    globals()[f"run_{how}"](folder, steps, [Journal(folder / "journal.jsonl")])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    main()
