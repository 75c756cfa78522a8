"""Averaged models (EMA, Polyak, SWA) as accumulators: does the average follow the weights?

An average moves between two optimizer steps, by `rate * (weight - average)`. It is looked at just before two steps
that follow each other: what it moved by against what an FP32 average would have. Whether it was updated in between at all
is told by the tensors' version counters, which count writes even where no bit changed.

Legend: n tensors of a chunk, K samples.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update_watch.evidence import AccumulatorEvidence, Numbers
from update_watch.measure.sampling import Sampler, gather, local, mask, unsamplable
from update_watch.measure.transfer import Batch, Part
from update_watch.odd_tensors import shape_of

_CHUNK = 12  # tensors looked at in one step
_SUMS = 7  # dot, want, wanted, lost, looks, rounded looks, moved


class _Pair(NamedTuple):
    name: str
    weight: Tensor
    average: Tensor
    sampler: Sampler


class AverageWindow(NamedTuple):
    """One chunk's sums on their way to the host; `reasons` in their place for tensors that cannot be read."""

    label: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    rate: float | None
    transfer: Part | None
    updates: int  # writes to the average that were seen
    reasons: tuple[str, ...] = ()


class Averages:
    """The averages given to one watch."""

    def __init__(
        self, averages: Mapping[str, Any], named: list[tuple[str, Tensor]], samples: int, rng: random.Random
    ) -> None:
        self._chunks: list[_Chunk] = []
        self._unread: list[AverageWindow] = []  # said again in every window
        self._turn = 0
        self._open: _Chunk | None = None
        for label, given in averages.items():
            module, rate = _rate_of(label, given)
            tensors = {_stripped(n): t for n, t in _tensors(label, module)}
            pairs = []
            odd: list[tuple[str, str, str]] = []  # name, dtype, reason
            for name, weight in named:
                average = tensors.get(name)
                if average is None or average is weight:
                    continue
                problem = _obstacle(local(average))
                if problem:
                    odd.append((name, str(average.dtype).removeprefix("torch."), problem))
                    continue
                if shape_of(average) != shape_of(weight):
                    continue
                if average.is_inference():  # it does not count who writes to it
                    raise ValueError(
                        f"watch(averages={{{label!r}: ...}}): {name} was made in torch.inference_mode; "
                        "make the average under torch.no_grad"
                    )
                if _obstacle(local(weight)) or not local(weight).numel():
                    continue
                if local(average).device == local(weight).device:
                    pairs.append(_Pair(name, weight, average, Sampler(local(average), samples)))
            if odd:
                names, dtypes, reasons = zip(*odd, strict=True)
                self._unread.append(AverageWindow(label, names, dtypes, (), rate, None, 0, reasons))
            if not pairs and not odd:
                raise ValueError(
                    f"watch(averages={{{label!r}: ...}}): none of its tensors has a name and shape of the model's; "
                    "give the averaged copy of the watched model"
                )
            pairs.sort(key=lambda p: (str(local(p.average).device), str(p.average.dtype), str(p.weight.dtype)))
            for start in range(0, len(pairs), _CHUNK):
                part = pairs[start : start + _CHUNK]
                self._chunks.append(_Chunk(label, part, rate, samples, rng))

    def look(self) -> None:
        """Call just before every optimizer step, with gradients final."""
        if not self._chunks:
            return
        if self._open is None:
            self._open = self._chunks[self._turn % len(self._chunks)]
            self._turn += 1
            self._open.start()
        else:
            self._open.finish()
            self._open = None

    def pass_by(self) -> None:
        """The step that begins is not looked at: what was begun is given up, since the next look would see two updates."""
        self._open = None

    def close_window(self, batch: Batch) -> list[AverageWindow]:
        """Hand the sums to `batch` and start new ones."""
        self._open = None
        return [*self._unread, *(chunk.close(batch) for chunk in self._chunks)]


