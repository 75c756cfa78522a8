"""The sums of `device_sums` by one launch, on CUDA. Needs Triton.

One program per row of the sums and accumulator (0: the weight, then states). It goes through the steps that are added, so what
belongs to one row is added up in one order, whichever programs run when. Samples lie in cells of equal weight: [CELLS, CELL]
covers the `cells` cells of `cell` neighbours, both rounded up to powers of two.

`slots` [T, 6] FP64: first row of the sums and the one behind the last, first row among the R, part, group, whether states are
compared. `looks` [5, L] FP64, of the rows `first_look` to `last_look` among the R: octaves (NaN: not looked at), mantissa bits, the
exponent below which gaps stay what they are, whether a BF16 weight would hold less, 4^-octaves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from update_watch.measure.device.bf16_rounding import rounded_to_bf16


@triton.jit
def log2_half_gap(w, d, mantissa_bits, lowest):  # type: ignore[no-untyped-def]
    """log2 of `Format.half_gap`, a whole number: see there."""
    bits = w.to(tl.int32, bitcast=True)
    differs = (bits ^ d.to(tl.int32, bitcast=True)) < 0
    size = bits & 0x7FFFFFFF
    size -= tl.where(differs & (size > 0), 1, 0)
    exponent = tl.maximum((size & 0x7F800000) >> 23, lowest + 127)
    return exponent - 127 - (mantissa_bits + 1)


@triton.jit
def is_absorbed_by_bf16(w, d):  # type: ignore[no-untyped-def]
    """`BF16.absorbs` of FP32 `w` rounded to BF16."""
    w = rounded_to_bf16(w)
    bits = w.to(tl.int32, bitcast=True)
    gap = log2_half_gap(w, d, 7, -126)
    subnormal = 1 << tl.minimum(gap + 149, 30)
    half = tl.where(gap < -126, subnormal, (gap + 127) << 23).to(tl.float32, bitcast=True)
    size = tl.abs(d)
    is_even = (bits & 0x10000) == 0
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return (w + d == w) | (is_finite & ((size < half) | ((size == half) & is_even)))


@triton.jit  # type: ignore[untyped-decorator]
def add_cells(values_of_cells, is_first, is_second, whole, HAS_WEIGHTS: tl.constexpr, HAS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over what is counted, and over what is kept: of rows read whole all samples are both."""
    first = tl.sum(tl.where(is_first, values_of_cells, 0.0), 0)
    second = tl.sum(tl.where(is_second, values_of_cells, 0.0), 0)
    counted, kept = second, first
    if not HAS_WEIGHTS:
        kept = second
    elif HAS_WHOLE:
        counted, kept = second + whole * first, first + whole * second
    return counted, kept


