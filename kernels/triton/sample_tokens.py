"""sample_tokens on a GPU: one read of the logits without a filter, three with one; nothing is sorted.

    row      | tile 0 | tile 1 | ... |        one program per tile, also of a single long row

A program computes its tile's statistics, or samples from it, or both; _gumbel.py merges the tiles. With a filter the
statistics come first. Then _filters.py finds each row's cutoff, and a third read samples from the kept tokens; it skips
tiles that have none.

Floor: one read of the logits, and about 60 operations per token that may be sampled. The tiles of a row depend only on
the size of the vocabulary: a row has the same bits in any batch.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import _filters as filters
from rlhf_fast.kernels.triton import _gumbel as gumbel
from rlhf_fast.kernels.triton import launch

TILE = 2048  # tokens of a program
MAX_VOCAB = 2**31 - 2**20  # columns are int32


class Noise(NamedTuple):
    """The rows' keys of the noise, or the noise itself (B, V)."""

    row_ids: Tensor
    steps: Tensor
    gumbel: Tensor | None
    gumbel_stride: int
    device_seed: Tensor | None = None
    """(1,) int64 that replaces the seed."""


@triton.jit(do_not_specialize=["seed", "stride"])
def sample_tokens_kernel(
    logits, banned, ban_rows, cutoff_logits, cutoff_tokens, temperature, seed, noise, parts, tile_tokens,
    row_stride, stride, V, tiles,
    STATISTICS: tl.constexpr, SAMPLES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the statistics of the program's tile, if STATISTICS, and its best token, if SAMPLES."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles + tl.arange(0, 1)
    first = ((program % tiles) * TILE).to(tl.int32)
    column = first + tl.arange(0, TILE)
    inside = column < V
    exists = tl.full((1,), True, tl.int1)
    inverse, is_greedy = gumbel.inverse_temperature(temperature, row, exists)
    part = parts + program + tl.arange(0, 1)
    if cutoff_logits is not None:
        cutoff = tl.load(cutoff_logits + row)
        inside = inside & (tl.load(part + gumbel.LARGEST * stride) >= cutoff)
    index = row[:, None] * row_stride + column[None, :]
    x = tl.load(logits + index, mask=inside[None, :], other=float("-inf")).to(tl.float32)
    if STATISTICS:
        base = gumbel.store_statistics(part, stride, x, inverse, exists, temperature is not None)
    if banned is not None:
        x = filters.mask_banned(x, banned, ban_rows, row, column, inside)
    if cutoff_logits is not None:
        is_tie_behind = (x == cutoff[:, None]) & (column[None, :] > tl.load(cutoff_tokens + row)[:, None])
        x = tl.where((x < cutoff[:, None]) | is_tie_behind, float("-inf"), x)
    if cutoff_logits is not None or banned is not None:
        base = gumbel.store_kept_mass(part, stride, x, inverse, exists)
    has_kept = True
    if cutoff_logits is not None:
        has_kept = tl.max(tl.max(x, axis=1), axis=0) > float("-inf")
    if SAMPLES and has_kept:
        if noise.gumbel is None:
            row_id = tl.load(noise.row_ids + row)
            step = tl.load(noise.steps + row)
            word = gumbel.philox_words(gumbel.load_seed(seed, noise), row_id, step, first, 1, TILE)
            score, token = gumbel.gumbel_argmax(x, base, inverse, is_greedy, word, True)
        else:
            index = row[:, None] * noise.gumbel_stride + column[None, :]
            given = tl.load(noise.gumbel + index, mask=inside[None, :], other=0.0)
            scores = (x - base[:, None]) * inverse[:, None] + tl.where(is_greedy, 0.0, given)
            score = tl.max(scores, axis=1)
            token = gumbel.first_column(scores, score)
        token += first
        logit = tl.load(logits + row * row_stride + token, mask=token < V, other=0.0).to(tl.float32)
        gumbel.store_best(part, tile_tokens + program + tl.arange(0, 1), stride, score, token, logit, exists)


def sample_rows(
    logits: Tensor, options: gumbel.RowOptions, seed: int, noise: Noise, banned: Tensor | None = None,
    ban_rows: Tensor | None = None, outputs: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the outputs of sample_tokens, stored in `outputs` if it is given.

    banned (V,): not 0 for tokens that rows in `ban_rows` (B,) may not sample."""
    V = logits.shape[1]
    tile = launch.block_size(V, TILE)
    tiles = triton.cdiv(V, tile)
    parts, tile_tokens = gumbel.empty_parts(logits, tiles)
    is_filtered = any(x is not None for x in options.filters)

    def run_kernel(cutoffs: tuple[Tensor | None, Tensor | None], statistics: bool, samples: bool) -> None:
        inputs = (logits, banned, ban_rows, *cutoffs, options.temperature, seed, noise)
        sizes = (logits.stride(0), parts.stride(0), V, tiles)
        meta = {"STATISTICS": statistics, "SAMPLES": samples, "TILE": tile, "num_warps": launch.num_warps_for(tile, 16)}
        launch.run(sample_tokens_kernel, (tile_tokens.numel(),), *inputs, parts, tile_tokens, *sizes, **meta)

    run_kernel((None, None), True, not is_filtered)
    if is_filtered:
        run_kernel(filters.find_cutoffs(logits, options, banned, ban_rows, parts), False, True)
    has_kept = is_filtered or banned is not None
    return gumbel.merge_tiles(parts, tile_tokens, ban_rows, options, V, has_kept, outputs)


def sample_tokens(logits, temperature, top_k, top_p, min_p, seed, row_ids, steps, noise):
    launch.require_dtypes(logits)
    if logits.shape[1] > MAX_VOCAB:
        raise Unsupported(f"no Triton kernel for a vocabulary of {logits.shape[1]}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    options = gumbel.RowOptions(*contiguous(temperature, top_k, top_p, min_p))
    row_ids, steps, noise = contiguous(row_ids, steps, noise)
    stride = 0 if noise is None else noise.stride(0)
    return sample_rows(logits, options, seed, Noise(row_ids, steps, noise, stride))
