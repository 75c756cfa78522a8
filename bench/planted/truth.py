"""What really happened in a scenario: all elements in FP64, beside the training; the rules are those of `bench/shared/exact_rules.py`.

Not assumed but measured: a planted fault is one only if the full comparison shows it, and a twin is healthy only if what was
meant arrives. Nothing here uses the watch. What cannot be compared in full says so by None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.planted.run import WINDOW, Run
from bench.shared.exact_rules import RULES, betas
from update_watch import formats
from update_watch.report import Cause

ARRIVES = 0.8  # from here on an update counts as arrived, as in `uw.Thresholds`
LOST = 0.1


@dataclasses.dataclass
class Sums:
    """Of one tensor, state, average or gradient over one window or more."""

    dot: float = 0.0  # <applied, intended> over single steps
    want: float = 0.0  # <intended, intended>
    size: float = 0.0  # <applied, applied>
    meant: Tensor | float = 0.0  # sum of intended
    moved: Tensor | float = 0.0  # sum of applied, with what is carried elsewhere
    gaps: float = 0.0  # largest |intended| in half gaps of the format
    before: float = 0.0  # <before, before>

    def add(self, applied: Tensor, intended: Tensor, moved: Tensor | None = None) -> None:
        self.dot += float((applied * intended).sum())
        self.want += float(intended.square().sum())
        self.size += float(applied.square().sum())
        self.meant = self.meant + intended
        self.moved = self.moved + (applied if moved is None else moved)

    def join(self, other: Sums) -> Sums:
        return Sums(
            self.dot + other.dot,
            self.want + other.want,
            self.size + other.size,
            self.meant + other.meant,
            self.moved + other.moved,
            max(self.gaps, other.gaps),
            self.before + other.before,
        )

    @property
    def efficiency(self) -> float | None:
        return self.dot / self.want if self.want > 0 else None

    @property
    def displacement(self) -> float | None:
        meant, moved = torch.as_tensor(self.meant), torch.as_tensor(self.moved)
        size = float(meant.square().sum())
        return float((meant * moved).sum()) / size if size > 0 else None

    @property
    def arrived(self) -> float | None:
        """The better of both: what is carried arrives later, what swings to and fro has no displacement."""
        known = [x for x in (self.efficiency, self.displacement) if x is not None]
        return max(known) if known else None


@dataclasses.dataclass
class Signals:
    """What reached a tensor in one window."""

    trainable: bool = True
    held: bool = False  # by the optimizer
    has_gradient: bool = False
    is_nonzero: bool = False  # the gradient, somewhere
    has_rate: bool = False
    finite: bool = True
    has_moved: bool = False


class Truth:
    """Follows a run step by step; one entry of `sums` and `signals` per window."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sums: list[dict[str, Sums]] = []
        self.signals: list[dict[str, Signals]] = []
        self._tensors = dict(run.named)
        self._held = {name: run.masters.get(name, p) for name, p in run.named}
        self._steps = dict.fromkeys(self._tensors, 0)

    @contextmanager
    def step(self, t: int) -> Iterator[None]:
        """Surrounds step number t of the run."""
        if t % WINDOW == 0:
            self.sums.append({})
            self.signals.append({name: Signals() for name in self._tensors})
        before, wholes = self._stored(), self._wholes()
        states = {name: _cloned(self.run.optimizer.state.get(p, {})) for name, p in self._held.items()}
        averages = {(label, n): p.detach().double() for label, n, p in self._averages()}
        given: dict[str, Tensor] = {}
        hooks = [self._sum_up(name, p, given) for name, p in self._tensors.items() if self.run.sums_gradients]
        yield
        for hook in hooks:
            hook.remove()
        after, wholes_after = self._stored(), self._wholes()
        groups = {id(p): group for group in self.run.optimizer.param_groups for p in group["params"]}
        for name, p in self._tensors.items():
            group = groups.get(id(self._held[name]))
            grad = None if p.grad is None else p.grad.detach().double()
            self._note(name, p, grad, group, not torch.equal(before[name], after[name]))
            if grad is None or group is None or not self.run.rule:
                continue
            self._at(name).before += float(before[name].square().sum())
            if self.run.skips(t):
                continue
            self._steps[name] += 1
            if name in given:
                self._at(f"{name}/grad").add(grad, given[name])
            intended = self._intended(name, before[name], grad, states[name], group)
            sums = self._at(name)
            sums.add(after[name] - before[name], intended, (wholes_after[name] - wholes[name]).double())
            sums.gaps = max(sums.gaps, _half_gaps(before[name], intended, p.dtype))
            self._states(name, states[name], _cloned(self.run.optimizer.state[self._held[name]]), grad, group)
            if decay := group.get("weight_decay", 0.0) * group["lr"]:
                kept = before[name].to(p.dtype).mul(1 - decay).double()
                self._at(f"{name}/weight_decay").add(kept - before[name], -decay * before[name])
        for label, name, average in self._averages():
            old = averages[label, name]
            if not torch.equal(old, after[name]):  # AveragedModel begins with a copy
                self._at(f"{name}/average:{label}").add(average.detach().double() - old, 1e-3 * (after[name] - old))

    # --- what it says ------------------------------------------------------------------------------

    def over(self, name: str, windows: Iterable[int]) -> Sums:
        """Of several windows, counted from 1."""
        total = Sums()
        for window in windows:
            total = total.join(self.sums[window - 1].get(name, Sums()))
        return total

    def onset(self, name: str) -> int:
        """The first window in which updates of `name` are lost, counted from 1; one past the last if never."""
        for window in range(1, len(self.sums) + 1):
            arrived = self.over(name, [window]).arrived
            if arrived is not None and arrived < ARRIVES:
                return window
        return len(self.sums) + 1

    def confirms(self, name: str, cause: Cause, window: int) -> bool | None:
        """Whether the fault is there in this window, counted from 1; None where this cannot tell."""
        sums, tensor = self.over(name, [window]), name.partition("/")[0]
        signals = self.signals[window - 1][tensor]
        if cause is Cause.weight_rounding and not self.run.rule:
            return None
        if cause in (Cause.weight_rounding, Cause.decay_rounding):
            return sums.arrived is not None and sums.arrived < ARRIVES
        if cause is Cause.not_written:
            return sums.want > 0 and sums.size == 0 and sums.gaps > 2
        if cause is Cause.not_replayable:
            return sums.want > 0 and abs(sums.size / sums.want - 1) > 1e-3
        if cause in (Cause.average_rounding, Cause.accumulation_rounding):
            return sums.displacement is not None and sums.displacement < ARRIVES
        if cause is Cause.state_rounding:
            if (stands := self.sums[window - 1].get(f"{name}/stands")) is not None:
                return stands.want > 0 and stands.size == 0
            parts = [self.over(f"{name}/{part}", [window]).efficiency for part in ("decay", "growth")]
            return any(part is not None and part < LOST for part in parts)
        return {
            Cause.requires_grad_off: not signals.trainable,
            Cause.not_in_optimizer: signals.trainable and not signals.held,
            Cause.no_gradient: signals.held and not signals.has_gradient,
            Cause.zero_gradient: signals.has_gradient and not signals.is_nonzero,
            Cause.zero_learning_rate: signals.is_nonzero and not signals.has_rate and not signals.has_moved,
            Cause.non_finite: not signals.finite,
            Cause.skipped_steps: signals.is_nonzero and signals.has_rate and not signals.has_moved,
        }.get(cause)

    def unhealthy(self) -> list[str]:
        """What is not as healthy as the scenario holds, in words."""
        found = []
        run, count = self.run, len(self.sums)
        for name in sorted({name for window in self.sums for name in window}):
            tensor, _, part = name.partition("/")
            is_compared = not part or part == "grad" or part.startswith("average:")
            if not is_compared or name in run.noisy or (name in run.planted and not run.ends):
                continue
            first = run.ends if name in run.planted else 1
            is_idle = any(self.confirms(tensor, cause, count) for cause in (Cause.zero_learning_rate, Cause.non_finite))
            arrived = self.over(name, range(first, count + 1)).arrived
            if arrived is not None and not arrived >= ARRIVES and not is_idle:
                found.append(f"{name}: of what was meant, only {arrived:.3f} arrived")
        return found

    # --- measuring ---------------------------------------------------------------------------------

    def _at(self, name: str) -> Sums:
        return self.sums[-1].setdefault(name, Sums())

    def _stored(self) -> dict[str, Tensor]:
        return {name: p.detach().double() for name, p in self._tensors.items()}

    def _wholes(self) -> dict[str, Tensor]:
        whole = self.run.whole
        with torch.no_grad():
            return {n: (whole(n, p) if whole else p).detach().double() for n, p in self._tensors.items()}

    def _averages(self) -> Iterator[tuple[str, str, Tensor]]:
        for label, given in self.run.averages.items():
            module: nn.Module = given[0] if isinstance(given, tuple) else given
            for name, p in module.named_parameters():
                yield label, name.removeprefix("module."), p

    def _sum_up(self, name: str, p: Tensor, given: dict[str, Tensor]) -> Any:
        def take(grad: Tensor) -> None:
            given[name] = given.get(name, torch.zeros(grad.shape, dtype=torch.float64)) + grad.double()

        return p.register_hook(take)  # type: ignore[no-untyped-call]  # torch's

    def _note(self, name: str, p: Tensor, grad: Tensor | None, group: dict[str, Any] | None, moved: bool) -> None:
        s = self.signals[-1][name]
        s.trainable, s.held = p.requires_grad, group is not None
        s.has_gradient |= grad is not None
        s.is_nonzero |= grad is not None and bool(grad.any())
        s.has_rate |= group is not None and bool(group["lr"])
        s.finite &= bool(p.isfinite().all())
        s.has_moved |= moved

    def _intended(self, name: str, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if self.run.rule == "adafactor":
            eps, least = group["eps"]  # the default depends on the format of the weights
            group = {**group, "eps": (torch.finfo(self._tensors[name].dtype).eps if eps is None else eps, least)}
        counted = {"step": self._steps[name] - 1, **state}  # some keep their count elsewhere
        return RULES[self.run.rule](w, g, counted, group)

    def _states(self, name: str, old: dict[str, Any], new: dict[str, Any], g: Tensor, group: dict[str, Any]) -> None:
        def judge(state: str, intended: Tensor, applied: Tensor) -> None:
            shrinks = intended * old[state].double() < 0
            for part, where in (("decay", shrinks), ("growth", ~shrinks)):
                self._at(f"{name}/{state}/{part}").add(applied * where, intended * where)

        for state in ("exp_avg_sq", "momentum_buffer"):
            if not isinstance(old.get(state), Tensor):
                continue
            x = old[state].double()
            if state == "exp_avg_sq":
                intended = (1 - betas(group)[1]) * (g * g - x)
            else:
                intended = (group["momentum"] - 1) * x + g
            judge(state, intended, new[state].double() - x)
        counter = old.get("step")
        if isinstance(counter, Tensor) and counter.dtype is not torch.float32:
            self._at(f"{name}/step/stands").add(new["step"].double() - counter.double(), torch.ones(()).double())


def _cloned(state: Any) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _half_gaps(before: Tensor, intended: Tensor, dtype: torch.dtype) -> float:
    fmt = formats.of(dtype)
    if fmt is None or not intended.any():
        return 0.0
    return float((intended.abs() / fmt.half_gap(before.float(), intended.float()).double()).nan_to_num(0).max())
