"""sample_tokens on a GPU: one visit of the logits without a filter, three with one; nothing is sorted.

A program takes one tile of one row, also of a single long row: its statistics and its draw, or only one of the two;
`_draw.py` joins the tiles. With a filter the statistics come first, then `_cut.py` finds the last token that each row's
filters keep, then a third visit draws from the tokens up to it, and passes by the tiles that have none.

Floor: the logits once from memory, here about 60 operations a token for one that may be drawn. How a row is tiled
follows from the size of the vocabulary alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels.triton import _filters as cut
from rlhf_fast.kernels.triton import _gumbel as draw
from rlhf_fast.kernels.triton import launch

TILE = 2048  # tokens a program


@triton.jit
def _visit(
    logits, banned, ban_rows, cut_logits, cut_tokens, temperature, row_ids, steps, noise, parts, tokens,
    seed, row_stride, noise_stride, stride, V, tiles, STATISTICS: tl.constexpr, DRAWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles + tl.arange(0, 1)
    first = ((program % tiles) * TILE).to(tl.int32)
    column = first + tl.arange(0, TILE)
    inside, on = column < V, tl.full((1,), True, tl.int1)
    inverse, greedy = draw.tempering(temperature, row, on)
    part = parts + program + tl.arange(0, 1)
    if cut_logits is not None:
        last = tl.load(cut_logits + row)
        inside = inside & (tl.load(part + draw.LARGEST * stride) >= last)
    at = row[:, None] * row_stride + column[None, :]
    x = tl.load(logits + at, mask=inside[None, :], other=float("-inf")).to(tl.float32)
    if STATISTICS:
        base = draw.put_statistics(part, stride, x, inverse, on, temperature is not None)
    if banned is not None:
        x = cut.without_banned(x, banned, ban_rows, row, column, inside)
    if cut_logits is not None:
        after = (x < last[:, None]) | ((x == last[:, None]) & (column[None, :] > tl.load(cut_tokens + row)[:, None]))
        x = tl.where(after, float("-inf"), x)
    if cut_logits is not None or banned is not None:
        base = draw.put_masses(part, stride, x, inverse, on)
    some = True
    if cut_logits is not None:
        some = tl.max(tl.max(x, axis=1), axis=0) > float("-inf")
    if DRAWS and some:
        if noise is None:
            word = draw.words(seed, tl.load(row_ids + row), tl.load(steps + row), first, 1, TILE)
            score, place = draw.race(x, base, inverse, greedy, word, True)
        else:
            at = row[:, None] * noise_stride + column[None, :]
            gumbel = tl.load(noise + at, mask=inside[None, :], other=0.0)
            scores = (x - base[:, None]) * inverse[:, None] + tl.where(greedy, 0.0, gumbel)
            score = tl.max(scores, axis=1)
            place = draw.first_column(scores, score)
        place += first
        logit = tl.load(logits + row * row_stride + place, mask=place < V, other=0.0).to(tl.float32)
        draw.put_draw(part, tokens + program + tl.arange(0, 1), stride, score, place, logit, on)


def sample(logits, temperature, top_k, top_p, min_p, seed, row_ids, steps, noise, banned=None, ban_rows=None, out=None):
    """sample_tokens; `banned` (V,) is not 0 where rows in `ban_rows` may not draw; `out` takes the outputs."""
    V, filters = logits.shape[1], (top_k, top_p, min_p)
    tile = launch.block_size(V, TILE)
    tiles = triton.cdiv(V, tile)
    parts, tokens = draw.empty_parts(logits, tiles)
    filtered = any(x is not None for x in filters)

    def visit(cuts: tuple[Tensor | None, Tensor | None], statistics: bool, draws: bool) -> None:
        launch.run(
            _visit,
            (tokens.numel(),),
            logits,
            banned,
            ban_rows,
            *cuts,
            temperature,
            row_ids,
            steps,
            noise,
            parts,
            tokens,
            seed,
            logits.stride(0),
            0 if noise is None else noise.stride(0),
            parts.stride(0),
            V,
            tiles,
            STATISTICS=statistics,
            DRAWS=draws,
            TILE=tile,
            num_warps=launch.num_warps_for(tile, 16),
        )

    visit((None, None), True, not filtered)
    if filtered:
        visit(cut.cuts(logits, temperature, *filters, banned, ban_rows, parts), False, True)
    return draw.finish(parts, tokens, ban_rows, temperature, *filters, V, filtered or banned is not None, out)


def sample_tokens(logits, temperature, top_k, top_p, min_p, seed, row_ids, steps, noise):
    launch.require_dtypes(logits)
    if logits.shape[1] > 2**31 - 2**20:
        raise Unsupported(f"no Triton kernel for a vocabulary of {logits.shape[1]}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    options = [x if x is None else x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    keys = [x if x is None else x.contiguous() for x in (row_ids, steps, noise)]
    return sample(logits, *options, seed, *keys)
