"""What is read of an optimizer's parameters in a step: weights, gradients and states at the same positions, side by side.

One strided view per tensor and array, packed into one block; see `sampling`. The samples of a row are those of the kept set
and then those of the moving set (`positions`), or all of a small tensor. Where nothing is made of the kept set, as of tensors
in turns whose steps are independent, it goes on as the moving set does. States that hold what rounding took are joined here.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.measure.device import multi_gather
from update_watch.measure.parameters import Row
from update_watch.measure.position_weights import Normalised, PositionWeights, cell_of, column, draw
from update_watch.measure.positions import SHARES, share
from update_watch.measure.sampling import Sampler, local, mask, pack_views
from update_watch.odd_tensors import unreadable
from update_watch.replay.kept_states import states_of
from update_watch.wording import first_line

_FINE = (torch.float32, torch.float64)
_SECOND_MOMENTS = "exp_avg_sq", "square_avg", "sum"  # as torch's optimizers and those modelled on them name them


class Common(NamedTuple):
    """What all rows have in common whose samples will lie side by side, whichever gathers read them."""

    states: list[str]  # all have the same accumulators
    is_fine: bool  # what FP32 itself loses is to be seen
    cell: int  # see `cell_of`
    has_whole: bool  # some are read whole
    keeps: bool  # a set of samples stays where it is for a window; else both go on

    @classmethod
    def of(cls, rows: Sequence[Row], keeps: bool) -> Common:
        carriers = {row.scheme.carrier for row in rows if row.scheme.carrier}
        states = carriers.union(*{row.rule.element_states for row in rows})
        is_bound = any([row.rule.is_bound_to_fp32 for row in rows])
        is_fine = not is_bound and any([local(row.param).dtype in _FINE for row in rows])
        cell = cell_of([row.sampler for row in rows if row.sampler is not None])
        return cls(sorted(states), is_fine, cell, any([row.is_whole for row in rows]), keeps)


class Gathers:
    """Reads rows of one optimizer on one device. `slots`: state -> its place among the accumulators."""

    _reads_lower_first = True  # of two sets the one of the lower share

    def __init__(self, optimizer: Optimizer, rows: list[Row], samples: int, rng: random.Random, common: Common) -> None:
        """`common`: of these rows, and of those whose samples will lie beside theirs."""
        self.optimizer, self.rows, self.samples = optimizer, rows, samples
        self.device = local(rows[0].param).device
        self.samplers = [row.sampler for row in rows if row.sampler is not None]
        self.states = common.states
        self.slots = {name: 1 + i for i, name in enumerate(self.states)}
        # rows with a state that holds what rounding took from the weight: what is stored is both together
        self.carried = [(i, self.slots[row.scheme.carrier], row) for i, row in enumerate(rows) if row.scheme.carrier]
        # what FP32 itself loses is seen in FP64 only, which not every device has
        self.dtype = torch.float64 if common.is_fine and self.device.type != "mps" else torch.float32
        self._moving = [sampler for sampler in self.samplers if not sampler.is_whole]
        cell = self._cell = common.cell
        self.are_whole = not cell
        # [n, 1]: rows read whole, beside others that are not; None where all rows are alike
        self.whole_n1: Tensor | None = None
        if cell and common.has_whole:
            self.whole_n1 = column([sampler.is_whole for sampler in self.samplers], self.device).bool()
        phase, self._keeps, self._rng = rng.randrange(SHARES), common.keeps, rng
        self._phase, self._turn, self._kept_turn = phase, 0, 0
        self._weights = PositionWeights(self.samplers, phase, self.device, cell) if cell else None
        self._kept_weights_nJ: Tensor | None = None
        zeros: dict[Any, Tensor] = {}  # by format and shape: there are few
        for row in rows:
            if row.sampler and (key := (row.layout[1], row.sampler.view_shape)) not in zeros:
                zeros[key] = torch.zeros((), dtype=key[0], device=self.device).expand(key[1])
        self._zeros = [zeros[row.layout[1], row.sampler.view_shape] for row in rows if row.sampler]
        self._view = [sampler.view for sampler in self.samplers]
        self._is_sharded = any(local(row.param) is not row.param for row in rows)
        self._padding = mask(self.samplers, self.device)
        self._mask: Tensor | None = self._padding
        self._masked: tuple[bool, ...] = (True,) * len(rows)

    @property
    def reads_any_cell(self) -> bool:
        """Whether cells may be drawn by size."""
        return self.device.type == "cpu"

    @property
    def keeps(self) -> bool:
        """Whether a set of samples stays where it is for a window."""
        return self._keeps

    # --- where -----------------------------------------------------------------------------------

    def open_window(self) -> None:
        """Other positions for the kept set, from the next `move` on."""
        self._turn += 1
        self._kept_turn = self._turn
        self._kept_weights_nJ = None

    def move(self) -> tuple[int, bool]:
        """Go on with the moving set. Returns the turn, and whether the moving set comes first in what is read and is not to."""
        if not self._keeps:
            self.open_window()
        self._turn += 1
        return self._turn, self._place() and self._keeps

    def settle(self) -> None:
        """Both sets at the kept positions."""
        self._go_to(*[share(self._phase, self._kept_turn)] * 2)

    def _place(self) -> bool:
        kept, moving = share(self._phase, self._kept_turn), share(self._phase, self._turn)
        self._go_to(kept, moving)
        return moving < kept

    def _go_to(self, kept: int, moving: int) -> None:
        for sampler in self._moving:
            sampler.place(kept, moving)

    def draw(
        self, tensors: Iterable[int], grads: Sequence[Tensor | None], states: Sequence[Mapping[str, Any]]
    ) -> dict[int, Tensor]:
        """Read some tensors, given by their first rows, where gradients and states are large, until the next `move`.

        Returns by row [1, J] weights of the moving set, or [2, J] of both where none is kept; of tensors that can be read so:
        their gradient is there, and lies as they do.
        """
        found: dict[int, Tensor] = {}
        sets = 1 if self._keeps else 2
        for i in tensors:
            row, sampler = self.rows[i], self.samplers[i]
            if grads[i] is None or type(sampler) is not Sampler or sampler.positions is None:
                continue
            read = {"": grads[i]} | {
                name: states[i].get(name) for name in sorted(row.rule.element_states) if name in row.shaped
            }
            sized = {
                name: local(one)
                for name, one in read.items()
                if isinstance(one, Tensor) and sampler.shares_layout(local(one))
            }
            grad = sized.get("")
            if grad is None:
                continue
            square = next((sized[name] for name in _SECOND_MOMENTS if name in sized), None)
            normalised = None if square is None else Normalised(grad, square, sized.get("exp_avg"))
            own = [k for k, other in enumerate(self.rows) if other.param is row.param] if self._keeps else [i]
            samplers = [self.samplers[k] for k in own]
            weights = draw(samplers, [*sized.values()], sets, self._rng, normalised)
            per_cell = sampler.positions.block // self._cell
            found |= {k: of_k.repeat_interleave(per_cell).view(sets, -1) for k, of_k in zip(own, weights, strict=True)}
        return found

    def weights_of(self, turn: int, drawn: Mapping[int, Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """[n, J] twice: weights of the kept and of the moving set at a turn, for cells of K / 2J neighbours; None where all
        rows are read whole. `drawn`: what `draw` returned at that turn."""
        pair = self._weights_of(turn)
        if pair is None or not drawn:
            return pair
        first_nJ, second_nJ = (weights_nJ.clone() for weights_nJ in pair)
        for i, weights_sJ in drawn.items():
            second_nJ[i] = weights_sJ[-1]
            if not self._keeps:
                first_nJ[i] = weights_sJ[0]
        return first_nJ, second_nJ

    def _weights_of(self, turn: int) -> tuple[Tensor, Tensor] | None:
        if self._weights is None:
            return None
        if not self._keeps:
            sets = turn - 1, turn  # in the order in which they are read
            if self._reads_lower_first and share(self._phase, turn) < share(self._phase, turn - 1):
                sets = turn, turn - 1
            return self._weights.at(sets[0]), self._weights.at(sets[1])
        if self._kept_weights_nJ is None:
            # cloned: what is worked out ahead goes on
            self._kept_weights_nJ = self._weights.at(self._kept_turn).clone()
        return self._kept_weights_nJ, self._weights.at(turn)

    @property
    def kept_weights(self) -> Tensor | None:
        """[n, J]: weights of the kept set; None where there is none, or all rows are read whole."""
        if not self._keeps:
            return None
        known = self._kept_weights_nJ
        return known if known is not None or self._weights is None else self._weights.at(self._kept_turn)

    # --- what ------------------------------------------------------------------------------------

    def stored_states(self) -> list[dict[str, Any]]:
        """The states of all rows, as the optimizer has them."""
        found = states_of(self.optimizer)
        return [found.get(row.param) or {} for row in self.rows]

    def problem(self, row: Row) -> str:
        """Why what is read of a row, beside its weight, cannot be read now; "" when it can."""
        state = states_of(self.optimizer).get(row.param) or {}
        read = {"its gradient": row.param.grad, **{f"its state '{name}'": state.get(name) for name in row.shaped}}
        for what, tensor in read.items():
            if not isinstance(tensor, Tensor):
                continue
            problem = unreadable(local(tensor))
            try:
                if not problem and row.sampler is not None:
                    row.sampler.view(local(tensor)).to(torch.float32)
            except Exception as error:
                problem = first_line(error)
            if problem:
                return f"{what} cannot be read: {problem}"
        return ""

    def before(
        self, states: list[dict[str, Any]], grads: list[Tensor | None], counters: Sequence[Tensor] = ()
    ) -> tuple[Any, list[Tensor]]:
        """[(A + 1) n, K]: weights, states, gradients; and copies of step counters."""
        packed = self._read(self._stored() + self._states(states) + grads)
        return packed, [counter.clone() for counter in counters]

    def gradients(self, grads: list[Tensor | None]) -> Any:
        """[n, K]: gradients alone."""
        return self._read(grads)

    def after(self, states: list[dict[str, Any]] | None) -> Any:
        """[A n, K]: weights, and states unless None, as `before`."""
        return self._read(self._stored() if states is None else self._stored() + self._states(states))

    def unpacked(self, packed: Any) -> Tensor:
        """[rows, K], in a format that holds them all: what `before`, `gradients` or `after` have read, in their own form."""
        return packed  # type: ignore[no-any-return]

    def widened(self, packed: Any, moving_first: bool) -> Tensor:
        """[accumulators, n, K] in `dtype` from one row per accumulator and parameter: the kept set, the moving set."""
        return side_by_side([(self, packed, moving_first)])

    def samples_of(self, i: int, tensor: Tensor, moving_first: bool) -> Tensor:
        """[K]: the samples of one row in a tensor laid out like it, as `widened`."""
        sampler = self.samplers[i]
        values_K = pack_views([sampler.view(tensor)], [sampler])[0].to(self.dtype)
        if moving_first and not sampler.is_whole:
            values_K = values_K.view(2, -1).flip(0).view(-1)
        return values_K

    def join(self, values_AnK: Tensor) -> None:
        """Make the stored weights whole; the states that held the rest are empty then, as in FP32."""
        for i, slot, row in self.carried:
            fmt = formats.of(local(row.param).dtype)
            assert fmt is not None  # else there is no scheme
            joined_K = row.scheme.joined(values_AnK[0, i].float(), values_AnK[slot, i].float(), fmt)
            values_AnK[0, i].copy_(joined_K)
            values_AnK[slot, i].zero_()

    def mask_of(self, live: tuple[bool, ...]) -> Tensor | None:
        """[n, K]: 0 for padding and for rows that take no part; None where there are neither."""
        if live != self._masked:
            self._masked = live
            if all(live):
                self._mask = self._padding
            else:
                shape = (len(self.rows), self.samples)
                valid = torch.ones(shape, device=self.device) if self._padding is None else self._padding.clone()
                for i, is_live in enumerate(live):
                    if not is_live:
                        valid[i].fill_(0.0)
                self._mask = valid
        return self._mask

    def _stored(self) -> list[Tensor | None]:
        return [row.param for row in self.rows]

    def _states(self, states: list[dict[str, Any]]) -> list[Tensor | None]:
        """All states, in the order of the slots; None for those that do not exist (yet)."""
        return [
            state.get(name) if name in row.shaped else None
            for name in self.slots
            for row, state in zip(self.rows, states, strict=True)
        ]

    def _shards(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else local(t) for t in tensors] if self._is_sharded else tensors

    def _read(self, tensors: list[Tensor | None]) -> Any:
        """[len(tensors), K], one row after the other for each array of them; zeros for None."""
        # views for this step only: kept, they would keep the memory of what training lets go
        readers = zip(self._shards(tensors), itertools.cycle(zip(self._view, self._zeros, strict=True)), strict=False)
        packed = pack_views([zeros if t is None else view(t) for t, (view, zeros) in readers], self.samplers)
        if packed.device != self.device:
            raise RuntimeError(f"parameters planned for on {self.device} are on {packed.device}")
        return packed


def side_by_side(steps: Sequence[tuple[Gathers, Any, bool]], only: slice = slice(None)) -> Tensor:
    """[accumulators, R, K] in the gathers' `dtype`: what was read in some steps, R rows together, the kept sets first.

    Of each step its gathers, what they have packed (`only` some accumulators of it), and whether the moving set comes first.
    """
    first = steps[0][0]
    pieces = [
        gathers.unpacked(packed).view(-1, len(gathers.rows), gathers.samples)[only] for gathers, packed, _ in steps
    ]
    are_turned = [moving_first and not first.are_whole for _, _, moving_first in steps]
    if first.device.type == "cpu" and not multi_gather.is_available(first.device):
        of_steps = zip(steps, pieces, are_turned, strict=True)
        return _one_by_one(
            [_turned(one[0], piece) if turned else piece for one, piece, turned in of_steps], first.dtype
        )
    joined_ARK = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    if any(are_turned):
        halves = [torch.unflatten(piece, -1, (2, -1)) for piece in pieces]
        sets = [
            torch.cat([half[:, :, k ^ turned] for half, turned in zip(halves, are_turned, strict=True)], 1)
            for k in (0, 1)
        ]
        turned_ARK = torch.cat(sets, -1)
        whole_R1 = whole_of([gathers for gathers, _, _ in steps])
        joined_ARK = turned_ARK if whole_R1 is None else torch.where(whole_R1, joined_ARK, turned_ARK)
    return joined_ARK.to(first.dtype)


def _turned(gathers: Gathers, piece_AnK: Tensor) -> Tensor:
    turned_AnK = torch.unflatten(piece_AnK, -1, (2, -1)).flip(2).flatten(2)
    return turned_AnK if gathers.whole_n1 is None else torch.where(gathers.whole_n1, piece_AnK, turned_AnK)


def _one_by_one(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Side by side; copied step by step, since torch shares out what is larger among threads, and waits for them."""
    if len(pieces) == 1:
        return pieces[0].to(dtype)
    rows = [piece.shape[1] for piece in pieces]
    joined_ARK = torch.empty(len(pieces[0]), sum(rows), pieces[0].shape[2], dtype=dtype, device=pieces[0].device)
    for place, piece in zip(torch.split(joined_ARK, rows, 1), pieces, strict=True):
        place.copy_(piece)
    return joined_ARK


def whole_of(gathers: Sequence[Gathers]) -> Tensor | None:
    """[R, 1]: rows read whole, beside others that are not; None where all rows are alike."""
    columns = [one.whole_n1 for one in gathers if one.whole_n1 is not None]
    if not columns:
        return None
    return columns[0] if len(columns) == 1 else torch.cat(columns)
