"""What `packing` makes of a window's sums, by one launch, on CUDA. Needs Triton.

One program per row. The kept samples lie in cells of equal weight as in `sums_kernel`. `reaches` [3, n] FP64: mantissa bits of
the row's format (NaN: it has none, or was not measured), the exponent below which gaps stay what they are, and the window's
steps by those that were measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from update_watch.measure.sums.sums_kernel import log2_half_gap

_POINTERS = "way state_way elements stored cell_weights whole_rows reaches products cells_sums evidence state_way_sums element_sums"
_SIZES = "rows samples kept cells cell weighted has_stored"


@triton.jit(do_not_specialize=f"{_POINTERS} {_SIZES}".split())  # type: ignore[untyped-decorator]  # as in `sums_kernel`
def pack_window(  # type: ignore[no-untyped-def]
    way,  # [G, 2, n, kept]
    state_way,  # [2, S, n, kept / THIN]
    elements,  # [2, n, K]
    stored,  # [n, kept], if it was read
    cell_weights,  # [n, J], or anything
    whole_rows,  # [n] bool, or anything
    reaches,
    products,  # [2, G, G, n] and so on, as in `layout`
    cells_sums,
    evidence,
    state_way_sums,
    element_sums,
    rows,
    samples,
    kept,
    cells,
    cell,
    weighted,  # cells of one set, J
    has_stored,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    CELLS: tl.constexpr,
    CELL: tl.constexpr,
    WIDTH: tl.constexpr,  # of K, rounded up to a power of two
    THIN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_WHOLE: tl.constexpr,
    HAS_CLUSTERS: tl.constexpr,
    HAS_WAY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j, e = tl.arange(0, CELLS), tl.arange(0, CELL)
    k = j[:, None] * cell + e[None, :]
    is_there = (j[:, None] < cells) & (e[None, :] < cell) & (k < kept)
    if HAS_WAY:
        weights = tl.full((CELLS,), 1.0, tl.float64)
        if HAS_WEIGHTS:
            weights = tl.load(cell_weights + row * weighted + j % weighted, mask=j < cells, other=0.0).to(tl.float64)
        if HAS_WHOLE:  # the moving half of rows that are sampled is at other positions in every step
            weights = tl.where(j < weighted, weights, weights * tl.load(whole_rows + row).to(tl.float64))
        meant = tl.zeros((CELLS, CELL), tl.float64)
        weighed, went = meant, meant
        for h in range(GROUPS):
            here = way + (h * 2 * rows + row) * kept + k
            own = tl.load(here, mask=is_there, other=0.0).to(tl.float64)
            by_weight = own * weights[:, None]
            meant += own
            weighed += by_weight
            went += tl.load(here + rows * kept, mask=is_there, other=0.0).to(tl.float64)
            for gx in range(2 * GROUPS):  # of each group what was meant, and what arrived
                other = tl.load(way + (gx * rows + row) * kept + k, mask=is_there, other=0.0).to(tl.float64)
                found = tl.sum(tl.sum(other * by_weight, 1), 0)
                tl.store(products + ((gx % 2 * GROUPS + gx // 2) * GROUPS + h) * rows + row, found)
        below, above = tl.sum(weighed * meant, 1), tl.sum(weighed * went, 1)  # of cells
        tl.store(cells_sums + row, tl.sum(above * above, 0))
        tl.store(cells_sums + rows + row, tl.sum(above * below, 0))
        tl.store(cells_sums + 2 * rows + row, tl.sum(below * below, 0))
        mantissa_bits, lowest = tl.load(reaches + row), tl.load(reaches + rows + row)
        if (has_stored > 0) & (mantissa_bits == mantissa_bits):
            far = meant.to(tl.float32) * tl.load(reaches + 2 * rows + row).to(tl.float32)
            w = tl.load(stored + row * kept + k, mask=is_there, other=0.0)
            gap = log2_half_gap(w, far, mantissa_bits.to(tl.int32), lowest.to(tl.int32))
            # 2^gap, exactly: below 2^-126 it is subnormal, from 2^128 on infinite
            bits = tl.where(gap < -126, 1 << tl.minimum(tl.maximum(gap + 149, 0), 30), (gap + 127) << 23)
            reached = is_there & (far != 0) & (tl.abs(far) >= bits.to(tl.float32, bitcast=True))
            tl.store(evidence + row, tl.sum(tl.sum(reached.to(tl.float64), 1), 0))
        thin = (kept + THIN - 1) // THIN
        i = tl.arange(0, WIDTH)
        for s in tl.static_range(STATES):
            here = state_way + (s * rows + row) * thin + i
            arrived = tl.load(here, mask=i < thin, other=0.0).to(tl.float64)
            wanted = tl.load(here + STATES * rows * thin, mask=i < thin, other=0.0).to(tl.float64)
            tl.store(state_way_sums + s * rows + row, tl.sum(arrived * wanted, 0))
            tl.store(state_way_sums + (STATES + s) * rows + row, tl.sum(wanted * wanted, 0))
    if HAS_CLUSTERS:
        at = row * samples + tl.arange(0, WIDTH)
        dot = tl.load(elements + at, mask=tl.arange(0, WIDTH) < samples, other=0.0)
        want = tl.load(elements + rows * samples + at, mask=tl.arange(0, WIDTH) < samples, other=0.0)
        tl.store(element_sums + row, tl.sum(dot * dot, 0))
        tl.store(element_sums + rows + row, tl.sum(dot * want, 0))
        tl.store(element_sums + 2 * rows + row, tl.sum(want * want, 0))
