"""The sums of `sheet_sums` by two launches, on CUDA: one every few steps, one at a window's end. Needs Triton.

One program per tensor: rows below n are the model's, those behind them their masters. E elements of each; see `SheetSums` for
what the arrays hold. `gaps` has a bit for each of the steps before which others passed unseen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from update_watch.measure.device.bf16_rounding import rounded_to_bf16

# one compiled kernel for all sheets: neither sizes nor where the arrays happen to begin are looked at
_ARRAYS = "begin held now first since put applied places writes squares signature last_write copy_steps tries"
_SIZES = "n members first_full last_full"


@triton.jit  # type: ignore[untyped-decorator]
def rounded(values, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the tensors' format and back. `KIND`: 0 BF16, 1 FP16, 2 FP32."""
    if KIND == 0:
        values = rounded_to_bf16(values)
    elif KIND == 1:
        values = values.to(tl.float16).to(tl.float32)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def place_of(before, between):  # type: ignore[no-untyped-def]
    """Where what was written put each element, as `sheet_sums` has it."""
    low, high = tl.min(before, 0), tl.max(before, 0)
    from_below, from_above = (before == low) & (between > 0), (before == high) & (between < 0)
    place = tl.where(from_below | from_above, tl.where(low == high, 2.0, 3.0), 4.0)
    return tl.where(between != 0, tl.where(before == 0, 1.0, place), 0.0)


