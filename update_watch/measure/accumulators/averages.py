"""Averaged models (EMA, Polyak, SWA) as accumulators: does the average follow the weights?

An average moves by `rate * (weight - average)`, whenever its owner says so: after every step, after every thousandth, in
a hook, in a validation. A chunk of its tensors is remembered at one look (just before an optimizer step) and compared at
the first look at which it was written since. That it was written is told by version counters, which count writes even where
no bit changed; writes that no counter sees (through `.data`) are found by comparing values between two neighbouring
looks. Which looks these are is drawn at random, so that no period of the training can hide from them.

The rate is what was said of it, or more: where an update moved elements by several gaps of the format, their own rate is
known (a decay that ramps up averages faster at first), and all elements of this update should have moved at it.

Legend: n tensors of a chunk, K samples.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update_watch import formats
from update_watch.measure.accumulators.average_sources import Decay, Source, UnreadableAverage, decay_of, sources_of
from update_watch.measure.accumulators.average_windows import NEARLY_COPIED, SUMS, AverageWindow, UnreadWindow
from update_watch.measure.sampling import Sampler, gather, local, mask, unsamplable
from update_watch.measure.transfer import Batch
from update_watch.odd_tensors import shape_of

logger = logging.getLogger("update_watch")

_CHUNK = 12  # tensors looked at together
_RESOLVED = 8.0  # half gaps from which on a movement tells its own rate
_ENOUGH = 8  # resolved elements for that
_LONGEST_PAUSE = 3  # looks between a chunk that was measured and the next
_SELDOM = 4  # looks in a row that saw no update: from then on more than one chunk waits for the next one
_TOGETHER = 4  # chunks that may wait
_PATIENCE = 64  # looks, after which one that waits makes room for another


class _Pair(NamedTuple):
    source: Source
    sampler: Sampler
    dtype: torch.dtype


class Averages:
    """The averages given to one watch."""

    def __init__(
        self, averages: Mapping[str, Any], named: list[tuple[str, Tensor]], samples: int, rng: random.Random
    ) -> None:
        self._chunks: list[_Chunk] = []
        self._unread: list[UnreadWindow] = []
        self._rng = random.Random(rng.random())  # its own: other draws do not depend on how often it is updated
        self._turn = 0
        self._open: list[_Chunk] = []
        self._pause = self._waited = 0
        for label, given in averages.items():
            holder, decay = decay_of(label, given)
            try:
                pairs, odd = _pairs(sources_of(holder, named), samples)
            except UnreadableAverage as reason:
                message = f"the average {label!r} is not watched: {reason}"
                logger.warning("update-watch: %s", message)
                self._unread.append(UnreadWindow(label, {name: str(reason) for name, _ in named}))
                continue
            if odd:
                self._unread.append(UnreadWindow(label, odd))
            for start in range(0, len(pairs), _CHUNK):
                self._chunks.append(_Chunk(label, pairs[start : start + _CHUNK], decay, samples, rng))

    def look(self) -> None:
        """Call just before every optimizer step, with gradients final."""
        if not self._chunks:
            return
        if self._open:
            left = [chunk for chunk in self._open if not chunk.finish()]
            self._waited = self._waited + 1 if len(left) == len(self._open) else 0
            self._open = left
            if left:
                if self._waited >= _SELDOM:
                    self._wait_for_more()
                return
            self._pause = self._rng.randrange(_LONGEST_PAUSE) if len(self._chunks) > 1 else 0
        elif self._pause:
            self._pause -= 1
            return
        self._start()

    def _wait_for_more(self) -> None:
        """Another chunk waits, too: an average that is written seldom would keep all others waiting for long."""
        if len(self._open) == len(self._chunks):
            return
        if len(self._open) >= _TOGETHER:
            if self._waited < _PATIENCE:
                return
            del self._open[0]
            self._waited = _SELDOM
        self._start()

    def _start(self) -> None:
        """Open the chunk whose turn it is."""
        while True:
            self._turn += 1
            chunk = self._chunks[self._turn % len(self._chunks)]
            if chunk not in self._open:
                break
        self._open.append(chunk)
        chunk.start()

    @property
    def are_read(self) -> bool:
        """Whether some are, just now."""
        return bool(self._open)

    def pass_by(self) -> None:
        """The step that begins is not looked at: what was written is given up, since the next look may see two updates."""
        if self._open:
            self._open = [chunk for chunk in self._open if chunk.is_waiting()]

    def close_window(self, batch: Batch, goes_on: bool = True) -> list[AverageWindow | UnreadWindow]:
        """Hand the sums to `batch` and start new ones.

        If the training `goes_on`, so does the comparison: else updates that always come where two windows meet are missed.
        """
        if not goes_on:
            self._open = []
        return [*(chunk.close(batch, goes_on, chunk in self._open) for chunk in self._chunks), *self._unread]


def _pairs(sources: list[Source], samples: int) -> tuple[list[_Pair], dict[str, str]]:
    """What can be compared; name -> why of the others."""
    pairs: list[_Pair] = []
    odd: dict[str, str] = {}
    for source in sources:
        average = source.get()
        if average is None:
            continue
        problem = _obstacle(local(average)) or _obstacle(local(source.weight))
        if problem:
            odd[source.name] = problem
            continue
        if not local(source.weight).numel():
            continue
        if local(average).device == local(source.weight).device:
            pairs.append(_Pair(source, Sampler(local(average), samples), local(average).dtype))
    if not pairs and not odd:
        raise UnreadableAverage("none of its tensors can be sampled on the device of the model's")
    pairs.sort(key=lambda p: (str(local(p.source.weight).device), str(p.dtype), str(p.source.weight.dtype)))
    return pairs, odd


def _obstacle(tensor: Tensor) -> str:
    """Why a (local) tensor of an average, or the weight it follows, cannot be read; "" when it can."""
    return unsamplable(tensor) or ("its values are complex" if tensor.is_complex() else "")


class _Chunk:
    def __init__(self, label: str, pairs: list[_Pair], decay: Decay, samples: int, rng: random.Random) -> None:
        self.label, self.pairs, self.rate, self._rng = label, pairs, decay.rate, rng
        self._counter, self._begins_late = decay.counter, decay.begins_late
        self._counted = int(decay.counter) if decay.counter is not None else 0  # a host read, once
        self._counter_version = _version(decay.counter)
        self._samplers = [pair.sampler for pair in pairs]
        self._device = local(pairs[0].source.weight).device
        self._mask = mask(self._samplers, self._device)
        self._sums = torch.zeros(SUMS, len(pairs), device=self._device)
        self._was_finer = torch.zeros(len(pairs), dtype=torch.bool, device=self._device)
        self._runs = _format_runs(pairs)
        self._updates = 0
        self._counts = False  # writes to it were seen in its counters
        self._first: Tensor | None = None  # where the window began
        self._redraw()

    def _redraw(self) -> None:
        for sampler in self._samplers:
            sampler.redraw(self._rng)

    def _averages(self) -> list[Tensor]:
        """The averages as they are now. Where one is gone, what it averages stands in: it then shows nothing."""
        found = []
        for pair in self.pairs:
            average = pair.source.get()
            fits = (
                average is not None
                and shape_of(average) == shape_of(pair.source.weight)
                and average.dtype == pair.dtype
            )
            found.append(average if fits and average is not None else pair.source.weight)
        return found

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        return gather([s.view(local(t.detach())) for s, t in zip(self._samplers, tensors, strict=True)], self._samplers)

    def start(self) -> None:
        """Remember the average."""
        averages = self._averages()
        self._before, self._marks, self._is_next_look = self._gather(averages), _marks(averages), True
        self._note_rounding(self._before)
        if self._first is None:
            self._first = self._before.clone()

    def is_waiting(self) -> bool:
        """Whether it certainly has not been written since it was remembered."""
        return self._counts and _is_same(self._averages(), self._marks)

    def finish(self) -> bool:
        """Compare, if there is something to compare; False: it waits to be written."""
        averages = self._averages()
        is_written = not _is_same(averages, self._marks)
        if not is_written and (self._counts or not self._is_next_look):
            if self._counts or self._rng.random() < 0.5:
                return False
            self.start()  # two neighbouring looks again: what no counter sees shows in values only
            return False
        self._is_next_look = False
        after = self._gather(averages)
        self._note_rounding(after)
        self._updates += is_written
        self._counts = self._counts or is_written
        self._add(after, is_written)
        return is_written

    def _add(self, after: Tensor, is_written: bool) -> None:
        weights = self._gather([p.source.weight for p in self.pairs])
        moved = after.ne(self._before)
        # the first update of AveragedModel copies the weights: that is no averaging, and would swamp all others
        averaged = after.ne(weights).any(-1, keepdim=True)
        if not is_written:  # that no bit changed then says nothing
            averaged = averaged & moved.any(-1, keepdim=True)
        zero = after.new_zeros(())
        applied = torch.where(averaged, after - self._before, zero)
        gap = torch.where(averaged, weights - self._before, zero)
        if self._mask is not None:
            applied, gap = applied * self._mask, gap * self._mask
        rate = self._rate_now()
        intended = gap * (1.0 if rate is None else rate)
        scale, is_known = self._speed(applied, intended, rate is not None)
        intended = torch.where(is_known, intended * scale, zero)
        applied, wanted = torch.where(is_known, applied, zero), intended.ne(0).float()
        parts = (applied * intended, intended * intended, wanted, wanted * applied.eq(0))
        self._sums[:4].add_(torch.stack([part.sum(-1) for part in parts]))
        self._sums[4].add_((averaged & is_known).squeeze(-1).float())
        self._sums[6].add_(moved.any(-1).float())
        self._sums[7].add_(gap.square().sum(-1))
        if rate is not None:
            own = scale * rate
            self._sums[9].add_(torch.where(averaged & own.ge(NEARLY_COPIED), own, zero).squeeze(-1))

    def _rate_now(self) -> float | None:
        """Of this update: as said, or of equal averages by their number."""
        if self._counter is None:
            return self.rate
        version = _version(self._counter)
        if version is not None and self._counter_version is not None:
            self._counted += version - self._counter_version
        self._counter_version = version
        return 1.0 / max(self._counted, 2)

    def _speed(self, applied: Tensor, intended: Tensor, is_said: bool) -> tuple[Tensor, Tensor]:
        """How much faster than `intended` this update was, [n, 1], as the elements tell that moved by several gaps.

        And whether that is known. Slower than said it is never taken to be: that is a finding, and not a rate.
        """
        half_gap = torch.full_like(applied, float("inf"))
        for rows, fmt in self._runs:
            half_gap[rows] = fmt.half_gap(self._before[rows], applied[rows])
        resolved = (applied.abs() >= _RESOLVED * half_gap) & intended.ne(0)
        enough = resolved.sum(-1, keepdim=True) >= _ENOUGH
        a, d = (
            torch.where(resolved, applied, applied.new_zeros(())),
            torch.where(resolved, intended, intended.new_zeros(())),
        )
        speed = (a * d).sum(-1, keepdim=True) / d.square().sum(-1, keepdim=True).clamp_min(1e-38)
        if is_said:
            return torch.where(enough, speed.clamp_min(1.0), torch.ones_like(speed)), torch.ones_like(enough)
        return speed.abs(), enough & speed.ne(0)

    def _note_rounding(self, average: Tensor) -> None:
        """Count looks at which an FP32 average that was finer before holds BF16 values only."""
        coarse = average.eq(average.to(torch.bfloat16).float()).all(-1)
        self._sums[5].add_((coarse & self._was_finer).float())
        self._was_finer.logical_or_(~coarse)

    def close(self, batch: Batch, goes_on: bool, is_open: bool) -> AverageWindow:
        """`is_open`: it is being compared, at positions that stay."""
        if self._first is not None:
            self._sums[8].add_(self._gather(self._averages()).ne(self._first).any(-1).float())
        rate = self._rate_now() if self._counter is not None else self.rate
        names = tuple(p.source.name for p in self.pairs)
        dtypes = tuple(str(p.dtype).removeprefix("torch.") for p in self.pairs)
        sizes, sums = tuple(s.size for s in self._samplers), batch.add(self._sums.reshape(-1).clone())
        self._begins_late = self._begins_late and not self._updates
        window = AverageWindow(
            *(self.label, names, dtypes, sizes, rate, sums, self._updates, self._counts), self._begins_late
        )
        self._sums.zero_()
        self._updates = 0
        if not is_open:
            self._redraw()
        self._first = self._gather(self._averages()) if goes_on else None
        return window


def _version(tensor: Tensor | None) -> int | None:
    """How often it was written; None for one that does not count (made in inference mode)."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _marks(tensors: list[Tensor]) -> list[tuple[weakref.ref[Tensor], int | None]]:
    """Changes when one of them is written, or replaced (another may lie where it lay)."""
    return [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]


def _is_same(tensors: list[Tensor], marks: list[tuple[weakref.ref[Tensor], int | None]]) -> bool:
    return all(ref() is t and _version(t) == version for t, (ref, version) in zip(tensors, marks, strict=True))


def _format_runs(pairs: list[_Pair]) -> list[tuple[slice, formats.Format]]:
    """Neighbours of one format; those of none that is known are left out."""
    runs = []
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or pairs[stop].dtype != pairs[start].dtype:
            fmt = formats.of(pairs[start].dtype)
            if fmt is not None:
                runs.append((slice(start, stop), fmt))
            start = stop
    return runs
