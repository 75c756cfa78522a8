"""Formats against torch's own casts, over every number of every small format."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from update_watch import formats
from update_watch.formats import BF16, FP8_E4M3, FP8_E5M2, FP16, FP32, Format

SMALL = [BF16, FP16, FP8_E4M3, FP8_E5M2]
small = pytest.mark.parametrize("fmt", SMALL, ids=str)
every = pytest.mark.parametrize("fmt", formats.ALL, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than they save on tensors of this size: seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def all_values(fmt: Format) -> Tensor:
    """Every bit pattern of a format, widened to FP32 by torch: infinities, NaN and -0 included."""
    if fmt.dtype.itemsize == 1:
        bits = torch.arange(256, dtype=torch.uint8)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    return bits.view(fmt.dtype).to(torch.float32)


def finite_values(fmt: Format) -> Tensor:
    """Every finite number of a format once, in FP64, ascending, -0 left out."""
    values = all_values(fmt).double()
    return values[values.isfinite()].unique()


def cast(fmt: Format, x: Tensor) -> Tensor:
    """What torch stores, in FP64. Only for x that FP32 holds: torch casts FP64 in two roundings."""
    assert torch.equal(x, x.float().double()), "the test's own numbers must be exact in FP32"
    return x.float().to(fmt.dtype).double()


def neighbour_gaps(fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Every finite number with its exact gaps downwards and upwards, FP64; beyond the ends as within."""
    values = finite_values(fmt)
    gaps = values.diff()
    return values, torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])


@every
def test_limits_are_those_torch_states(fmt: Format) -> None:
    info = torch.finfo(fmt.dtype)
    assert (fmt.max, fmt.epsilon, fmt.min_normal) == (info.max, info.eps, info.smallest_normal)
    assert 1 + fmt.exponent_bits + fmt.mantissa_bits == info.bits
    lowest_bit = torch.tensor(1, dtype={8: torch.int8, 16: torch.int16, 32: torch.int32}[info.bits])
    assert fmt.min_subnormal == lowest_bit.view(fmt.dtype).item()
    assert fmt.unit_roundoff == fmt.epsilon / 2 == 2.0**-fmt.precision
    assert str(fmt) == str(fmt.dtype).removeprefix("torch.")


def test_formats_are_found_by_dtype_and_unknown_ones_are_none() -> None:
    assert [formats.of(fmt.dtype) for fmt in formats.ALL] == list(formats.ALL)
    assert [formats.of(dtype) for dtype in (torch.float64, torch.int8, torch.complex64)] == [None, None, None]


@small
def test_half_gap_is_half_the_way_to_the_neighbour_for_every_number(fmt: Format) -> None:
    values, down, up = neighbour_gaps(fmt)
    w = values.float()
    assert torch.equal(fmt.half_gap(w, torch.full_like(w, 1e-30)).double(), up / 2)
    assert torch.equal(fmt.half_gap(w, torch.full_like(w, -1e-30)).double(), down / 2)


@small
def test_ulp_is_the_gap_away_from_zero_for_every_number(fmt: Format) -> None:
    values, down, up = neighbour_gaps(fmt)
    assert torch.equal(fmt.ulp(values.float()).double(), torch.where(values < 0, down, up))


@small
def test_half_gap_of_either_zero_is_half_the_smallest_subnormal(fmt: Format) -> None:
    w = torch.tensor([0.0, 0.0, -0.0, -0.0])
    d = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert fmt.half_gap(w, d).tolist() == [fmt.min_subnormal / 2] * 4


def test_half_gap_worked_by_hand() -> None:
    # BF16 has 7 mantissa bits: from 1 up the gap is 2**-7, below 1 it is 2**-8
    w = torch.tensor([1.0, 1.0, -1.0, 1.5, 256.0])
    d = torch.tensor([+1.0, -1.0, +1.0, -1.0, +1.0])
    assert BF16.half_gap(w, d).tolist() == [2.0**-8, 2.0**-9, 2.0**-9, 2.0**-8, 1.0]


