"""Training must not notice: same bits, no waiting, any stream, any device."""

from __future__ import annotations

import contextlib
import gc
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.on_gpu.given import error_of, given, is_cuda, quiet_watch
from bench.on_gpu.models import MAKE, backward, net, recurrent


@contextlib.contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    """A training to be run with and without the watch."""

    name: str  # in MAKE
    dtype: torch.dtype
    is_scaled: bool = False  # FP16 autocast under a GradScaler, some of whose steps overflow
    is_recurrent: bool = False

    @property
    def label(self) -> str:
        extra = " scaler" * self.is_scaled + " lstm with dropout" * self.is_recurrent
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{extra}"


def _train(case: Case, watched: bool, steps: int) -> tuple[list[Tensor], str, bool]:
    uw = quiet_watch()
    random.seed(1)
    model = (recurrent if case.is_recurrent else net)(case.dtype)
    optimizer = MAKE[case.name](model.parameters())
    scaler = (
        torch.amp.GradScaler(given.device.partition(":")[0], init_scale=2.0**40, growth_interval=3)
        if case.is_scaled
        else None
    )
    watch = uw.watch(model, optimizer, window=8, budget=None) if watched else None
    for i in range(steps):
        if scaler is None:
            backward(model)
            optimizer.step()
        else:
            model.zero_grad(set_to_none=True)
            x = torch.randn(32, 128, device=given.device)
            with torch.autocast(given.device.partition(":")[0], torch.float16):
                loss = (model(x) - x).float().pow(2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if i == steps // 2:
            gc.collect()
    error, reported = "", True
    if watch is not None:
        watch.close(10.0)
        error = "" if watch._tap.error is None else repr(watch._tap.error)[:300]
        reported = watch.last is not None
    states = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    ends = [t.detach().float().cpu() for t in (*model.parameters(), *states, *grads)]
    ends += [torch.get_rng_state().float(), torch.tensor([random.random()])]
    if is_cuda():
        ends.append(torch.cuda.get_rng_state().float())
    return ends, error, reported


def identity() -> dict[str, Any]:
    """Weights, states, gradients and random states after training with and without the watch."""
    steps = 16 if given.quick else 40
    found: dict[str, Any] = {}
    cases = [Case(name, dtype) for name in MAKE for dtype in (torch.bfloat16, torch.float32)]
    cases += (
        [Case("fused", torch.float32, is_scaled=True), Case("foreach", torch.float32, is_scaled=True)]
        if is_cuda()
        else []
    )
    cases += [Case(name, torch.float32, is_recurrent=True) for name in ("fused", "own rule")]
    with deterministic():
        for case in cases:
            try:
                plain, _, _ = _train(case, False, steps)
                again, _, _ = _train(case, False, steps)
                seen, error, reported = _train(case, True, steps)
                same = all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
                equal = sum(
                    torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all().item()
                    for a, b in zip(plain, seen, strict=True)
                )
                found[case.label] = {
                    "identical": equal == len(plain),
                    "tensors": len(plain),
                    "differ": len(plain) - equal,
                    "repeatable_without": same,
                    "error": error,
                    "reported": reported,
                }
            except Exception as error:
                found[case.label] = {"identical": False, "error": f"section: {error!r}"[:300]}
    return found


def syncs() -> dict[str, Any]:
    """Steps of two windows and their ends under torch's alarm for synchronising calls."""
    uw = quiet_watch()
    found = {}
    for name, make in MAKE.items():
        for scaled in (False, True) if name == "fused" and is_cuda() else (False,):
            label = name + (" found_inf" if scaled else "")
            model = net(torch.bfloat16)
            optimizer = make(model.parameters())
            raised = ""
            with uw.watch(model, optimizer, window=16, budget=None) as watch:
                for i in range(40):
                    backward(model)
                    if scaled:  # as a GradScaler leaves them in a fused step
                        optimizer.grad_scale = torch.ones((), device=given.device)
                        optimizer.found_inf = torch.zeros((), device=given.device)
                    if i >= 5 and is_cuda():
                        torch.cuda.set_sync_debug_mode("error")
                    try:
                        optimizer.step()
                    except Exception as error:  # the optimizer's own
                        raised = repr(error)[:200]
                    finally:
                        if is_cuda():
                            torch.cuda.set_sync_debug_mode("default")
                    if raised:
                        break
                error = error_of(watch)
                report = watch.flush(10.0)
                known = 0 if report is None else sum(t.efficiency is not None for t in report.tensors)
            reasons = (
                [] if report is None else sorted({str(t.advice)[:160] for t in report.tensors if t.efficiency is None})
            )
            found[label] = {
                "watch_error": error,
                "step_error": raised,
                "known": known,
                "of": len(list(model.parameters())),
                "reasons": reasons[:3],
            }
    return found


def streams() -> dict[str, Any]:
    """The same training on a side stream must give the same report."""
    if not is_cuda():
        return {"skipped": "CUDA only"}
    uw = quiet_watch()

    def run(stream: Any) -> tuple[dict[str, Any], str]:
        with torch.cuda.stream(stream):
            model = net(torch.bfloat16)
            optimizer = MAKE["fused"](model.parameters())
            with uw.watch(model, optimizer, window=10_000, budget=None) as watch:
                for _ in range(48):
                    backward(model)
                    optimizer.step()
                error = error_of(watch)
                report = watch.flush(10.0)
        torch.cuda.synchronize()
        return {t.name: t.efficiency for t in report.tensors}, error

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with deterministic():
        (a, error_a), (b, error_b) = run(torch.cuda.current_stream()), run(side)
    return {
        "same_report": a == b,
        "largest": max(abs((a[n] or 0) - (b[n] or 0)) for n in a),
        "error": error_a or error_b,
    }


def other_device() -> dict[str, Any]:
    """Parameters on another GPU than the current one: is the vector read after its copy has arrived?"""
    if not is_cuda() or torch.cuda.device_count() < 2:
        return {"skipped": "needs two GPUs"}
    from update_watch.measure.transfer import Transfer

    wrong = 0
    torch.cuda.set_device(0)
    for i in range(8):
        values = torch.full((5000,), float(i + 1), device="cuda:1")
        with torch.cuda.device(1):
            torch.cuda._sleep(int(0.05 * 1.7e9))
        wrong += int(not (Transfer(values).wait() == i + 1).all())
    return {"wrong_reads": wrong, "of": 8}
