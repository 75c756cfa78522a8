"""Gradients summed over micro-batches: does `p.grad += g` in a low-precision format take every contribution?

First the number of backward passes per optimizer step is counted, by a hook on one parameter that stays for one step. Where
it is one, nothing else happens until it is counted again, `_RECOUNT` steps later. Where it is more, every `_EVERY` steps one
step is looked at: hooks on a few parameters sample each contribution, and what the gradient was before and after it. They
are gone when the optimizer steps, and compare before anybody averages, clips or unscales the sum.

Gradients kept in FP32, sparse and sharded ones (whose sums are not formed by autograd on the parameter) are left alone.

Legend: M contributions to one parameter, K samples, F sums.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update_watch import formats
from update_watch.evidence import AccumulatorEvidence, Numbers
from update_watch.measure.device import streams
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import Sampler, unsamplable
from update_watch.measure.transfer import Batch, Part

logger = logging.getLogger("update_watch")

_ROWS = 8
_SAMPLES = 64
_EVERY = 32  # steps from one that is looked at to the next
_RECOUNT = 256  # steps until backward passes are counted again where there is one per step
_CHUNK = 64  # contributions held before they are added up
_CANCELLED = 0.5  # |sum|^2 by the sum of |contribution|^2, which is 1 for noise
_SUMS = 6  # dot, want, wanted, lost; dot and want of whole sums


class AccumulationWindow(NamedTuple):
    """One window's sums on their way to the host."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    sampled: tuple[int, ...]  # elements looked at, over all contributions
    sums: tuple[Part, ...]


class Accumulation:
    """The sums of gradients of one optimizer's parameters. `before` and `after` surround every optimizer step."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._wait = 0  # steps until something is done
        self._has_several = False  # backward passes per step, when last counted
        self._count = 0
        self._handles: list[Any] = []
        self._looks: list[_Look] = []
        self._eligible: list[Row] = []
        self._totals: dict[str, _Total] = {}  # of the window, by parameter
        self._is_over = False

    def before(self, rows: list[Row]) -> None:
        """Call when gradients are final and the rule has not run."""
        if self._is_over:
            self.remove()
            return
        self._wait -= 1
        if self._handles:
            self.remove()
            self._has_several = self._count > 1
            # once counted, look at the next step; else let some pass
            self._wait = _RECOUNT if not self._has_several else _EVERY - 1 if self._looks else 0
            if self._has_several:
                self._add_up()
            self._looks = []
        if self._wait <= 0:
            self._eligible = [row for row in rows if _is_eligible(row)]
            if not self._eligible:
                self._wait = _RECOUNT

    def after(self) -> None:
        """Call just after the rule has run: what is added to gradients from here on belongs to the next step."""
        if self._is_over or self._wait > 0 or not self._eligible:
            return
        self._count = 0
        if self._has_several:
            n = len(self._eligible)
            chosen = [self._eligible[k * n // min(n, _ROWS)] for k in range(min(n, _ROWS))]
            self._looks = [_Look(row, self._rng) for row in chosen]
            for look in self._looks:
                hook = look.row.param.register_hook(self._guarded(look.take))  # type: ignore[no-untyped-call]  # torch's
                self._handles.append(hook)
                self._hook(look.row.param, look.keep)
        self._hook((self._looks[0].row if self._looks else self._eligible[0]).param, self._note)
        self._eligible = []

    def pause(self) -> None:
        """An optimizer step has passed unseen: what was begun is given up."""
        if self._handles:
            self.remove()
            self._looks, self._wait = [], 0

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def close_window(self, batch: Batch) -> AccumulationWindow | None:
        """Hand the sums to `batch` and start new ones; None where nothing was looked at."""
        totals, self._totals = self._totals, {}
        if not totals:
            return None
        return AccumulationWindow(
            tuple(totals),
            tuple(total.dtype for total in totals.values()),
            tuple(total.sampled for total in totals.values()),
            tuple(batch.add(total.sums_F) for total in totals.values()),
        )

    # --- hooks: they run inside the user's backward pass --------------------------------------------

    def _hook(self, param: Tensor, function: Callable[[Tensor], None]) -> None:
        hook = param.register_post_accumulate_grad_hook(self._guarded(function))  # type: ignore[no-untyped-call]  # torch's
        self._handles.append(hook)

    def _guarded(self, function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            if self._is_over or streams.is_capturing():
                return
            try:
                with torch.no_grad():
                    function(tensor)
            except Exception as error:  # noqa: BLE001  whatever it is, it must not reach training
                logger.debug("update-watch: sums of gradients are not looked at any more: %r", error)
                self._is_over = True  # the hooks are taken off at the next step

        return hook

    def _note(self, param: Tensor) -> None:
        self._count += 1

    def _add_up(self) -> None:
        for look in self._looks:
            look.fold()
            if look.count > 1:
                name = look.row.names[0]
                total = self._totals.get(name)
                if total is None:
                    dtype = str(look.dtype).removeprefix("torch.")
                    total = self._totals[name] = _Total(dtype, look.sums_F.new_zeros(_SUMS))
                total.add(look)


def read(window: AccumulationWindow) -> dict[str, AccumulatorEvidence]:
    """Evidence by tensor name. Runs on the background thread."""
    found = {}
    for name, dtype, sampled, part in zip(*window, strict=True):
        dot, want, wanted, lost, whole_dot, whole_want = (float(x) for x in part.wait())
        if not want > 0:
            continue
        numbers = Numbers(
            efficiency=dot / want,
            # of contributions that cancel, rounding alone is left
            displacement_efficiency=whole_dot / whole_want if whole_want > _CANCELLED * want else None,
            wanted_fraction=wanted / sampled,
            lost_fraction=lost / wanted if wanted else None,
        )
        found[name] = AccumulatorEvidence("grad", dtype, numbers)
    return found


def _is_eligible(row: Row) -> bool:
    param, grad = row.param, row.param.grad
    return (
        grad is not None
        and grad.dtype in formats.HALVES
        and param.requires_grad
        and param.is_leaf
        and row.sampler is not None
        and row.piece is None  # gradients of flat partitions are assigned, not accumulated
        and not unsamplable(param)
        and not unsamplable(grad)
    )


class _Total:
    """What a window's looks at one parameter have found."""

    def __init__(self, dtype: str, sums_F: Tensor) -> None:
        self.dtype, self.sums_F = dtype, sums_F
        self.sampled = 0

    def add(self, look: _Look) -> None:
        # a contribution that overflowed says nothing of rounding
        self.sums_F.add_(torch.where(look.sums_F.isfinite().all(), look.sums_F, 0.0))
        self.sampled += look.count * look.size