def fp32_values() -> Tensor:
    """Every binade of FP32 at its edges and within, both signs, subnormals included."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    starts = torch.exp2(exponents)
    gaps = torch.exp2((exponents - 23).clamp_min(-149))
    w = torch.cat([starts, starts + gaps, starts + 3 * gaps, starts * 1.5, 2 * starts - gaps, torch.zeros(1).double()])
    w = w.float().double().unique()
    return torch.cat([w, -w])


def test_half_gap_and_ulp_of_fp32_agree_with_nextafter() -> None:
    w64 = fp32_values()
    w = w64.float()
    up = torch.nextafter(w, torch.tensor(math.inf)).double() - w64
    up = torch.where(up.isinf(), 2.0**104, up)  # beyond the largest number
    down = w64 - torch.nextafter(w, torch.tensor(-math.inf)).double()
    down = torch.where(down.isinf(), 2.0**104, down)
    # half of the smallest gap, 2**-150, is no FP32 number: documented to read 2**-149
    assert torch.equal(FP32.half_gap(w, torch.ones_like(w)).double(), (up / 2).clamp_min(2.0**-149))
    assert torch.equal(FP32.half_gap(w, -torch.ones_like(w)).double(), (down / 2).clamp_min(2.0**-149))
    assert torch.equal(FP32.ulp(w).double(), torch.where((w64 < 0), down, up))


@every
def test_numbers_that_are_not_finite_have_no_finite_gap(fmt: Format) -> None:
    w = torch.tensor([math.inf, -math.inf, math.nan])
    assert fmt.ulp(w).tolist() == [math.inf] * 3
    for sign in (1.0, -1.0):
        assert (fmt.half_gap(w, torch.full_like(w, sign)) > 2.0**100).all()


def around_every_tie(fmt: Format) -> Tensor:
    """Every number, every midpoint, and the FP32 numbers next to both, in FP64."""
    values, _, up = neighbour_gaps(fmt)
    x = torch.cat([values, values + up / 2]).float()  # exact: one bit more than the format has
    inf = torch.tensor(math.inf)
    return torch.cat([x, torch.nextafter(x, inf), torch.nextafter(x, -inf)]).double()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, the sign of zero included."""
    return torch.equal(a.double(), b.double()) and torch.equal(a.signbit(), b.signbit())


@small
def test_rounding_fp64_and_fp32_agrees_with_torchs_cast_around_every_tie(fmt: Format) -> None:
    x = torch.cat([around_every_tie(fmt), torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, -3e38]).double()])
    assert same(fmt.round(x), cast(fmt, x))
    assert same(fmt.round(x.float()), cast(fmt, x))
    assert fmt.round(x).dtype == fmt.round(x.float()).dtype == torch.float32


@every
def test_rounding_keeps_nan(fmt: Format) -> None:
    assert fmt.round(torch.tensor([math.nan])).isnan().all()
    assert fmt.round(torch.tensor([math.nan]).double()).isnan().all()


@small
def test_every_number_rounds_to_itself(fmt: Format) -> None:
    x = finite_values(fmt)
    assert torch.equal(fmt.round(x).double(), x)


@small
def test_ties_go_to_the_number_whose_last_bit_is_0(fmt: Format) -> None:
    values = finite_values(fmt)
    low, high = values[:-1], values[1:]
    bits = torch.int8 if fmt.dtype.itemsize == 1 else torch.int16
    low_is_even = (low.float().to(fmt.dtype).view(bits) & 1) == 0
    assert torch.equal(fmt.round((low + high) / 2).double(), torch.where(low_is_even, low, high))


@every
def test_rounding_from_fp64_happens_once(fmt: Format) -> None:
    # a hair above the tie between 1 and 1 + epsilon: rounded by way of FP32 the hair is gone
    x = torch.tensor([1 + fmt.epsilon / 2 + 2.0**-50, 1 + fmt.epsilon / 2 - 2.0**-50], dtype=torch.float64)
    assert fmt.round(x).tolist() == [1 + fmt.epsilon, 1.0]


def test_rounding_fp64_to_fp32_agrees_with_torchs_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, dtype=torch.float64, generator=generator)
    x *= torch.exp2(torch.randint(-160, 130, x.shape, generator=generator).double())
    assert same(FP32.round(x), x.float())


def exactly_absorbed(fmt: Format, w: Tensor, d: Tensor) -> Tensor:
    """The slow twin: w + d exactly in FP64, then to the format by torch.

    FP64 holds every sum made below; FP32 need not, so round to odd on the way (a last bit of 1
    stands for "and something more"), which leaves the second rounding exact: Boldo and
    Melquiond, "When double rounding is odd" (2005).
    """
    total = w + d
    assert torch.equal(total - w, d) and torch.equal(total - d, w), "the test's own sums must be exact in FP64"
    near = total.float()
    toward = torch.where(total > near.double(), math.inf, -math.inf).float()
    beyond = torch.nextafter(near, toward)
    is_odd = (near.view(torch.int32) & 1) == 1
    odd = torch.where((near.double() == total) | is_odd, near, beyond)
    return odd.to(fmt.dtype).double() == w


