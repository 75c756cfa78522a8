"""Number formats as values: where the stored numbers lie, and what rounding does between them.

A format is its bits; every limit is computed from them. The tensor methods take and return
FP32, the format all sampled values are widened to (exact for every format here). They are pure
arithmetic: no value leaves the device, no branch depends on one, a handful of operators each,
because `Format.half_gap` runs within the training step.

How the spacing is read off: an FP32 number 2**e * 1.xxx holds e in the eight bits of mask
0x7f800000. With all other bits zero it reads 2**e, the power of two at or below |w|. A format
with m mantissa bits has 2**m numbers from 2**e to 2**(e+1), hence the gap (ulp) 2**e * 2**-m.
From the smallest normal number down to zero the gap stays what it is there, so e is held at or
above the format's smallest exponent. Among non-negative floats the order of the bits, read as an
integer, is the order of the values, so an integer clamp does that.

In torch's flush-to-zero mode (`torch.set_flush_denormal`) gaps under 2**-126 read as zero, as
any FP32 number that small does.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)  # of 16 bits: what most of what is lost is lost in
# per dtype: the integers of its width, its mantissa bits, exponent bias and smallest exponent
_LAYOUTS = {
    torch.float32: (torch.int32, 23, 127, -126),
    torch.float64: (torch.int64, 52, 1023, -1022),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Example: `BF16.half_gap(w, d)`: an update d smaller than this leaves the stored w as it is.
    """

    name: str  # "bfloat16", torch's name for it
    exponent_bits: int
    mantissa_bits: int  # stored ones: without the leading 1
    dtype: torch.dtype
    has_infinity: bool = True
    """False ("fn"): the top exponent holds numbers too, save the last one, which is NaN. What is
    too large becomes the largest number, as in the casts of torch 2.13 (older torch: NaN)."""

    def __str__(self) -> str:
        return self.name

    @property
    def precision(self) -> int:
        """Significant bits, the leading 1 included."""
        return self.mantissa_bits + 1

    @property
    def epsilon(self) -> float:
        """Gap above 1.0, as in `torch.finfo(dtype).eps`."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding to nearest: half of `epsilon`."""
        return self.epsilon / 2

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number."""
        return (1 << (self.exponent_bits - 1)) - (1 if self.has_infinity else 0)

    @property
    def min_normal(self) -> float:
        """Smallest positive number with full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number; also the gap everywhere below `min_normal`."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def max(self) -> float:
        """Largest finite number."""
        gaps_to_next_binade = 1 if self.has_infinity else 2  # "fn": all ones is NaN
        return math.ldexp(2.0 - gaps_to_next_binade * self.epsilon, self.max_exponent)

    def ulp(self, w: Tensor) -> Tensor:
        """Gap from `w` to the next number away from zero.

        `w`: FP32, any shape. Returns FP32 of the same shape; infinite where `w` is not finite.
        """
        return _binade(w, self.min_exponent).mul_(self.epsilon)

    def half_gap(self, w: Tensor, d: Tensor) -> Tensor:
        """Half of the gap from the stored value `w` to its neighbour on the side of `d`.

        An update smaller than this is lost; one that equals it, if the last bit of `w` is 0.
        At zero it is half of the smallest subnormal; at the largest number, outwards, half of
        the gap there. Only the sign of `d` is read.

        `w`, `d`: FP32, one shape; `w` holds numbers of this format. Returns FP32 of that shape;
        exact, with one exception: FP32's own half gaps below |w| = 2**-125 are 2**-150, which
        FP32 cannot hold, and read 2**-149 (no update lies between the two). Where `w` is not
        finite the result is infinite or above 2**100.
        """
        # Towards zero from a power of two the gap is the one of the binade below. One FP32 number
        # towards zero, w is in the binade of that gap, whether it is a power of two or not: its
        # neighbour in this format is at least as far. Where d points away from zero,
        # copysign(w, d) is w and nextafter stays; elsewhere it is -w, and nextafter moves one.
        nudged = torch.nextafter(w, torch.copysign(w, d))
        return _binade(nudged, self.lowest_exponent).mul_(self.unit_roundoff)

    @property
    def lowest_exponent(self) -> int:
        """Below which half gaps stay what they are: where they, 2**e * 2**-(m+1), do not drop under FP32's 2**-149."""
        return max(self.min_exponent, -149 + self.mantissa_bits + 1, -126)

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to nearest in this format, ties to even.

        `x`: FP32 or FP64, any shape. Returns FP32 of the same shape. Too large becomes infinite
        (without infinities: the largest number). FP64 is rounded once; torch's casts from FP64
        go by way of FP32 and round twice.
        """
        if x.dtype == torch.float32:
            return x.to(self.dtype).to(torch.float32)
        # x / gap is exact, as the gap is a power of two, and round() takes ties to even; the gap
        # is held at the largest exponent so that infinity / gap stays infinity
        gap = _binade(x, self.min_exponent, self.max_exponent).mul_(self.epsilon)
        rounded = torch.round(x / gap).mul_(gap)
        if self.has_infinity:
            rounded = rounded.masked_fill(rounded > self.max, math.inf).masked_fill(rounded < -self.max, -math.inf)
        else:
            rounded = rounded.clamp(-self.max, self.max)
        return rounded.to(torch.float32)

    def absorbs(self, w: Tensor, d: Tensor) -> Tensor:
        """Whether the exact sum `w + d`, rounded to nearest in this format, is `w` again.

        `w`, `d`: FP32, one shape; `w` holds numbers of this format. Returns booleans of that
        shape. True where `d` is 0, or `w` infinite and `d` finite; False where a NaN is involved.
        """
        # Where the FP32 sum is w the one in a coarser format is too: its half gaps are larger.
        # This settles infinities, NaN, saturation, and FP32 itself, whose sums IEEE 754 rounds so.
        total = w + d
        same = (total if self.has_infinity else total.clamp(-self.max, self.max)) == w
        if self.mantissa_bits == 23:
            return same
        size, half = d.abs(), self.half_gap(w, d)
        # a tie goes to the even one: w, if it is a multiple of two gaps
        even = torch.fmod(w, self.ulp(w).mul_(2)) == 0
        return same | ((size < half) & ~w.isnan()) | ((size == half) & even)


def _binade(x: Tensor, lowest: int, highest: int | None = None) -> Tensor:
    """2**floor(log2(|x|)) with the exponent held in lowest..highest; a new tensor of x's dtype."""
    integers, mantissa_bits, bias, smallest = _LAYOUTS[x.dtype]
    lowest = max(lowest, smallest)

    def bits(exponent: int) -> int:
        return (exponent + bias) << mantissa_bits

    power = x.view(integers) & bits(bias + 1)  # all exponent bits set
    power.clamp_(min=bits(lowest), max=None if highest is None else bits(highest))
    return power.view(x.dtype)


BF16 = Format("bfloat16", exponent_bits=8, mantissa_bits=7, dtype=torch.bfloat16)
FP16 = Format("float16", exponent_bits=5, mantissa_bits=10, dtype=torch.float16)
FP32 = Format("float32", exponent_bits=8, mantissa_bits=23, dtype=torch.float32)
FP8_E4M3 = Format("float8_e4m3fn", exponent_bits=4, mantissa_bits=3, dtype=torch.float8_e4m3fn, has_infinity=False)
FP8_E5M2 = Format("float8_e5m2", exponent_bits=5, mantissa_bits=2, dtype=torch.float8_e5m2)

ALL: tuple[Format, ...] = (BF16, FP16, FP32, FP8_E4M3, FP8_E5M2)
_BY_DTYPE = {format.dtype: format for format in ALL}


def of(dtype: torch.dtype) -> Format | None:
    """The format of a torch dtype; None for those without one here (float64, integers, ...)."""
    return _BY_DTYPE.get(dtype)
