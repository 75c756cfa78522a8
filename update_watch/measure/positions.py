"""Where in a tensor the samples lie: plain integer arithmetic from one number, so that a kernel can repeat it to the bit.

A tensor of `numel` elements, in memory order, is divided into cells of B = `block` neighbours (B divides `numel`, so there
is no rest). Two sets of nb = `blocks` cells are read in a measured step: the *kept* set stays where it is for a window, so
that what its elements were meant to move by can be added up over steps; the *moving* set goes on by a Weyl sequence. A set
at turn t (0, 1, 2, ...; goes on over windows) has

    share  = (phase + t * 2654435769) mod 2^32                       2^32 times the golden section; unsigned 32 bits
    offset = (share * room) >> 32                                    in 64 bits; 0 .. room - 1, in cells
    block b begins at element  B * (b * step + offset)               b = 0 .. nb - 1
    sample k of the set is element  B * ((k // B) * step + offset) + k % B

and the K = 2 nb B samples of a row are the kept set's, then the moving set's. `step` and `room` are cells:
room = cells - (nb - 1) step, step <= cells / nb. Rows that are measured together have one phase.

**Every element is met equally often.** Offsets are evenly spread over 0 .. room - 1. As room >= step, every cell c is
reached: by each pair (b, offset) with b * step + offset = c, and where room > step some cells are reached by several. There
are m(c) such pairs; a block at c is given the weight 1 / m(c), so over a sweep each cell is counted 1 / room times, the
first and the last as any other. For block b at offset o: block b - i is at the same cell with offset o + i step, which is
an offset for i <= b and i <= (room - 1 - o) / step; block b + i with offset o - i step for i <= nb - 1 - b and i <= o / step:

    m = 1 + min(o // step, nb - 1 - b) + min((room - 1 - o) // step, b)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

GOLDEN = 2654435769
SHARES = 2**32
_LARGEST_BLOCK = 16  # neighbours: a whole sector of memory in 16-bit formats
GOLDEN_SECTION = (math.sqrt(5) - 1) / 2


class Positions(NamedTuple):
    """The integers that one tensor's positions are made of; see the top of the file."""

    numel: int
    block: int
    blocks: int  # of one set
    step: int
    room: int

    def offset(self, share: int) -> int:
        """Cells before the first block of a set."""
        return (share * self.room) >> 32

    def starts(self, share: int) -> list[int]:
        """First elements of a set's blocks."""
        offset = self.offset(share)
        return [self.block * (b * self.step + offset) for b in range(self.blocks)]

    def multiplicities(self, share: int) -> list[int]:
        """m of each block of a set: its elements weigh 1 / m."""
        o = self.offset(share)
        left, right = o // self.step, (self.room - 1 - o) // self.step
        return [1 + min(left, self.blocks - 1 - b) + min(right, b) for b in range(self.blocks)]


@functools.lru_cache(1024)  # models repeat their shapes
def plan(numel: int, row: int, samples: int) -> Positions:
    """Positions of one set of `samples` elements in a tensor of more elements. `row`: length of its rows in memory."""
    most_block = min(math.isqrt(2 * samples), _LARGEST_BLOCK)
    block = max(b for b in range(1, most_block + 1) if samples % b == 0 and numel % b == 0)
    blocks, cells = samples // block, numel // block
    step = distance(cells, row, blocks, block)
    return Positions(numel, block, blocks, step, cells - (blocks - 1) * step)


def share(phase: int, turn: int) -> int:
    """Which part of their room, of 2^32, the offsets of a turn are at."""
    return (phase + turn * GOLDEN) % SHARES


@functools.lru_cache(1024)
def distance(cells: int, row: int, blocks: int, block: int) -> int:
    """Cells between the beginnings of two blocks.

    Large enough to span the tensor; within that, the blocks begin in different columns, evenly spread: a distance that
    shares factors with the row length would visit the same few columns.
    """
    most = cells // blocks
    least = max(most - most // 32, 1)
    shared = math.gcd(block, row)
    columns = row // shared  # in which a cell can begin
    if columns == 1 or most == least:
        return most
    shift = round(GOLDEN_SECTION * columns)
    while math.gcd(shift, columns) != 1:
        shift += 1
    # a distance of so many cells moves the column by the golden section
    wanted = shift * pow(block // shared, -1, columns) % columns
    distance = most - (most - wanted) % columns
    if distance >= least:
        return distance
    tried = range(most, least - 1, -max((most - least) // 64, 1))
    coprime = [d for d in tried if math.gcd(d, columns) == 1] or [most]
    moved = block // shared
    return min(coprime, key=lambda d: abs(abs(d * moved % columns / columns - 0.5) - (GOLDEN_SECTION - 0.5)))