@small
def test_absorbs_agrees_with_exact_sums_at_and_beside_every_half_gap(fmt: Format) -> None:
    values, down, up = neighbour_gaps(fmt)
    for gap, sign in ((up, 1.0), (down, -1.0)):
        for share in (0.0, 0.25, 0.5 - 2.0**-20, 0.5, 0.5 + 2.0**-20, 0.75, 1.0, 1.5):
            d = sign * share * gap
            fits = d == d.float().double()  # BF16's smallest gaps leave no room for finer shares
            assert fits.sum() > 0.9 * len(d)
            w, d = values[fits], d[fits]
            wrong = fmt.absorbs(w.float(), d.float()) != exactly_absorbed(fmt, w, d)
            assert not wrong.any(), (share, sign, w[wrong][:5], d[wrong][:5])


@small
def test_absorbs_agrees_with_exact_sums_for_random_updates(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(1)
    w = finite_values(fmt)
    w = w[(w.abs() >= 2.0**-100) & (w.abs() < 2.0**100)]
    size = torch.exp2(torch.rand(w.shape, generator=generator, dtype=torch.float64) * 20 - fmt.mantissa_bits - 16)
    sign = torch.randint(0, 2, w.shape, generator=generator) * 2 - 1
    d = (w.abs() * size * sign).float().double()
    fits = (w + d) - w == d
    w, d = w[fits], d[fits]
    assert len(w) > 100
    absorbed = fmt.absorbs(w.float(), d.float())
    assert torch.equal(absorbed, exactly_absorbed(fmt, w, d))
    assert 0.2 < absorbed.float().mean() < 0.9


def test_absorbs_in_fp32_agrees_with_exact_sums() -> None:
    w = fp32_values()
    w = w[w.abs() <= 2.0**126]
    for share in (0.25, 0.5, 0.5 + 2.0**-20, 0.75, 1.0):
        for sign in (1.0, -1.0):
            d = (sign * share * FP32.ulp(w.float()).double()).float().double()
            assert torch.equal(FP32.absorbs(w.float(), d.float()), (w + d).float().double() == w)


@every
def test_absorbs_is_sane_for_zero_updates_infinities_and_nan(fmt: Format) -> None:
    inf, nan = math.inf, math.nan
    cases = {
        (1.0, 0.0): True,
        (0.0, 0.0): True,
        (1.0, inf): False,
        (1.0, -inf): False,
        (1.0, nan): False,
        (nan, 0.0): False,
        (nan, 1.0): False,
        (nan, inf): False,
        (nan, nan): False,
    }
    if fmt.has_infinity:
        cases |= {(inf, 1.0): True, (inf, -3e38): True, (-inf, 3e38): True, (inf, inf): True, (inf, -inf): False}
    w, d = torch.tensor(list(cases)).T
    assert fmt.absorbs(w, d).tolist() == list(cases.values())


@every
def test_nothing_is_written_to_the_arguments_and_any_shape_and_stride_will_do(fmt: Format) -> None:
    w = fmt.round(torch.linspace(-2, 2, 24).reshape(4, 6)).T  # not contiguous
    d = torch.linspace(1e-4, -1e-3, 24).reshape(6, 4)
    before = w.clone(), d.clone()
    for method in (fmt.half_gap, fmt.absorbs):
        whole = method(w, d)
        assert whole.shape == w.shape
        single = [method(a, b).item() for a, b in zip(w.flatten(), d.flatten(), strict=True)]  # 0-dim
        assert whole.flatten().tolist() == single
    fmt.ulp(w), fmt.round(w), fmt.round(w.double())
    assert torch.equal(w, before[0]) and torch.equal(d, before[1])


@every
def test_arithmetic_runs_without_looking_at_a_value(fmt: Format) -> None:
    # meta tensors have no values: a host read or a shape that depends on values raises
    w, d = torch.empty(3, 5, device="meta"), torch.empty(3, 5, device="meta")
    results = [fmt.half_gap(w, d), fmt.ulp(w), fmt.round(w), fmt.round(w.double()), fmt.absorbs(w, d)]
    assert [r.shape for r in results] == [w.shape] * 5
    assert [r.device.type for r in results] == ["meta"] * 5