@triton.jit  # type: ignore[untyped-decorator]
def add_row(values, weights, is_first, is_second, whole, HAS_WEIGHTS: tl.constexpr, HAS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of samples."""
    return add_cells(tl.sum(values, 1) * weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)


@triton.jit  # type: ignore[untyped-decorator]
def put_row(at, values, weights, is_first, is_second, whole, HAS_WEIGHTS: tl.constexpr, HAS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds what is counted of samples to what is there."""
    counted, _ = add_row(values, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
    tl.atomic_add(at, counted, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def put_count(at, which, weights, is_first, is_second, whole, HAS_WEIGHTS: tl.constexpr, HAS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds how many samples `which` holds for."""
    put_row(at, which.to(tl.float64), weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)


_POINTERS = (
    "before intended after stored gradient mask cell_weights whole_rows slots looks parts states_sums full gradient_max"
)
_MORE = "histograms places what_if single both elements way state_way"
_SIZES = "rows all_rows full_rows steps samples cells cell kept has_mask first_look last_look"


# neither sizes nor where the arrays happen to begin: what is compiled when a watch is attached serves all steps
@triton.jit(do_not_specialize=f"{_POINTERS} {_MORE} {_SIZES}".split())  # type: ignore[untyped-decorator]
def add_steps(  # type: ignore[no-untyped-def]
    before,  # [A, R, K]
    intended,  # [A, R, K]
    after,  # [R, K]
    stored,  # [S, R', K]: states after the step, of the first R' rows
    gradient,  # [R, K]
    mask,  # [R, K], if there is one
    cell_weights,  # [R, cells], or anything
    whole_rows,  # [n] bool, or anything
    slots,
    looks,
    parts,  # [P, F, n] and so on, as in `layout`
    states_sums,
    full,
    gradient_max,
    histograms,
    places,
    what_if,
    single,
    both,
    elements,
    way,
    state_way,
    rows,
    all_rows,
    full_rows,
    steps,
    samples,
    cells,
    cell,
    kept,
    has_mask,
    first_look,
    last_look,
    STATES: tl.constexpr,
    CELLS: tl.constexpr,
    CELL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,  # else all samples weigh 1, and are both kept and counted
    HAS_WHOLE: tl.constexpr,  # some rows are read whole
    HAS_CLUSTERS: tl.constexpr,
    HAS_WAY: tl.constexpr,
    THIN: tl.constexpr,
    BINS: tl.constexpr,
    LOW: tl.constexpr,
    PLACES: tl.constexpr,
):
    row, accumulator = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j, e = tl.arange(0, CELLS), tl.arange(0, CELL)
    k = j[:, None] * cell + e[None, :]
    is_there = (j[:, None] < cells) & (e[None, :] < cell) & (k < samples)
    is_masked = is_there & ((k * 0 + has_mask) > 0)
    is_first, is_second = j < cells // 2, (j >= cells // 2) & (j < cells)
    whole = tl.full((), 0.0, tl.float64)
    if HAS_WHOLE:
        whole = tl.load(whole_rows + row).to(tl.float64)
    weights = tl.full((CELLS,), 1.0, tl.float64)
    if not HAS_WEIGHTS or not HAS_WAY:  # all are counted
        is_first, is_second = j < 0, j < cells
    nothing = tl.full((CELLS, CELL), 0.0, tl.float64)
    largest, spoiled = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    dots, wants = nothing, nothing
    dot2, dot_want, want2 = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for t in range(steps):
        slot = slots + t * 6
        first_row, stop_row = tl.load(slot).to(tl.int64), tl.load(slot + 1).to(tl.int64)
        at_row = tl.load(slot + 2).to(tl.int64) + row - first_row
        part, group = tl.load(slot + 3).to(tl.int64), tl.load(slot + 4).to(tl.int64)
        compares = tl.load(slot + 5) > 0
        if (row >= first_row) & (row < stop_row):
            at = at_row * samples + k
            valid = is_there & (tl.load(mask + at, mask=is_masked, other=1.0) > 0)
            if HAS_WEIGHTS:
                weights = tl.load(cell_weights + at_row * cells + j, mask=j < cells, other=0.0).to(tl.float64)
            if accumulator == 0:
                held = tl.load(before + at, mask=valid, other=0.0)
                wide_want = (tl.load(intended + at, mask=valid, other=0.0) - held).to(tl.float64)
                moved = (tl.load(after + at, mask=valid, other=0.0) - held).to(tl.float64)
                slope = tl.load(gradient + at, mask=valid, other=0.0).to(tl.float64)
                dot, want = wide_want * moved, wide_want * wide_want
                is_wanted, is_changed = wide_want != 0, moved != 0
                one, zero = nothing + 1.0, nothing
                sums = parts + part * 12 * rows + row  # F of `layout`
                counted_dot, kept_dot = add_row(dot, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                counted_want, kept_want = add_row(want, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                tl.atomic_add(sums, counted_dot, sem="relaxed")
                tl.atomic_add(sums + rows, counted_want, sem="relaxed")
                put_row(sums + 2 * rows, moved * moved, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                put_row(sums + 3 * rows, slope * slope, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                stored_square = held.to(tl.float64) * held.to(tl.float64)
                put_row(sums + 4 * rows, stored_square, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                is_lost = is_wanted & (is_changed == 0)
                put_count(sums + 5 * rows, is_wanted, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                put_count(sums + 6 * rows, is_changed, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                put_count(sums + 7 * rows, slope != 0, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                put_count(sums + 8 * rows, is_lost, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                count, _ = add_row(
                    tl.where(valid, one, zero), weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE
                )
                tl.atomic_add(sums + 9 * rows, count, sem="relaxed")
                # of cells; where there are none, a cell is a sample
                arrived, carried = tl.sum(dot, 1) * weights, tl.sum(want, 1) * weights
                found, _ = add_cells(arrived * carried, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                tl.atomic_add(sums + 10 * rows, found, sem="relaxed")
                found, _ = add_cells(carried * carried, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                tl.atomic_add(sums + 11 * rows, found, sem="relaxed")
                if compares:
                    tl.atomic_add(full + row, count, sem="relaxed")
                squares = slope * slope
                largest = tl.maximum(largest, tl.max(tl.max(squares, 1), 0))
                spoiled += tl.sum(tl.sum(tl.where(squares == squares, zero, one), 1), 0)
                if HAS_WAY:
                    along = way + (group * 2 * rows + row) * kept + k
                    tl.atomic_add(along, wide_want.to(tl.float32), mask=is_there & (k < kept), sem="relaxed")
                    tl.atomic_add(along + rows * kept, moved.to(tl.float32), mask=is_there & (k < kept), sem="relaxed")
                    tl.atomic_add(single + group * 2 * rows + row, kept_dot, sem="relaxed")
                    tl.atomic_add(single + (group * 2 + 1) * rows + row, kept_want, sem="relaxed")
                if HAS_CLUSTERS:
                    dots += dot
                    wants += want
                    dot2 += tl.sum(tl.sum(dot * dot, 1), 0)
                    dot_want += tl.sum(tl.sum(dot * want, 1), 0)
                    want2 += tl.sum(tl.sum(want * want, 1), 0)
                if (at_row >= first_look) & (at_row < last_look):
                    look, length = looks + at_row - first_look, last_look - first_look
                    octaves = tl.load(look)
                    mantissa_bits = tl.load(look + length).to(tl.int32)
                    lowest = tl.load(look + 2 * length).to(tl.int32)
                    if octaves == octaves:
                        w, d = held.to(tl.float32), wide_want.to(tl.float32)
                        gap = log2_half_gap(w, d, mantissa_bits, lowest).to(tl.float32)
                        headroom = tl.log2(tl.maximum(tl.abs(d), 1e-38)) - gap
                        top: tl.constexpr = BINS * PLACES - 1
                        place = tl.floor((headroom - LOW) * PLACES)
                        # NaN has no place; those rows are reported as broken from their sums
                        place = tl.where(place == place, place, 0.0)
                        place = tl.minimum(tl.maximum(place, 0.0), top).to(tl.int32)
                        shifted = tl.floor((headroom - (octaves + LOW).to(tl.float32)) * PLACES)
                        shifted = tl.where(shifted == shifted, shifted, 0.0)
                        shifted = tl.minimum(tl.maximum(shifted, 0.0), top).to(tl.int32)
                        counted = tl.where(is_wanted & is_there, one, zero)
                        energy = wide_want * wide_want * tl.load(look + 4 * length) * weights[:, None]
                        bins, next_bins = histograms + row * BINS, rows * BINS
                        tl.atomic_add(bins + place // PLACES, counted, mask=is_there, sem="relaxed")
                        tl.atomic_add(bins + next_bins + shifted // PLACES, counted, mask=is_there, sem="relaxed")
                        tl.atomic_add(bins + 2 * next_bins + shifted // PLACES, energy, mask=is_there, sem="relaxed")
                        tl.atomic_add(places + row * PLACES + shifted % PLACES, energy, mask=is_there, sem="relaxed")
                        if tl.load(look + 3 * length) > 0:
                            lost = tl.where(is_wanted & is_there & is_absorbed_by_bf16(w, d), one, zero)
                            tl.atomic_add(what_if + row, tl.sum(tl.sum(lost, 1), 0), sem="relaxed")
                            tl.atomic_add(what_if + rows + row, tl.sum(tl.sum(counted, 1), 0), sem="relaxed")
            elif compares:
                state = accumulator - 1
                was = tl.load(before + accumulator * all_rows * samples + at, mask=valid, other=0.0)
                meant = tl.load(intended + accumulator * all_rows * samples + at, mask=valid, other=0.0) - was
                went = tl.load(stored + state * full_rows * samples + at, mask=valid, other=0.0) - was
                if HAS_WAY:
                    thin = (kept + THIN - 1) // THIN
                    thinned = state_way + (state * rows + row) * thin + k // THIN
                    in_way = is_there & (k < kept) & (k % THIN == 0)
                    tl.atomic_add(thinned, went.to(tl.float32), mask=in_way, sem="relaxed")
                    tl.atomic_add(thinned + STATES * rows * thin, meant.to(tl.float32), mask=in_way, sem="relaxed")
                wide_meant, wide_went = meant.to(tl.float64), went.to(tl.float64)
                is_meant, is_lost = meant != 0, (meant != 0) & (went == 0)
                is_falling = (wide_meant * was.to(tl.float64)) < 0
                one, zero = nothing + 1.0, nothing
                of_state = states_sums + state * rows + row
                product, square = wide_went * wide_meant, wide_meant * wide_meant
                lost, wanted = tl.where(is_lost, one, zero), tl.where(is_meant, one, zero)
                for half in tl.static_range(2):
                    if half == 1:  # the same again of what moves towards zero
                        product, square = tl.where(is_falling, product, zero), tl.where(is_falling, square, zero)
                        lost, wanted = tl.where(is_falling, lost, zero), tl.where(is_falling, wanted, zero)
                    here = of_state + half * 4 * STATES * rows
                    found, _ = add_row(product, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                    tl.atomic_add(here, found, sem="relaxed")
                    found, _ = add_row(square, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                    tl.atomic_add(here + STATES * rows, found, sem="relaxed")
                    found, _ = add_row(lost, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                    tl.atomic_add(here + 2 * STATES * rows, found, sem="relaxed")
                    found, _ = add_row(wanted, weights, is_first, is_second, whole, HAS_WEIGHTS, HAS_WHOLE)
                    tl.atomic_add(here + 3 * STATES * rows, found, sem="relaxed")
    if accumulator == 0:
        known = tl.load(gradient_max + row)
        peak = tl.maximum(known, largest)
        peak = tl.where((spoiled > 0) | (known != known), float("nan"), peak)
        tl.store(gradient_max + row, peak)
        if HAS_CLUSTERS:
            single_ones = elements + row * samples + k
            tl.atomic_add(single_ones, dots, mask=is_there, sem="relaxed")
            tl.atomic_add(single_ones + rows * samples, wants, mask=is_there, sem="relaxed")
            tl.atomic_add(both + row, dot2, sem="relaxed")
            tl.atomic_add(both + rows + row, dot_want, sem="relaxed")
            tl.atomic_add(both + 2 * rows + row, want2, sem="relaxed")
