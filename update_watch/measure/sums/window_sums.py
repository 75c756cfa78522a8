"""A window's sums on the host, and the ratios that are made of them: for all rows at once, in FP64.

Legend as in `layout`: P parts of a window, F sums, S states, n rows, G groups of steps. NaN is what is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from update_watch.measure.sums.arrivals import Curves, tail
from update_watch.measure.sums.error_bars import (
    Array,
    ratio,
    reach,
    spread_beside_asked,
    spread_of_rms,
    spread_over_steps,
    standard_error,
    too_low,
)
from update_watch.measure.sums.layout import (
    BEFORE,
    CHANGED,
    COUNT,
    CROSS,
    DOT,
    GRADIENT,
    LOST,
    MOVED,
    NONZERO,
    SQUARE,
    STATE_SUMS,
    STATE_WANTED,
    WANT,
    WANTED,
    Layout,
)
from update_watch.measure.sums.missed_steps import Missed, Stood, all_pairs
from update_watch.measure.sums.step_sizes import Unseen
from update_watch.measure.sums.steps import Steps
from update_watch.worker import rest

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]
_DECAY_EVIDENCE = 12.0  # changes that should have been seen: by chance none of them is, e^-12
_NEARLY_ALL = 1 - 1e-9  # of the gradients are 0, though all samples were
_SPARSE = 0.1  # of the gradients at most are not 0
_FEW_CELLS = 0.1 / 16  # cells that carry the sum, by the samples, of which a cell has 16 at most
_TOLD_BY = 2048  # samples: of few cells a few carry the sum by chance
_GROWN, _GROWN_SAMPLES = 1.5, 4.0  # |intended|^2 from step to step, of tensors read whole and at other positions
_TAILS = 2.0  # of sums of log-normal numbers two standard errors cover 0.94 to 0.96 so, and 0.88 to 0.92 without
_WAY_STEPS = 16  # a displacement of fewer measured steps is noise,
_WAY_ERROR = 0.1  # and one of such an error says nothing: where updates swing, their sum is not known from some of them


@dataclasses.dataclass(frozen=True)
class WindowSums:
    """What `packing.packed` sent; see `layout` for the shapes."""

    parts_PFn: Array
    states_FSn: Array
    full_n: Array
    gradient_max_n: Array
    touched_n: Array
    headroom_2nB: Array
    movement_nB: Array
    places_nQ: Array  # the same by part of an octave
    what_if_2n: Array
    decay_5n: Array
    arrived_GGn: Array
    meant_GGn: Array
    single_G2n: Array
    cells_3n: Array
    evidence_n: Array
    state_way_2Sn: Array
    elements_3n: Array | None = None
    both_3n: Array | None = None

    @classmethod
    def unpack(cls, flat: Array, layout: Layout) -> WindowSums:
        """Raises ValueError for a vector of another length."""
        spans = layout.spans()
        if spans["parts_PFn"].stop != flat.size:
            raise ValueError(f"the vector of sums has {flat.size} values, {spans['parts_PFn'].stop} expected")
        shapes = layout._replace(has_way=True).shapes()
        return cls(**{n: flat[spans[n]].reshape(s) if n in spans else np.zeros(s) for n, s in shapes.items()})

    @classmethod
    def side_by_side(cls, sums: Sequence[WindowSums]) -> WindowSums:
        """The rows of one after those of the other, all of the same states; parts that one does not use are 0 of it."""
        if len(sums) == 1:
            return sums[0]
        parts = max(len(one.parts_PFn) for one in sums)
        found = {}
        for name, _, axis in sums[0]._by_rows():
            every = [getattr(one, name) for one in sums]
            if name == "parts_PFn":
                every = [
                    one if len(one) == parts else np.pad(one, ((0, parts - len(one)), (0, 0), (0, 0))) for one in every
                ]
            found[name] = np.concatenate(every, axis)
        return cls(**found)

    def of(self, rows: slice | Rows, parts: int) -> WindowSums:
        """Those of some rows, of which so many parts are in use."""
        found = {name: values[(slice(None),) * axis + (rows,)] for name, values, axis in self._by_rows()}
        return WindowSums(**{**found, "parts_PFn": found["parts_PFn"][:parts]})

    def joined(self, firsts: Rows) -> WindowSums:
        """Rows of one tensor each, from each of `firsts` to the next, as one."""
        found = {name: np.add.reduceat(values, firsts, axis) for name, values, axis in self._by_rows()}
        return WindowSums(**{**found, "gradient_max_n": np.maximum.reduceat(self.gradient_max_n, firsts)})

    def _by_rows(self) -> Iterator[tuple[str, Array, int]]:
        """All arrays, and where their rows are."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is not None:
                # every axis has a letter: "what_if_2n"
                yield field.name, values, field.name.rpartition("_")[2].index("n")

    @property
    def total_Fn(self) -> Array:
        """[F, n] sums over the window."""
        found: Array = self.parts_PFn.sum(0)
        return found

    def numbers(self, steps: Steps, unseen: Unseen, missed: Sequence[tuple[slice, Missed]] = ()) -> dict[str, Array]:
        """The numbers of the weights, [n] each, by their names in `TensorEvidence` and `Numbers`; `unseen`, see `step_sizes`;
        `missed`: what the measured parts of a cohort's rows stand for.
        """
        every, fair_PFn = self.total_Fn, steps.fairly(self.parts_PFn)
        t, sampled_Pn = fair_PFn.sum(0), steps.sampled_Pn
        measured = steps.measured_n
        is_exact = steps.is_whole_n & steps.is_plain_n
        cells = ratio(t[WANT] ** 2, t[SQUARE])

        # of a tensor whose steps were all measured nothing is unseen, whatever others were measured in
        energy_n = np.where(np.isnan(unseen.energy_n), steps.unmeasured_n, unseen.energy_n)
        energy_n = np.where(steps.unmeasured_n > 0, energy_n, 0.0)
        dot_Pn, want_Pn = self.parts_PFn[:, DOT].copy(), self.parts_PFn[:, WANT].copy()
        stood_Pn, reach_n, tail_n = np.ones_like(dot_Pn), np.full(len(measured), np.nan), np.zeros(len(measured))
        for stood in Stood.of(missed):
            rows, parts = stood.rows, len(stood.steps_Pn)
            own = slice(parts), rows
            of_cohorts = self.of(rows, parts)
            dot_Pn[own], want_Pn[own], reach_n[rows], tail_n[rows] = of_cohorts._of_all_steps(
                steps.of(rows, parts), stood
            )
            stood_Pn[own] = stood.steps_Pn
            rest()
        efficiency = ratio(dot_Pn.sum(0), want_Pn.sum(0)) + np.where(
            steps.is_whole_n, 0.0, too_low(t[DOT], t[WANT], t[CROSS], t[SQUARE])
        )
        spread_n, effective_n = spread_over_steps(dot_Pn, want_Pn, sampled_Pn)
        if steps.has_asked:
            asked = dot_Pn[-1], want_Pn[-1], ratio(self.parts_PFn[-1, WANT] ** 2, self.parts_PFn[-1, SQUARE])
            spread_n = spread_beside_asked(spread_n, *asked, want_Pn.sum(0), energy_n, is_exact)
        spread_n = spread_n + self._spread_over_elements(t)

        with np.errstate(all="ignore"):
            for_all = steps.for_all(unseen.usual_n)
            update_ratio = np.sqrt(ratio(every[WANT], every[BEFORE]) * for_all)
            # of a root: half the relative error of what is below it; a step that was not seen adds to it what it holds
            size, _ = spread_over_steps(fair_PFn[:, WANT], fair_PFn[:, BEFORE], sampled_Pn)
            beyond = ratio(unseen.largest_n, 1 - unseen.largest_n)
            size = size / ratio(t[WANT], t[BEFORE]) ** 2
            update_error = standard_error(size, effective_n, steps.unmeasured_n, beyond, cells, is_exact)
            # of heavy tails the samples that met too little differ too little as well
            update_error = update_ratio * update_error * (1 + _TAILS * np.sqrt(np.nan_to_num(size))) / 2
            update_error = update_error * np.sqrt(1 + unseen.unlooked_n)  # nor do the others know of a large step there
            displacement, displacement_error, way = self._displacement(steps)
            # rows of an embedding that no token used tell nothing of the others: only a whole gradient does
            is_seen = steps.is_whole_n | (t[NONZERO] > 0) | (steps.checks_n > 0)
            zeros = np.where(is_seen, 1 - ratio(t[NONZERO], t[COUNT]), np.nan)
            is_touched = (self.touched_n != 0) | self._has_risen(steps)
            zeros = np.where((zeros == 1) & is_touched, _NEARLY_ALL, zeros)
            is_seen &= ~is_touched
            lost_Pn, wanted_Pn = (stood_Pn * self.parts_PFn[:, kind] for kind in (LOST, WANTED))
            lost = ratio(lost_Pn.sum(0), wanted_Pn.sum(0))
            lost_spread = spread_over_steps(lost_Pn, wanted_Pn, sampled_Pn)
            lost_error = standard_error(*lost_spread, steps.unmeasured_n, unseen.largest_n, cells, is_exact)
            reach_n = np.where(np.isnan(reach_n), reach(efficiency, steps.is_plain_n), reach_n)
            doubt = unseen.largest_n * reach_n
            efficiency_error = standard_error(spread_n, effective_n, energy_n, doubt, cells, is_exact)
            efficiency_error = np.maximum(efficiency_error, energy_n * tail_n)
            return {
                "efficiency": efficiency,
                "efficiency_error": np.where(np.isnan(efficiency), np.nan, efficiency_error),
                "unseen_error": np.where(energy_n > 0, 0.5 * doubt, 0.0),
                "lost_fraction": lost,
                "lost_fraction_error": np.where(np.isnan(lost), np.nan, lost_error),
                "wanted_fraction": np.where((t[WANTED] == 0) & ~is_seen, np.nan, ratio(t[WANTED], t[COUNT])),
                "weight": ratio(t[WANT], t[COUNT]),
                "displacement_efficiency": displacement,
                "displacement_error": displacement_error,
                "path_weight": way / np.maximum(t[COUNT] / np.maximum(measured, 1), 1),
                "update_ratio": update_ratio,
                "update_ratio_error": update_error,
                "applied_ratio": np.sqrt(ratio(every[MOVED], every[BEFORE]) * for_all),
                "changed_fraction": ratio(t[CHANGED], t[COUNT]),
                "zero_gradient_fraction": zeros,
                "gradient_rms": np.sqrt(ratio(t[GRADIENT], t[COUNT])),
                "gradient_spread": spread_of_rms(
                    self.parts_PFn[:, GRADIENT], np.where(sampled_Pn > 0, self.parts_PFn[:, COUNT], 0.0)
                ),
                "gradient_max": np.where(np.isfinite(self.gradient_max_n), np.sqrt(self.gradient_max_n), np.nan),
                "stored": np.sqrt(ratio(t[BEFORE], t[COUNT])),
                "what_if": ratio(self.what_if_2n[0], self.what_if_2n[1]),
            }

    def _of_all_steps(self, steps: Steps, stood: Stood) -> tuple[Array, Array, Array, Array]:
        """[P, n] twice: <applied, intended> and |intended|^2 of the steps that each part stands for; [n] twice: how far the
        efficiency of the largest of them may be off (NaN: not known from the histogram), and what may lie beyond it."""
        dot_Pn, want_Pn = self.parts_PFn[:, DOT], self.parts_PFn[:, WANT]
        of_all_Pn = stood.energy_Pn
        counted_n, t = self.headroom_2nB[0].sum(1), self.total_Fn
        curves = Curves(
            self.movement_nB, self.places_nQ, ratio(self.movement_nB.sum(1), counted_n), ratio(t[WANT], t[WANTED])
        )
        curves.move(ratio(t[DOT], t[WANT]), want_Pn, stood.cohorts)
        # where something is carried, or rounding is at random, as much arrives of small updates as of large ones
        more_Pn = np.where(steps.is_plain_n, curves.more(want_Pn, stood), 0.0)
        is_known = steps.is_plain_n & curves.is_known_n
        reach_n = np.where(is_known, curves.reach(stood.top_n), np.nan)
        tail_n = np.where(is_known, tail(curves, want_Pn, steps.parts_Pn, stood, steps.sampled_Pn), 0.0)
        return of_all_Pn * dot_Pn + more_Pn, of_all_Pn * want_Pn, reach_n, tail_n

    def _has_risen(self, steps: Steps) -> Mask:
        """[n] whether updates grew from one measured step to the next: without gradients momentum makes them but smaller, so
        some came in between."""
        rates_Pn = steps.squared_rates_P.reshape(len(self.parts_PFn), -1)
        want_Pn = ratio(self.parts_PFn[:, WANT], steps.sampled_Pn * rates_Pn)
        # a rate of 0 is counted as 1: nothing is wanted then, whatever the gradient
        want_Pn = np.where((want_Pn == 0) & (rates_Pn == 1), np.nan, want_Pn)
        most_n = np.where(steps.is_whole_n, _GROWN, _GROWN_SAMPLES)
        risen_n = np.zeros(len(most_n), bool)
        last_n = np.full(len(most_n), np.inf)
        for want_n in want_Pn:
            risen_n |= want_n > most_n * last_n
            last_n = np.where(np.isnan(want_n), last_n, want_n)
        return risen_n

    def _spread_over_elements(self, t: Array) -> Array:
        """What elements differ by beyond what steps do: [n] V_elements - V_both, of two-way clusters, at least 0.

        Where a remainder is carried from step to step, what is lost in one step comes in another, and not steps but
        elements are the independent ones.
        """
        if self.elements_3n is None or self.both_3n is None:
            return np.zeros(t.shape[1])
        efficiency = ratio(t[DOT], t[WANT])

        def squared(sums_3n: Array) -> Array:
            found: Array = sums_3n[0] - 2 * efficiency * sums_3n[1] + efficiency**2 * sums_3n[2]
            return found

        beyond: Array = (squared(self.elements_3n) - squared(self.both_3n)) / t[WANT] ** 2
        return np.where(np.isfinite(beyond), np.maximum(beyond, 0.0), 0.0)

    def _displacement(self, steps: Steps) -> tuple[Array, Array, Array]:
        """Net progress over all steps of the window, its error, and |sum intended|^2: [n] each.

        With n of the T steps of a group measured, drawn at random, a step is among them with the chance n / T and a pair of
        steps of the group with n (n - 1) / T (T - 1); a pair from two groups with the product of their n / T. By these the
        products of all pairs are made up for those that were not measured. They are exact for n = T.
        """
        n_Gn, whole_Gn = steps.groups_Gn, np.maximum(steps.window_Gn, steps.groups_Gn)
        groups = len(n_Gn)
        above_GGn, below_GGn = (
            all_pairs(sums_GGn, self.single_G2n[:, i], n_Gn, whole_Gn)
            for i, sums_GGn in enumerate((self.arrived_GGn, self.meant_GGn))
        )
        above, below = above_GGn.sum((0, 1)), below_GGn.sum((0, 1))
        value = ratio(above, below)
        variance = np.zeros_like(value)
        for g in range(groups):
            rest = np.arange(groups) != g
            without = ratio(above_GGn[rest][:, rest].sum((0, 1)), below_GGn[rest][:, rest].sum((0, 1)))
            variance += np.nan_to_num((without - value) ** 2) * (groups - 1) / groups
        variance = variance * steps.unmeasured_n
        # elements: of rows that are not read whole, or where something is carried and the window is itself a sample
        x2, xy, y2 = self.cells_3n
        meant = self.meant_GGn.sum((0, 1))
        seen = ratio(self.arrived_GGn.sum((0, 1)), meant)
        spread = (x2 - 2 * seen * xy + seen**2 * y2) / meant**2
        is_sample = ~(steps.is_whole_n & steps.is_plain_n)
        variance = variance + np.where(is_sample, np.maximum(spread, 0.0), 0.0)
        n, error = n_Gn.sum(0), np.sqrt(variance)
        is_enough = (n >= _WAY_STEPS) & ((n_Gn > 1) | (whole_Gn == 0)).all(0) & (error <= _WAY_ERROR)
        known = np.isfinite(value) & (n > 0) & ((steps.unmeasured_n == 0) | is_enough)
        return np.where(known, value, np.nan), np.where(known, error, np.nan), below

    def state_numbers(self) -> list[dict[str, Array]]:
        """[S, n] numbers of the states, three times: all changes, growth (away from zero), decay (towards it)."""
        half = STATE_SUMS // 2
        everything, decay = self.states_FSn[:half], self.states_FSn[half:]
        found = []
        for dot, want, lost, wanted in (everything, everything - decay, decay):
            looked_Sn = np.broadcast_to(self.full_n, want.shape)
            numbers = {
                "efficiency": ratio(dot, want),
                "wanted_fraction": ratio(wanted, looked_Sn),
                "lost_fraction": ratio(lost, wanted),
                "weight": ratio(want, looked_Sn),
            }
            found.append(numbers)
        above, below = self.state_way_2Sn
        found[0]["displacement_efficiency"] = ratio(above, below)
        found[0]["path_weight"] = ratio(below, looked_Sn)
        return found

    def decay_numbers(self) -> dict[str, Array]:
        """[n] numbers of the decay alone; NaN where too little of it was to be seen."""
        dot, want, wanted, lost, expected = self.decay_5n
        enough = expected >= _DECAY_EVIDENCE
        found = {
            "efficiency": ratio(dot, want),
            "wanted_fraction": ratio(wanted, wanted),
            "lost_fraction": ratio(lost, wanted),
        }
        return {name: np.where(enough, values, np.nan) for name, values in found.items()}

    def suspects(self, steps: Steps) -> Mask:
        """[n] rows of which all sampled gradients were 0, and nobody knows of other elements, or of other steps."""
        nonzero_n = self.parts_PFn[:, NONZERO].sum(0)
        is_partly_seen = ~steps.is_whole_n | (steps.unmeasured_n > 0)
        found: Mask = (nonzero_n == 0) & is_partly_seen & (steps.measured_n > 0)
        return found

    def uneven(self, steps: Steps) -> Mask:
        """[n] rows of which few elements carry what moves: all but some gradients are 0, or few of the cells hold the sum."""
        t = self.total_Fn
        is_sparse = (t[NONZERO] < _SPARSE * t[COUNT]) & ((t[NONZERO] > 0) | (self.touched_n != 0))
        are_few = (ratio(t[WANT] ** 2, t[SQUARE]) < _FEW_CELLS * t[COUNT]) & (t[COUNT] >= _TOLD_BY)
        found: Mask = ~steps.is_whole_n & (is_sparse | are_few)
        return found

    def is_untouched(self) -> Mask:
        """[n]: every state was 0 and stayed it, so far as it was looked at: no gradient has come yet."""
        found: Mask = (self.states_FSn[STATE_WANTED] == 0).all(0) & (self.full_n > 0)
        return found

    def is_finite(self) -> Mask:
        """[n]: no NaN or infinity among weights and updates. Gradients may overflow where a scaler skips the step."""
        return np.asarray(np.isfinite(self.total_Fn[[DOT, WANT, MOVED, BEFORE]]).all(0))
