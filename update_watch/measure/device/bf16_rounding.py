"""Rounding to BF16 within kernels, in integers: the same on every device, and in Triton's interpreter. Needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rounded_to_bf16(values):  # type: ignore[no-untyped-def]
    """FP32 values to the nearest of BF16, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(values == values, near.to(tl.float32, bitcast=True), values)  # of NaN the bits could become others