@triton.jit(do_not_specialize=f"read read_masters {_ARRAYS} {_SIZES} steps waiting gaps is_new_window".split())  # type: ignore[untyped-decorator]
def add_steps(  # type: ignore[no-untyped-def]
    read,  # [T, 2, n, E]
    read_masters,  # the same of the masters, if there are any
    begin,
    held,
    now,
    first,
    since,
    put,
    applied,
    places,
    writes,
    squares,
    signature,
    last_write,
    copy_steps,
    tries,
    n,
    members,
    steps,  # of the span, before these
    waiting,  # T
    gaps,
    is_new_window,
    first_full,  # rows in FP32 whose copies in BF16 are compared
    last_full,
    E: tl.constexpr,
    TURN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    here, next_side = row * E + e, members * E
    of_run = row % n
    last = tl.load(now + here)
    sums = tl.zeros((E,), tl.float32)
    step_squares, written, count = (
        tl.full((), 0.0, tl.float32),
        tl.full((), 0.0, tl.float32),
        tl.full((), 0.0, tl.float32),
    )
    sines, latest, copies = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    before, after = last, last
    reached = tl.zeros((E,), tl.float32)
    has_begun = (tl.load(writes + members + row) > 0).to(tl.float32)
    put_there = tl.load(put + here)
    since_window, since_span = tl.load(since + here), tl.load(since + next_side + here)
    tried, rewritten, put_back, passed = (
        tl.zeros((E,), tl.float32),
        tl.zeros((E,), tl.float32),
        tl.zeros((E,), tl.float32),
        tl.zeros((E,), tl.float32),
    )
    for t in range(waiting):
        at = (t * 2 * n + of_run) * E + e
        before = tl.load(read + at, mask=(row + e * 0) < n, other=0.0)
        before += tl.load(read_masters + at, mask=(row + e * 0) >= n, other=0.0)
        after = tl.load(read + n * E + at, mask=(row + e * 0) < n, other=0.0)
        after += tl.load(read_masters + n * E + at, mask=(row + e * 0) >= n, other=0.0)
        if (t == 0) & (steps == 0):  # what was before the first look is not known
            last = before
            tl.store(begin + here, before)
            tl.store(begin + next_side + here, before)
        if (t == 0) & (is_new_window > 0) & (members > n):
            tl.store(first + here, before)
        step, between = after - before, before - last
        step_squares += tl.sum(step * step, 0)
        if ((gaps >> t) & 1) > 0:
            step += between
            between = tl.zeros((E,), tl.float32)
        written += tl.sum(between * between, 0)
        wrote = tl.max((between != 0).to(tl.int32), 0).to(tl.float32)
        place = place_of(before, between)
        reached = tl.maximum(reached, place)
        # against the write before, where there was one
        is_try = ((last != put_there) & (place != 1.0) & (place != 3.0)).to(tl.float32) * wrote * has_begun
        tried += is_try
        rewritten += is_try * (between != 0).to(tl.float32)
        put_back += is_try * (before == put_there).to(tl.float32)
        passed += is_try * (tl.abs(between) > tl.abs(last - put_there)).to(tl.float32)
        if wrote > 0:
            put_there = before
            if has_begun == 0:
                since_window, since_span = before, before
        has_begun = tl.maximum(has_begun, wrote)
        sums += tl.where((e * 0).to(tl.float32) + has_begun > 0, step, 0.0)
        number = (steps + 1 + t).to(tl.float32)
        count += wrote
        latest = tl.maximum(latest, wrote * number)
        sines += wrote * tl.sin(number * TURN)
        if (row >= first_full) & (row < last_full):
            copies += tl.sum((rounded(before, 0) != rounded(after, 0)).to(tl.float32), 0)
        last = after
    if members > n:
        tl.store(held + here, before)
    tl.store(now + here, after)
    tl.store(put + here, put_there)
    tl.store(since + here, since_window)
    tl.store(since + next_side + here, since_span)
    for side in tl.static_range(2):
        at_side = here + side * next_side
        tl.store(applied + at_side, tl.load(applied + at_side) + sums)
        known = tl.load(places + at_side).to(tl.float32)
        tl.store(places + at_side, tl.maximum(known, reached).to(tl.int8))
        tl.store(writes + side * members + row, tl.load(writes + side * members + row) + count)
    tl.store(squares + row, tl.load(squares + row) + step_squares)
    tl.store(squares + members + row, tl.load(squares + members + row) + written)
    tl.store(signature + row, tl.load(signature + row) + sines)
    tl.store(last_write + row, tl.maximum(tl.load(last_write + row), latest))
    tl.store(tries + row, tl.load(tries + row) + tl.sum(tried, 0))
    tl.store(tries + members + row, tl.load(tries + members + row) + tl.sum(rewritten, 0))
    tl.store(tries + 2 * members + row, tl.load(tries + 2 * members + row) + tl.sum(put_back, 0))
    tl.store(tries + 3 * members + row, tl.load(tries + 3 * members + row) + tl.sum(passed, 0))
    if (row >= first_full) & (row < last_full):
        tl.store(copy_steps + row - first_full, tl.load(copy_steps + row - first_full) + copies)


@triton.jit  # type: ignore[untyped-decorator]
def across(what, along):  # type: ignore[no-untyped-def]
    """The part of it that does not lie along the weights."""
    length = tl.sum(along * along, 0)
    return what - tl.where(length > 0, tl.sum(what * along, 0) / length, 0.0) * along


@triton.jit  # type: ignore[untyped-decorator]
def put_products(out, n, applied, places, moved, put):  # type: ignore[no-untyped-def]
    """The first eight columns of one tensor."""
    is_free = ((places != 1.0) & (places != 3.0)).to(tl.float32)
    product, square = moved * applied, applied * applied
    dot, want = tl.sum(product, 0), tl.sum(square, 0)
    share = tl.where(want > 0, dot / want, 0.0)
    spread = product - share * square
    across_weights = across(applied, put)
    tl.store(out, dot)
    tl.store(out + n, want)
    tl.store(out + 2 * n, tl.sum(spread * spread, 0))
    tl.store(out + 3 * n, tl.sum(product * is_free, 0))
    tl.store(out + 4 * n, tl.sum(square * is_free, 0))
    tl.store(out + 5 * n, tl.sum(square * (places == 1.0).to(tl.float32), 0))
    tl.store(out + 6 * n, tl.sum(moved * across_weights, 0))
    tl.store(out + 7 * n, tl.sum(across_weights * across_weights, 0))


@triton.jit  # type: ignore[untyped-decorator]
def put_copies(out, n, begin, end, begin_master, end_master, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Has the model's tensor moved as its master has, rounded?"""
    due = rounded(end_master, KIND) - rounded(begin_master, KIND)
    tl.store(out, tl.sum(due * due, 0))
    tl.store(out + n, tl.sum(due * (end - begin), 0))


@triton.jit(do_not_specialize=f"out earlier gradients {_ARRAYS} {_SIZES}".split())  # type: ignore[untyped-decorator]
def end_window(  # type: ignore[no-untyped-def]
    out,  # [COLUMNS, n]
    begin,
    held,
    now,
    first,
    since,
    put,
    applied,
    places,
    writes,
    squares,
    earlier,
    signature,
    last_write,
    gradients,
    copy_steps,
    tries,
    n,
    members,
    first_full,
    last_full,
    E: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Puts all columns of a tensor, and begins its next window."""
    row = tl.program_id(0).to(tl.int64)
    own = row  # the master, where there is one
    if HAS_MASTERS:
        own = row + n
    e = tl.arange(0, E)
    here, of_own, next_side = row * E + e, own * E + e, members * E
    ended, put_own = tl.load(now + here), tl.load(put + of_own)
    in_window, in_span = tl.load(writes + own), tl.load(writes + members + own)
    tail = tl.where((e * 0).to(tl.float32) + in_span > 0, tl.load(now + of_own) - put_own, 0.0)
    moved_own, applied_own = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    reached = tl.zeros((E,), tl.float32)
    out += row
    # the window's twelve, the span's twelve
    for i in tl.static_range(2):
        side, columns = i * next_side, out + i * 12 * n
        # of a window before which it was written, the first write ends a cycle
        cycles = in_span - 1
        if i == 0:
            cycles = in_window - (in_window == in_span).to(tl.float32)
        is_any = (e * 0).to(tl.float32) + cycles > 0
        applied_own = tl.where(is_any, tl.load(applied + side + of_own) - tail, 0.0)
        moved_own = tl.where(is_any, put_own - tl.load(since + side + of_own), 0.0)
        reached = tl.load(places + side + of_own).to(tl.float32)
        put_products(columns, n, applied_own, reached, moved_own, put_own)
        begun = tl.load(begin + side + here)
        moved = ended - begun
        tl.store(columns + 8 * n, tl.sum(moved * moved, 0))
        tl.store(columns + 9 * n, tl.load(writes + i * members + row))
        if HAS_MASTERS:
            begun_own = tl.load(begin + side + of_own)
            if i == 0:  # from before the first step
                begun, begun_own = tl.load(first + here), tl.load(first + of_own)
            put_copies(columns + 10 * n, n, begun, tl.load(held + here), begun_own, tl.load(held + of_own), KIND)
        else:
            tl.store(columns + 10 * n, 0.0)
            tl.store(columns + 11 * n, 0.0)
    out += 24 * n
    step_square = tl.load(squares + row)
    tl.store(out, step_square)
    tl.store(out + n, step_square - tl.load(earlier + row))
    tl.store(out + 2 * n, in_span)
    tl.store(out + 3 * n, tl.sum(moved_own * moved_own, 0))
    way = across(moved_own, put_own)
    tl.store(out + 4 * n, tl.sum(way * way, 0))
    tl.store(out + 5 * n, tl.load(squares + own))
    tl.store(out + 6 * n, tl.load(squares + members + row))
    stored = tl.load(begin + here)
    tl.store(out + 7 * n, tl.sum(stored * stored, 0))
    tl.store(out + 8 * n, tl.sum((ended - stored == 0).to(tl.float32), 0))
    tl.store(out + 9 * n, tl.load(last_write + own))
    tl.store(out + 10 * n, tl.load(signature + own))
    tl.store(out + 11 * n, tl.load(gradients + row))
    tl.store(out + 12 * n, tl.load(gradients + n + row))
    out += 13 * n
    is_full = first_full < last_full  # the masters', or the model's
    value = tl.load(begin + (first_full + row) * E + e, mask=(e * 0 + is_full.to(tl.int32)) > 0, other=0.0)
    end = tl.load(now + (first_full + row) * E + e, mask=(e * 0 + is_full.to(tl.int32)) > 0, other=0.0)
    low = rounded(value, 0)
    is_coarse = tl.min((low == value).to(tl.int32), 0) > 0
    # a value counts where none before it is the same
    is_same = (value[:, None] == value[None, :]) & (e[None, :] < e[:, None])
    different = tl.sum((tl.max(is_same.to(tl.int32), 1) == 0).to(tl.float32), 0)
    tl.store(out, tl.where(is_full, tl.load(copy_steps + row), 0.0))
    tl.store(out + n, tl.where(is_full, tl.sum((low != rounded(end, 0)).to(tl.float32), 0), 0.0))
    tl.store(out + 2 * n, tl.where(is_full, tl.where(is_coarse, different, 0.0), 0.0))
    is_touched = tl.abs(applied_own) > NOISE * tl.abs(tail)
    is_other = is_touched & (reached != 2.0) & (reached != 3.0)
    up, down = is_touched & (moved_own > applied_own), is_touched & (moved_own < applied_own)
    is_one_sided = (tl.max(up.to(tl.int32), 0) == 0) | (tl.max(down.to(tl.int32), 0) == 0)
    is_one_sided = is_one_sided & (tl.max(is_other.to(tl.int32), 0) == 0)
    tl.store(out + 3 * n, tl.sum(is_touched.to(tl.float32), 0))
    tl.store(out + 4 * n, is_one_sided.to(tl.float32))
    for i in tl.static_range(4):
        tl.store(out + (5 + i) * n, tl.load(tries + i * members + own))
    tl.debug_barrier()  # all that is overwritten now has been read
    for k in tl.static_range(1 + HAS_MASTERS):
        at = row + k * n
        tl.store(earlier + at, tl.load(squares + at))
        last, latest_put = tl.load(now + at * E + e), tl.load(put + at * E + e)
        has_begun = (e * 0).to(tl.float32) + tl.load(writes + members + at) > 0
        tl.store(begin + at * E + e, last)
        tl.store(since + at * E + e, latest_put)
        tl.store(applied + at * E + e, tl.where(has_begun, last - latest_put, 0.0))
        tl.store(places + at * E + e, tl.zeros((E,), tl.int8))
        tl.store(writes + at, 0.0)
        tl.store(squares + members + at, 0.0)
    if is_full:
        tl.store(copy_steps + row, 0.0)