class _Chunk:
    def __init__(self, label: str, pairs: list[_Pair], rate: float | None, samples: int, rng: random.Random) -> None:
        self.label, self.pairs, self.rate, self._rng = label, pairs, rate, rng
        self._samplers = [pair.sampler for pair in pairs]
        self._device = local(pairs[0].average).device
        self._mask = mask(self._samplers, self._device)
        self._sums = torch.zeros(_SUMS, len(pairs), device=self._device)
        self._was_finer = torch.zeros(len(pairs), dtype=torch.bool, device=self._device)
        self._updates = 0
        self._redraw()

    def _redraw(self) -> None:
        for sampler in self._samplers:
            sampler.redraw(self._rng)

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        return gather([s.view(local(t.detach())) for s, t in zip(self._samplers, tensors, strict=True)], self._samplers)

    def start(self) -> None:
        self._before = self._gather([p.average for p in self.pairs])
        self._versions = [p.average._version for p in self.pairs]
        self._note_rounding(self._before)

    def finish(self) -> None:
        after = self._gather([p.average for p in self.pairs])
        self._note_rounding(after)
        if [p.average._version for p in self.pairs] == self._versions:
            moved = after.ne(self._before).any(-1).float()
            self._sums[6].add_(moved)
            return
        self._updates += 1
        weights = self._gather([p.weight for p in self.pairs])
        # the first update of AveragedModel copies the weights: that is no averaging, and would swamp all others
        averaged = after.ne(weights).any(-1, keepdim=True)
        applied = torch.where(averaged, after.sub_(self._before), 0.0)
        intended = torch.where(averaged, weights.sub_(self._before), 0.0)
        if self._mask is not None:
            applied, intended = applied.mul_(self._mask), intended.mul_(self._mask)
        intended.mul_(1.0 if self.rate is None else self.rate)
        wanted = intended.ne(0).float()
        parts = (applied * intended, intended * intended, wanted, wanted * applied.eq(0))
        self._sums[:4].add_(torch.stack([part.sum(-1) for part in parts]))
        self._sums[4].add_(averaged.squeeze(-1).float())

    def _note_rounding(self, average: Tensor) -> None:
        """Count looks at which an FP32 average that was finer before holds BF16 values only."""
        coarse = average.eq(average.to(torch.bfloat16).float()).all(-1)
        self._sums[5].add_((coarse & self._was_finer).float())
        self._was_finer.logical_or_(~coarse)

    def close(self, batch: Batch) -> AverageWindow:
        window = AverageWindow(
            self.label,
            tuple(p.name for p in self.pairs),
            tuple(str(p.average.dtype).removeprefix("torch.") for p in self.pairs),
            tuple(s.size for s in self._samplers),
            self.rate,
            batch.add(self._sums.reshape(-1).clone()),
            self._updates,
        )
        self._sums.zero_()
        self._updates = 0
        self._redraw()
        return window


def read(window: AverageWindow) -> dict[str, AccumulatorEvidence]:
    """Evidence by tensor name. Runs on the background thread."""
    key = f"average:{window.label}"
    if window.transfer is None:
        odd = zip(window.names, window.dtypes, window.reasons, strict=True)
        return {name: AccumulatorEvidence(key, dtype, Numbers(), reason=reason) for name, dtype, reason in odd}
    sums = window.transfer.wait().reshape(_SUMS, len(window.names))
    found = {}
    for i, (name, dtype, size) in enumerate(zip(window.names, window.dtypes, window.sizes, strict=True)):
        dot, want, wanted, lost, looks, rounded, moved = (float(x) for x in sums[:, i])
        reason = note = ""
        numbers = Numbers()
        if rounded and dtype == "float32":
            note = "rounded through BF16 weights, as by a swap for validation"
        if not window.updates:
            reason = "its updates bypass version counters" if moved else "no update of it was seen in this window"
        elif window.rate is None:
            reason = f"its decay is not known; give it: averages={{{window.label!r}: (model, decay)}}"
        elif want > 0:
            numbers = Numbers(
                efficiency=dot / want,
                wanted_fraction=wanted / (size * looks),
                lost_fraction=lost / wanted,
            )
        found[name] = AccumulatorEvidence(
            key, dtype, numbers, reason="" if note else reason, rate=window.rate, note=note
        )
    return found


def _obstacle(tensor: Tensor) -> str:
    """Why a (local) tensor of an average, or the weight it follows, cannot be read; "" when it can."""
    return unsamplable(tensor) or ("its values are complex" if tensor.is_complex() else "")


def _rate_of(label: str, given: Any) -> tuple[Any, float | None]:
    """The averaged module and 1 - decay: as given, or as its own settings tell."""
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], (int, float)):
        module, decay = given
        if not 0 <= decay < 1:
            raise ValueError(f"watch(averages={{{label!r}: (model, {decay!r})}}): the decay must be in [0, 1)")
        return module, 1.0 - decay
    for name in ("multi_avg_fn", "avg_fn"):  # torch.optim.swa_utils.AveragedModel
        function = inspect.unwrap(getattr(given, name, None) or _rate_of)  # torch wraps it in no_grad
        code = getattr(function, "__code__", None)
        if code is not None and "decay" in code.co_freevars:
            decay = function.__closure__[code.co_freevars.index("decay")].cell_contents
            if isinstance(decay, float):
                return given, 1.0 - decay
    for name in ("decay", "beta", "ema_decay"):
        decay = getattr(given, name, None)
        if isinstance(decay, float) and 0 <= decay < 1:
            return given, 1.0 - decay
    return given, None


def _tensors(label: str, module: Any) -> list[tuple[str, Tensor]]:
    for name in ("ema_model", "module"):  # ema-pytorch, AveragedModel
        inner = getattr(module, name, None)
        if isinstance(inner, torch.nn.Module):
            return list(inner.named_parameters(remove_duplicate=False))
    if isinstance(module, torch.nn.Module):
        return list(module.named_parameters(remove_duplicate=False))
    try:
        pairs = list(module.items() if isinstance(module, Mapping) else module)
        if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs):
            return pairs
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"watch(averages={{{label!r}: ...}}): expected a module or (name, tensor) pairs, got {type(module).__name__}"
    )


def _stripped(name: str) -> str:
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")
