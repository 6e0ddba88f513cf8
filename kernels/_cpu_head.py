"""A linear head on the CPU: torch's matrix products on blocks of logits, our row kernels between them. Not an op.

The weight comes in blocks of columns of the vocabulary, the tokens in chunks of rows. Two orders:

    three products  a chunk's logits are kept until their statistics are known: X W', then dX and dW, which adds up over
                    the chunks, so that it needs a float32 tensor of the weight's size
    four products   all statistics first, then X W' once more, block by block: a block of dW is finished at once

Logits are float32. bfloat16 inputs become float32 a block at a time, and are exact there; where the processor has
bfloat16 products and there is enough to do, ours makes the logits, and torch's make dX and dW of the rounded gradient
of the logits (plain torch has no other), summed over blocks in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, stream_or_threads

KERNELS = ("head_begin", "head_statistics", "head_results", "head_gradient", "half_product")
KEPT_BYTES = 36 << 20  # of logits, in the order of three products; measured: fewer than 128 rows cost the products 20 %
BLOCK_BYTES = 8 << 20  # of logits, in the order of four: they should not leave the last cache
TILE = 1024  # of csrc/cpu/softmax.h: blocks of a multiple of it leave the results' bits as they are
COLUMNS = 4 * TILE
HALF_LEAST = 1 << 22  # logits, from which on bfloat16 products are taken
EMULATE_HALF = False  # for tests: take them, by ordinary arithmetic, on any processor


def even(total: int, most: int) -> list[tuple[int, int]]:
    """[0, total) in the fewest parts of at most `most`, of nearly one size."""
    parts = -(-total // max(most, 1))
    return [(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def floats(like: Tensor, *shape: int) -> Tensor:
    """New float32 memory beside `like`, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@functools.cache
def has_half_products(kernels: ModuleType) -> bool:
    try:
        kernels.half_product(0, 0, 0, 0, 0, 0, 0, 0, 0, False, 1)
    except RuntimeError:
        return False
    return True