class _Look:
    """The contributions to one parameter's gradient between two optimizer steps."""

    def __init__(self, row: Row, rng: random.Random) -> None:
        self.row = row
        self.count = 0
        self._sampler = Sampler(row.param, _SAMPLES)
        self._sampler.redraw(rng)
        self.size = self._sampler.size
        assert row.param.grad is not None
        self.dtype = row.param.grad.dtype
        self._given: Tensor | None = None
        self._unit: Tensor | None = None
        self._held: list[Tensor] = []
        device = row.param.device
        self.sums_F = torch.zeros(_SUMS, device=device)
        self._whole_2K = torch.zeros(2, self.size, device=device)  # sums of what arrived, of contributions

    def take(self, contribution: Tensor) -> None:
        """Just before autograd adds `contribution` to the gradient."""
        given, grad = self._sampler.view(contribution), self.row.param.grad
        before = torch.zeros_like(given) if grad is None else self._sampler.view(grad)
        self._given = torch.stack([given, before]).view(2, -1)

    def keep(self, param: Tensor) -> None:
        """Just after."""
        assert param.grad is not None
        if self._given is not None:
            after_1K = self._sampler.view(param.grad).reshape(1, -1)
            self._held.append(torch.cat([self._given, after_1K]))
            self._given = None
            self.count += 1
            if len(self._held) >= _CHUNK:
                self._fold()

    def fold(self) -> None:
        """Add up all that is held, and the sums that have been formed."""
        self._fold()
        self.sums_F[4:].add_((self._whole_2K * self._whole_2K[1]).sum(-1))

    def _fold(self) -> None:
        if not self._held:
            return
        held_M3K = torch.stack(self._held).to(torch.float32)
        self._held = []
        given_MK, before_MK, after_MK = held_M3K.unbind(1)
        if self._unit is None:  # squares of gradients near 1e-20 would underflow
            peak = given_MK.abs().amax()
            self._unit = torch.where(peak > 0, peak.reciprocal(), 1.0)
        given_MK = given_MK * self._unit
        # what this contribution has moved it by, whatever anybody else does to the gradient in between
        applied_MK = (after_MK - before_MK) * self._unit
        self._whole_2K.add_(torch.stack([applied_MK.sum(0), given_MK.sum(0)]))
        wanted_MK = given_MK.ne(0)
        self.sums_F[:4].add_(
            torch.stack(
                [
                    (applied_MK * given_MK).sum(),
                    given_MK.square().sum(),
                    wanted_MK.sum(),
                    (wanted_MK & applied_MK.eq(0)).sum(),
                ]
            )
        )
