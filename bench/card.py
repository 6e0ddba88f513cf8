"""A model of an H100 SXM on paper: its rates, how many blocks an SM holds, and how long a launch takes.

A launch is bounded by the bytes that it moves, the instructions that it issues, the operations of its products, and its
waves: blocks that do not fit at once follow one another, and each waits for the loads of its loop. No kernel overlaps
these fully, so the bounds are joined by a norm: two equal ones give 1.41 of either. What nothing overlaps comes on top:
a block's visits of memory before its loop and after it. No number here is fitted to one kernel.
"""

import math
from typing import NamedTuple

NUM_SMS = 132  # properties in bench/results/nvidia-h100-80gb-hbm3-facts.json
CLOCK = 1.755e9  # Hz, under load; the facts' state says 1.905 to 1.98 while idle or just loaded
ISSUE_RATE = NUM_SMS * 4 * CLOCK  # warp instructions a second: 4 schedulers an SM, one each a cycle
SPECIAL_RATE = ISSUE_RATE / 8  # exp2, log2, conversions: 16 lanes an SM a cycle (CUDA's table of throughputs)
COPY_RATE = 3.006e12  # bytes a second, read and written; measured, the same facts
PRODUCT_RATE = 7.0e14  # bfloat16 FLOP a second of a head's products; measured, 6.93e14 to 7.22e14, the same facts
EMPTY_GRAPH = 3.3e-6  # seconds that the bench measures for a graph of one empty kernel, nvidia-h100-80gb-hbm3.md
NODE_GAP = 0.8e-6  # from one node of a graph to the next: (1.69 - 1.44) ms / 325 nodes of the measured decode step
LATENCY = 0.8e-6  # of a visit of memory: an elementwise kernel of few bytes, a load and a store, took 1.5 to 1.7 us
ISSUE_SHARE = 0.8  # of the cycles in which a scheduler finds a warp that is ready; an estimate
NORM = 2  # that joins bounds; chosen, of 1, 1.5, 2, 3 and 4, by the 46 measured rows, as is no other number here

WARP = 32
MAX_WARPS, MAX_BLOCKS = 64, 32  # of an SM, as the rest here: CUDA's tables for compute capability 9.0
REGISTERS, REGISTER_UNIT = 65536, 256  # a warp's registers are given in such units
SHARED_MEMORY, SHARED_RESERVED, SHARED_UNIT = 228 << 10, 1 << 10, 128  # bytes; each block takes the reserved ones too


class Work(NamedTuple):
    """All that a launch does: its bytes, warp instructions and operations, and how often a block waits for memory:
    in its streaming loop, and besides it."""

    num_bytes: float = 0.0
    instructions: float = 0.0
    special: float = 0.0  # instructions among them
    flops: float = 0.0
    rounds: float = 1.0
    visits: float = 2.0
    product_share: float = 1.0  # of the library's rate, at which its products run


class Shape(NamedTuple):
    """Blocks of a launch, and what a block takes of an SM: threads, registers of each, bytes of shared memory."""

    blocks: int
    threads: int
    registers: int
    shared: int

    @property
    def blocks_per_sm(self) -> int:
        """The number of blocks that an SM holds at once."""
        warps = -(-self.threads // WARP)
        registers = -(-max(self.registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
        shared = -(-self.shared // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
        by_registers = REGISTERS // registers // 4 * 4 // warps  # warps are bound to one of 4 schedulers
        return max(1, min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, SHARED_MEMORY // shared))

    @property
    def waves(self) -> float:
        """The number of times that the card is filled."""
        return self.blocks / (self.blocks_per_sm * NUM_SMS)


class Bounds(NamedTuple):
    """The seconds that each limit alone would take."""

    memory: float
    issue: float
    special: float
    products: float
    waves: float  # of blocks whose loads wait for one another
    start: float  # of the first block, and the end of the last: nothing overlaps them

    @property
    def seconds(self) -> float:
        return self.start + sum(bound**NORM for bound in self[:-1]) ** (1 / NORM)

    @property
    def limiter(self) -> str:
        return max(zip(self, self._fields, strict=True))[1]


def bounds(work: Work, shape: Shape | None) -> Bounds:
    """Return the bounds of a launch; without a shape, of a library's kernel, those that its work alone gives."""
    memory, products = work.num_bytes / COPY_RATE, work.flops / (PRODUCT_RATE * work.product_share)
    start = work.visits * LATENCY
    if shape is None:
        return Bounds(memory, 0.0, 0.0, products, 0.0, start)
    of_busiest = math.ceil(shape.blocks / NUM_SMS) * NUM_SMS / shape.blocks  # the busiest SM's share, over the mean
    issue = work.instructions / (ISSUE_RATE * ISSUE_SHARE) * of_busiest
    special = work.special / SPECIAL_RATE * of_busiest
    return Bounds(memory, issue, special, products, math.ceil(shape.waves) * work.rounds * LATENCY, start)


def seconds_of(found: list[Bounds]) -> float:
    """Return the seconds of a graph of launches that follow each other, as the bench measures them."""
    return EMPTY_GRAPH + sum(one.seconds for one in found) + NODE_GAP * (len(found) - 1)
