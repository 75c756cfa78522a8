"""Sample positions are integers from one number, and every element of a tensor weighs the same, the first and last as well."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from update_watch.measure.positions import SHARES, Positions, plan, share

# elements, row length, samples of a set: matrices, vectors, odd and prime sizes, barely more elements than samples
SHAPES = [
    (64 * 64, 64, 128),
    (256 * 32, 32, 1024),
    (8192 * 32, 32, 128),
    (50257 * 16, 16, 128),
    (50257, 50257, 128),
    (257, 257, 128),
    (272, 16, 128),
    (512 * 30, 30, 128),
    (1000 * 210, 210, 50),
    (3 * 10_007, 10_007, 128),
    (17, 17, 8),
    (9, 9, 1),
]


def shares_of_every_offset(p: Positions) -> list[int]:
    """One share for each offset: the lowest that reaches it."""
    return [-(-offset * SHARES // p.room) for offset in range(p.room)]


LARGE = {(8192 * 32, 32, 128), (50257 * 16, 16, 128), (1000 * 210, 210, 50)}  # ones of their kinds are among the others


@pytest.mark.parametrize(
    ("numel", "row", "samples"), [pytest.param(*s, marks=[pytest.mark.slow] * (s in LARGE)) for s in SHAPES]
)
def test_every_element_weighs_the_same_edges_included(numel: int, row: int, samples: int) -> None:
    p = plan(numel, row, samples)
    weight = np.zeros(numel + 1)
    for at in shares_of_every_offset(p):
        for start, m in zip(p.starts(at), p.multiplicities(at), strict=True):
            assert 0 <= start and start + p.block <= numel
            weight[start] += 1 / m
            weight[start + p.block] -= 1 / m
    met = np.cumsum(weight[:-1])
    assert met == pytest.approx(np.ones(numel), abs=1e-9)


@pytest.mark.parametrize(("numel", "row", "samples"), SHAPES)
def test_a_weight_counts_the_ways_in_which_a_place_is_reached(numel: int, row: int, samples: int) -> None:
    p = plan(numel, row, samples)
    if p.room * p.blocks > 300_000:
        pytest.skip("every pair is counted")
    shares = shares_of_every_offset(p)
    ways = Counter(start for at in shares for start in p.starts(at))
    for at in shares:
        assert p.multiplicities(at) == [ways[start] for start in p.starts(at)]


def test_offsets_are_the_room_times_the_share_of_the_turn() -> None:
    """As a kernel computes them: 64-bit integers, unsigned 32-bit wrap."""
    p = plan(4096 * 4096, 4096, 128)
    for phase in (0, 1, 123456789, SHARES - 1):
        for turn in (0, 1, 2, 77, 10**6, 10**9):
            at = int((np.uint64(phase) + np.uint64(turn) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF))
            assert share(phase, turn) == at
            assert p.offset(at) == int((np.int64(at) * np.int64(p.room)) >> np.int64(32))
            assert p.offset(at) == int(Fraction(at, SHARES) * p.room)


@pytest.mark.parametrize(("numel", "row", "samples"), [(256 * 64, 64, 128), (50_000, 50_000, 128), (129 * 33, 33, 128)])
def test_turns_sweep_the_tensor_more_evenly_than_chance(numel: int, row: int, samples: int) -> None:
    p = plan(numel, row, samples)
    met = np.zeros(p.room)
    for turn in range(16 * p.room):
        met[p.offset(share(12345, turn))] += 1
    # 16 times each; offsets drawn at random would differ by 4 (one standard deviation)
    assert met.std() < 1.5 and met.min() >= 13 and met.max() <= 19


@pytest.mark.parametrize("row", [16, 64, 768, 1024, 4096, 30, 210])
def test_blocks_begin_in_different_columns(row: int) -> None:
    p = plan(512 * row, row, 128)
    columns = row // np.gcd(row, p.block)  # in which a cell can begin
    for turn in range(30):
        starts = {start % row for start in p.starts(share(99, turn))}
        assert len(starts) == min(p.blocks, columns)


def test_a_block_divides_the_tensor() -> None:
    assert plan(50257 * 768, 768, 128).block == 16
    assert plan(50257, 50257, 128).block == 1  # a prime
    assert plan(1000, 10, 128).block == 8
