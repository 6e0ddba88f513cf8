"""gae on a GPU: one scan over rows, split where they are few. _scan.py has the scan and the picture of a tile.

Floor: 9 bytes read and 8 written per token; a token outside the mask costs only its mask. Split rows read all tiles but
their first twice.

One program per ROWS rows walks their tiles from right to left, and rows of up to 64 tokens share a warp. Split rows
have one program per tile. Both give the same bits, and a row's result depends on its own tokens alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._tensors import contiguous, empty_float32
from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch


class Tokens(NamedTuple):
    """Inputs with one element per token."""

    rewards: Tensor
    value: Tensor  # not `values`: tuples have an attribute of that name in Triton
    mask: Tensor


@triton.jit
def load_tile(tokens, start, length, tile, GROUPS: tl.constexpr):
    """Return which tokens of a tile are valid, their rewards and their values, each (ROWS, GROUPS, 4)."""
    column = scan.tile_columns(tile, GROUPS)
    inside = (column >= 0) & (column < length[:, None, None])
    index = start[:, None, None] + column
    valid, loaded = scan.load_mask(tokens.mask, index, inside)
    return valid, scan.load(tokens.rewards, index, loaded), scan.load(tokens.value, index, loaded)


@triton.jit
def scan_and_store(advantages, returns, valid, reward, value, carry, start, length, tile, gamma, decay):
    """Store a tile's outputs and return the carry that leaves each group."""
    valid, reward, value = scan.unpack4(valid), scan.unpack4(reward), scan.unpack4(value)
    advantage, carry = scan.scan_tile(valid, reward, value, carry, gamma, decay)
    scan.store_outputs(advantages, returns, valid, advantage, value, start, length, tile)
    return carry


@triton.jit
def first_carry(bootstrap, discount, row, exists, zero):
    """Return the carry that a row's last token receives: gamma times the value after it."""
    carry = zero
    gamma, decay = scan.row_discount(discount, row, exists)
    if bootstrap is not None:
        carry = gamma * scan.load_row(bootstrap, row, exists)
    return scan.reached_by_nan(carry, discount, decay)


@triton.jit(do_not_specialize=["B", "T"])
def gae_kernel(
    tokens, bootstrap, advantages, returns, B, T, discount,
    ALIGNED: tl.constexpr, SINGLE_TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Walk ROWS rows from right to left. The next tile is loaded while one is scanned."""
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row * T
    length = tl.where(row < B, T, 0)
    carry = first_carry(bootstrap, discount, row, row < B, tl.zeros((ROWS,), tl.float32))
    gamma, decay = scan.row_discount(discount, row[:, None], row[:, None] < B)
    last = tl.cdiv(T, 4 * GROUPS) - 1
    valid, reward, value = load_tile(tokens, start, length, last, GROUPS)
    if SINGLE_TILE:
        scan_and_store(advantages, returns, valid, reward, value, carry, start, length, last, gamma, decay)
    else:
        for i in range(0, last + 1):
            tile = last - i
            next_tile = load_tile(tokens, start, length, tile - 1, GROUPS)
            group_carry = scan_and_store(
                advantages, returns, valid, reward, value, carry, start, length, tile, gamma, decay
            )
            carry = scan.leftmost(group_carry)
            valid, reward, value = next_tile


@triton.jit(do_not_specialize=["size", "S", "T"])
def gae_tile_map_kernel(
    tokens, offsets, maps, size, S, T, discount,
    ALIGNED: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the map of the program's tile, unless it is the first tile of its row."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.locate_tile(offsets, S, T, 4 * GROUPS, PROBES, STEPS)
    if (tile > 0) & (tile * (4 * GROUPS) < length):
        zero = tl.zeros((1,), tl.int64)
        valid, reward, value = load_tile(tokens, start + zero, length + zero, tile, GROUPS)
        gamma, decay = scan.row_discount(discount, row, None)
        factor, total = scan.tile_map(scan.unpack4(valid), scan.unpack4(reward), scan.unpack4(value), gamma, decay)
        index = maps + tl.program_id(0) + zero
        tl.store(index, factor)
        tl.store(index + size, total)


@triton.jit(do_not_specialize=["size", "S", "T"])
def gae_apply_kernel(
    tokens, offsets, maps, bootstrap, advantages, returns, size, S, T, discount,
    ALIGNED: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the outputs of the program's tile, whose carry comes from the maps of the tiles right of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.locate_tile(offsets, S, T, 4 * GROUPS, PROBES, STEPS)
    zero = tl.zeros((1,), tl.int64)
    valid, reward, value = load_tile(tokens, start + zero, length + zero, tile, GROUPS)
    carry = first_carry(bootstrap, discount, row, None, tl.zeros((), tl.float32))
    gamma, decay = scan.row_discount(discount, row, None)
    if maps is not None:
        tiles = tl.cdiv(length, 4 * GROUPS).to(tl.int32)
        first = tl.program_id(0).to(tl.int64) - tile
        carry = scan.carry_into(maps, size, first, tile, tiles, carry)
    carry += tl.zeros((1,), tl.float32)
    scan_and_store(advantages, returns, valid, reward, value, carry, start + zero, length + zero, tile, gamma, decay)


def empty_outputs(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return new memory for advantages and returns, float32."""
    return empty_float32(rewards, *rewards.shape), empty_float32(rewards, *rewards.shape)


def gae_by_tile(tokens: Tokens, offsets, S, T, discount, bootstrap, groups, num_programs, needs_maps):
    """Return advantages and returns of rows (S, T), or of the segments between `offsets`, by one program per tile.

    num_programs: the largest possible number of tiles. needs_maps: whether a row may have more than one tile."""
    outputs = empty_outputs(tokens.rewards)
    maps = empty_float32(tokens.rewards, 2, num_programs) if needs_maps else None
    sizes = (num_programs, S, T)
    meta = {
        "ALIGNED": offsets is None and T % 4 == 0,
        "PROBES": scan.PROBES,
        "STEPS": scan.search_steps(S),
        "GROUPS": groups,
        "num_warps": 1,
    }
    grid = (num_programs,)
    if needs_maps:
        launch.run(gae_tile_map_kernel, grid, tokens, offsets, maps, *sizes, discount, **meta)
    launch.run(gae_apply_kernel, grid, tokens, offsets, maps, bootstrap, *outputs, *sizes, discount, **meta)
    return outputs


def gae(rewards, values, mask, gamma, lam, bootstrap):
    launch.require_dtypes(rewards, values, bootstrap)
    rewards, values, mask, bootstrap = contiguous(rewards, values, mask, bootstrap)
    tokens, discount = Tokens(rewards, values, mask), scan.discount_of("gae", gamma, lam)
    B, T = rewards.shape
    groups, rows, is_split = scan.tile_shape(rewards, B, T)
    tiles = triton.cdiv(T, scan.GROUP_SIZE * groups)
    if is_split:
        return gae_by_tile(tokens, None, B, T, discount, bootstrap, groups, B * tiles, needs_maps=True)
    outputs = empty_outputs(rewards)
    meta = {"ALIGNED": T % 4 == 0, "SINGLE_TILE": tiles == 1, "ROWS": rows, "GROUPS": groups, "num_warps": 1}
    grid = (triton.cdiv(B, rows) if T else 0,)
    launch.run(gae_kernel, grid, tokens, bootstrap, *outputs, B, T, discount, **meta)
    return outputs