class Head:
    """The rows of `hidden` whose targets are not ignored, and the weight they meet."""

    def __init__(self, kernels, name, hidden, weight, targets, bias=None, temperature=1.0, softcap=0.0):
        for x in (hidden, weight):
            if x.dtype not in (torch.float32, torch.bfloat16):
                raise Unsupported(f"{str(x.dtype)[6:]} has no compiled kernel")
        head.check_targets(name, targets, weight.shape[0])
        self.kernels, self.scalars = kernels, (temperature, softcap)
        self.shape, self.hidden_shape, self.hidden_dtype = targets.shape, hidden.shape, hidden.dtype
        flat, here = targets.flatten(), targets.flatten() != head.IGNORED
        self.rows = None if here.all() else here.nonzero().squeeze(1)
        given = self.compact(hidden.detach().reshape(-1, hidden.shape[-1])).contiguous()
        self.targets = self.compact(flat).long().contiguous()
        self.weight, self.threads = weight.detach(), stream_or_threads(hidden)
        self.bias = bias if bias is None else bias.detach().float().contiguous()
        self.bias_dtype = None if bias is None else bias.dtype
        self.n, self.V, self.D = len(self.targets), weight.shape[0], weight.shape[1]
        self.half = (
            hidden.dtype == weight.dtype == torch.bfloat16
            and self.weight.stride(1) == 1
            and self.n * self.V >= HALF_LEAST
            and (EMULATE_HALF or has_half_products(kernels))
        )
        self.hidden = given if self.half else given.float()
        self.scratch: Tensor | None = None

    def compact(self, x: Tensor) -> Tensor:
        """The rows of flat x that are not ignored."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def expand(self, x: Tensor) -> Tensor:
        """(n,) in the shape of targets, 0 where they are ignored."""
        if self.rows is not None:
            x = x.new_zeros(self.shape.numel()).index_copy_(0, self.rows, x)
        return x.reshape(self.shape).clone() if self.rows is None else x.view(self.shape)

    def block(self, first: int, end: int) -> Tensor:
        """Rows of the weight, dense, as the products want them; the next call may overwrite them."""
        if self.half or (self.weight.dtype == torch.float32 and self.weight.stride(1) == 1):
            return self.weight[first:end]
        if self.scratch is None:
            self.scratch = floats(self.weight, min(COLUMNS, self.V) * self.D)
        return self.scratch[: (end - first) * self.D].view(-1, self.D).copy_(self.weight[first:end])

    def product(self, rows: tuple[int, int], weight: Tensor, out: Tensor) -> None:
        """Raw logits of rows by a block of the weight, into `out` (rows, columns)."""
        hidden = self.hidden[rows[0] : rows[1]]
        if self.half:
            self.kernels.half_product(
                hidden.data_ptr(), weight.data_ptr(), out.data_ptr(), *out.shape, self.D,
                hidden.stride(0), weight.stride(0), out.stride(0), EMULATE_HALF, self.threads,
            )  # fmt: skip
        else:
            torch.mm(hidden, weight.T, out=out)

    def columns(self) -> Iterator[tuple[int, int]]:
        return ((first, min(first + COLUMNS, self.V)) for first in range(0, self.V, COLUMNS))

    def call(self, kernel: str, x: Tensor, ref: Tensor | None, other: Head | None, rows, first: int, table: Tensor):
        """A row kernel on a block: x and ref (rows, columns), `table` with a row of numbers for each token."""
        begin, end = rows
        bias = None if self.bias is None else self.bias[first:]
        ref_bias = None if other is None or other.bias is None else other.bias[first:]
        getattr(self.kernels, kernel)(
            *data_ptrs(x, bias, ref, ref_bias, self.targets[begin:]),
            table[begin:].data_ptr(), end - begin, x.shape[1], x.stride(0), first, *self.scalars, self.threads,
        )  # fmt: skip

    def state(self) -> Tensor:
        state = floats(self.hidden, self.n, 9)
        self.kernels.head_begin(state.data_ptr(), self.n)
        return state

    def results(self, state: Tensor, reference: bool = False) -> Tensor:
        """(4 or 8, n): log p, entropy, m, log s; of the reference log p, KL, m, log s."""
        out = floats(state, 8 if reference else 4, len(state))
        self.kernels.head_results(state.data_ptr(), out.data_ptr(), len(state), reference)
        return out

    def statistics(self, other: Head | None = None) -> Tensor:
        """`results` of every row; `other` is the reference's head."""
        state = self.state()
        for rows, first, _, x, ref in self.logits(other):
            self.call("head_statistics", x, ref, other, rows, first, state)
        return self.results(state, other is not None)

    def logits(self, other: Head | None = None) -> Iterator[tuple]:
        """Blocks of raw logits, in the order of four products: ((begin, end) of the rows, first column, block of the
        weight, logits, the reference's logits)."""
        chunks = even(self.n, BLOCK_BYTES // (4 * min(COLUMNS, self.V)))
        size = max((end - begin for begin, end in chunks), default=0) * min(COLUMNS, self.V)
        buffer, ref_buffer = floats(self.hidden, size), None if other is None else floats(self.hidden, size)
        for first, stop in self.columns():
            weight = self.block(first, stop)
            ref_weight = None if other is None else other.block(first, stop)
            for begin, end in chunks:
                x = buffer[: (end - begin) * (stop - first)].view(end - begin, -1)
                self.product((begin, end), weight, x)
                ref = None
                if other is not None:
                    ref = ref_buffer[: x.numel()].view_as(x)
                    other.product((begin, end), ref_weight, ref)
                yield (begin, end), first, weight, x, ref

    def gradients(self, slopes: Tensor, by: tuple[bool, bool, bool], other: Head | None = None) -> tuple:
        """Gradients of hidden, weight and bias by slopes (n, 8): the second half of the order of four products."""
        out = Gradients(self, by, whole=False)
        for rows, first, weight, x, ref in self.logits(other):
            self.call("head_gradient", x, ref, other, rows, first, slopes)
            out.add(rows, first, weight, x)
        return out.finish()

    def train(self, slopes_of: Callable[[Tensor, slice], Tensor], by: tuple[bool, bool, bool]) -> tuple[Tensor, tuple]:
        """`results` and the gradients of a loss whose slopes follow from the results: slopes_of(results, rows)."""
        most = max(KEPT_BYTES // (4 * self.V), 1)
        if not any(by) or (self.n > most and by[1] and not self.accumulates()):
            results = self.statistics()
            return results, self.gradients(slopes_of(results, slice(None)), by) if any(by) else Gradients.none(self)
        state, parts, out = self.state(), [], Gradients(self, by, whole=True)
        chunks = even(self.n, most)
        buffer = floats(self.hidden, max((end - begin for begin, end in chunks), default=0) * self.V)
        slopes = floats(self.hidden, self.n, 8)
        for begin, end in chunks:
            kept = []
            for first, stop in self.columns():
                x = buffer[(end - begin) * first : (end - begin) * stop].view(end - begin, -1)
                self.product((begin, end), self.block(first, stop), x)
                self.call("head_statistics", x, None, None, (begin, end), first, state)
                kept.append((first, stop, x))
            parts.append(self.results(state[begin:end]))
            slopes[begin:end] = slopes_of(parts[-1], slice(begin, end))
            for first, stop, x in reversed(kept):  # the last are still in the cache
                self.call("head_gradient", x, None, None, (begin, end), first, slopes)
                out.add((begin, end), first, self.block(first, stop) if by[0] else None, x)
        return torch.cat(parts, 1) if parts else self.results(state), out.finish()

    def accumulates(self) -> bool:
        """Whether dW may add up over chunks: it is float32 itself, or its float32 sum is small."""
        return self.weight.dtype == torch.float32 or 4 * self.V * self.D <= KEPT_BYTES


class Gradients:
    """Where the gradients of a head add up, in float32: each block of rows and columns comes once."""

    def __init__(self, of: Head, by: tuple[bool, bool, bool], whole: bool):
        self.of, self.by = of, by
        self.hidden = floats(of.hidden, of.n, of.D).zero_() if by[0] else None
        self.direct = of.weight.dtype == torch.float32
        self.weight = of.weight.new_empty(of.V, of.D) if by[1] else None
        summed = by[1] and not self.direct
        self.sums = floats(of.weight, of.V if whole else min(COLUMNS, of.V), of.D) if summed else None
        self.whole = whole
        self.bias = floats(of.weight, of.V).zero_() if by[2] else None

    def add(self, rows: tuple[int, int], first: int, weight: Tensor | None, x: Tensor) -> None:
        begin, end = rows
        if self.by[2]:
            self.bias[first : first + x.shape[1]] += x.sum(0)
        if self.of.half:
            x = x.bfloat16()
        if self.by[0] and self.of.half:
            self.hidden[begin:end] += torch.mm(x, weight)
        elif self.by[0]:
            self.hidden[begin:end].addmm_(x, weight)
        if self.by[1]:
            self.add_weight(begin, end, first, x)

    def add_weight(self, begin: int, end: int, first: int, x: Tensor) -> None:
        hidden, stop, last = self.of.hidden[begin:end], first + x.shape[1], end == self.of.n
        if self.of.half and begin == 0 and last:
            torch.mm(x.T, hidden, out=self.weight[first:stop])
            return
        if self.direct:
            sums = self.weight[first:stop]
        else:
            sums = self.sums[first:stop] if self.whole else self.sums[: stop - first]
        if self.of.half:
            part = torch.mm(x.T, hidden)
            sums.copy_(part) if begin == 0 else sums.add_(part)
        elif begin == 0:
            torch.mm(x.T, hidden, out=sums)
        else:
            sums.addmm_(x.T, hidden)
        if not self.direct and last:
            self.weight[first:stop] = sums

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden, weight and bias in their dtypes and shapes, (0,) where not asked for."""
        of, (d_hidden, d_weight, d_bias) = self.of, Gradients.none(self.of)
        if self.by[0]:
            d_hidden = self.hidden.to(of.hidden_dtype)
            if of.rows is not None:
                whole = d_hidden.new_zeros(of.shape.numel(), of.D)
                d_hidden = whole.index_copy_(0, of.rows, d_hidden)
            d_hidden = d_hidden.view(of.hidden_shape)
        if self.by[1]:
            d_weight = self.weight if of.n else self.weight.zero_()
        if self.by[2]:
            d_bias = self.bias.to(of.bias_dtype)
        return d_hidden, d_weight, d_bias

    @staticmethod
    def none(of: Head) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(of.weight.new_empty(0) for _ in range(3))


def slopes(m: Tensor, log_sum: Tensor, g: Tensor, a: Tensor, b: Tensor | None = None, *reference: Tensor) -> Tensor:
    """(n, 8), what head_gradient reads: m, log s, g, a, b, and c, m, log s of the reference."""
    out = floats(g, len(g), 8).zero_()
    for i, x in enumerate((m, log_sum, g, a, b, *reference)):
        if x is not None:
            out[:, i] = x
    return out
