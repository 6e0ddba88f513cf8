"""A linear head on the CPU: matrix products make blocks of logits, our row kernels reduce them. Not an op.

Logits are float32. They are made in blocks of some rows (tokens) and some columns (vocabulary), in one of two orders:

    three products  One chunk of rows after the other: X W' for the statistics; its logits are kept, then dX and dW. The
                    sum over the chunks needs a float32 tensor of the weight's size.
    four products   First pass: X W' for the statistics. Second pass: X W' again, one vocabulary block at a time, so
                    that a block of dW is complete before the next one begins.

Products in float32 are ours. bfloat16 inputs become float32 a block at a time, and are exact there. Where the processor
multiplies bfloat16 and the weight is not tiny, our product of bfloat16 makes the logits instead; torch's then makes dX
and dW from the gradient of the logits rounded to bfloat16 (torch has no mixed product), summed over blocks in float32.
Without a softcap three products need no sum over chunks there: of all rows the exponentials are kept in bfloat16, in
half the memory of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import _product
from rlhf_fast.kernels._head import IGNORE_INDEX, NeedsGrad, RowGrads
from rlhf_fast.kernels._head_checks import check_targets
from rlhf_fast.kernels._launch import data_ptrs, require_dtypes, stream_or_threads
from rlhf_fast.kernels._product import f32_product, row_stride, rows_in
from rlhf_fast.kernels._tensors import empty_float32

KERNELS = (
    "head_init",
    "head_statistics",
    "head_results",
    "head_gradient",
    "head_kept_gradient",
    "f32_product",
    "bf16_product",
    "advise_huge_pages",
)
LOGITS_BYTES_3_GEMM = 36 << 20  # 128 rows of up to 73,000 columns; with fewer, torch's products were 20 % slower
FULL_CHUNK = 128  # rows of one chunk of several: the depth of dW's product, which f32_gemm.h sums in chains of 128
LOGITS_BYTES_4_GEMM = (8 << 20) + (1 << 17)  # 2,048 padded rows of 1,024; small enough for the last-level cache
KEPT_BYTES = 128 << 20  # of all exponentials in bfloat16; beyond, the logits are made twice
VOCAB_TILES = 4  # of a block of the vocabulary; csrc/cpu/softmax.h reduces by tiles, so logprobs do not depend on it
KEPT_TILES = 16  # where all logits of a chunk are kept, and the weight needs no copy: threads wait for one another less
MIN_BF16_WEIGHT = 1 << 15  # elements; below, bfloat16 inputs are multiplied in float32, whatever their number


def split_evenly(total: int, max_size: int) -> list[tuple[int, int]]:
    """Split [0, total) into the fewest parts of at most max_size, of nearly one size."""
    parts = -(-total // max(max_size, 1))
    return [(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def empty_in_huge_pages(kernels: ModuleType, like: Tensor, *shape: int) -> Tensor:
    """Return new memory of the dtype of `like`, in huge pages where the system has them."""
    x = like.new_empty(shape)
    kernels.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


class LogitBlock(NamedTuple):
    """Raw logits of the valid rows [begin, end), for the columns from `first` on."""

    begin: int
    end: int
    first: int
    logits: Tensor  # (end - begin, columns); head_gradient overwrites them with their gradient
    weight: Tensor | None  # (columns, D)
    ref_logits: Tensor | None = None  # those of a reference, of the same shape


class CpuHead:
    """The valid rows of `hidden`, whose targets are not ignored, and the weight they are multiplied by."""

    def __init__(
        self,
        kernels: ModuleType,
        name: str,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float = 0.0,
    ):
        require_dtypes(hidden, weight)
        check_targets(name, targets, weight.shape[0])
        self.kernels = kernels
        self.scalars = (temperature, softcap)
        self.shape = targets.shape
        self.hidden_shape, self.hidden_dtype = hidden.shape, hidden.dtype
        valid = targets.flatten() != IGNORE_INDEX
        self.valid_rows = None if valid.all() else valid.nonzero().squeeze(1)
        self.targets = self.gather_valid(targets.flatten()).long().contiguous()
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.bias_dtype = None if bias is None else bias.dtype
        self.threads = stream_or_threads(hidden)
        self.N = len(self.targets)
        self.V, self.D = weight.shape
        self.vocab_block = VOCAB_TILES * kernels.head_tile
        self.use_bf16 = (
            self.N > 0
            and hidden.dtype == weight.dtype == torch.bfloat16
            and self.weight.stride(1) == 1
            and self.V * self.D >= MIN_BF16_WEIGHT
            and _product.uses_bf16_product(kernels)
        )
        if self.use_bf16:  # all rows at once where a tile of them fits: a block of dW needs no sums then
            tiles = (LOGITS_BYTES_4_GEMM // (4 * self.N) - row_stride(0)) // kernels.head_tile
            self.vocab_block = max(1, min(VOCAB_TILES, tiles)) * kernels.head_tile
        rows = self.gather_valid(hidden.detach().reshape(-1, hidden.shape[-1])).contiguous()
        self.hidden = rows if self.use_bf16 else rows.float()
        self.weight_buffer: Tensor | None = None
        self.grad_buffer: Tensor | None = None

    def gather_valid(self, x: Tensor) -> Tensor:
        """Return the valid rows of flat x."""
        return x if self.valid_rows is None else x.index_select(0, self.valid_rows)

    def scatter_valid(self, x: Tensor) -> Tensor:
        """Return x (N,) of the valid rows in the shape of targets, 0 in ignored rows."""
        if self.valid_rows is None:
            return x.reshape(self.shape).clone()
        return x.new_zeros(self.shape.numel()).index_copy_(0, self.valid_rows, x).view(self.shape)

    def vocab_blocks(self, kept: bool = False) -> Iterator[tuple[int, int]]:
        """Yield the columns of each block; `kept`: of all rows' logits, in larger blocks unless a weight is copied."""
        larger = kept and not (self.use_bf16 or self.needs_weight_copy())
        size = KEPT_TILES * self.kernels.head_tile if larger else self.vocab_block
        return ((first, min(first + size, self.V)) for first in range(0, self.V, size))

    def needs_weight_copy(self) -> bool:
        """Return whether the products take the weight in another dtype or layout."""
        return not (self.use_bf16 or (self.weight.dtype == torch.float32 and self.weight.stride(1) == 1))

    def weight_block(self, first: int, stop: int) -> Tensor:
        """Return rows of the weight, dense and in the dtype of the products. The next call may overwrite them."""
        if not self.needs_weight_copy():
            return self.weight[first:stop]
        if self.weight_buffer is None:
            self.weight_buffer = empty_float32(self.weight, min(self.vocab_block, self.V) * self.D)
        return self.weight_buffer[: (stop - first) * self.D].view(-1, self.D).copy_(self.weight[first:stop])

    def multiply(self, begin: int, end: int, weight: Tensor, out: Tensor) -> Tensor:
        """Write the raw logits of rows [begin, end) for a block of the weight to `out` (rows, columns)."""
        hidden = self.hidden[begin:end]
        if not self.use_bf16:
            return f32_product(self.kernels, hidden, weight.T, out)
        self.kernels.bf16_product(
            *data_ptrs(hidden, weight, out), *out.shape, self.D, hidden.stride(0), weight.stride(0), out.stride(0),
            _product.BF16_DOT == 2, self.threads,
        )  # fmt: skip
        return out

    def logit_blocks(self, reference: CpuHead | None = None) -> Iterator[LogitBlock]:
        """Yield all raw logits in the order of four products, beside those of a reference's head."""
        chunks = split_evenly(self.N, LOGITS_BYTES_4_GEMM // (4 * row_stride(min(self.vocab_block, self.V))))
        size = max((end - begin for begin, end in chunks), default=0) * row_stride(min(self.vocab_block, self.V))
        buffer = empty_float32(self.hidden, size)
        ref_buffer = empty_float32(self.hidden, size) if reference else buffer
        for first, stop in self.vocab_blocks():
            weight = self.weight_block(first, stop)
            ref_weight = reference.weight_block(first, stop) if reference else None
            for begin, end in chunks:
                shape = (end - begin, stop - first)
                logits = self.multiply(begin, end, weight, rows_in(buffer, *shape))
                ref_logits = None
                if reference is not None and ref_weight is not None:
                    ref_logits = reference.multiply(begin, end, ref_weight, rows_in(ref_buffer, *shape))
                yield LogitBlock(begin, end, first, logits, weight, ref_logits)

    def run_kernel(
        self, kernel: str, block: LogitBlock, table: Tensor, reference: CpuHead | None = None, out: tuple = (0, 0)
    ) -> None:
        """Run a row kernel on a block of logits. `table` holds some numbers for each of the N rows; `out` are the
        kernel's last arguments."""
        bias = None if self.bias is None else self.bias[block.first :]
        ref_bias = None if reference is None or reference.bias is None else reference.bias[block.first :]
        getattr(self.kernels, kernel)(
            *data_ptrs(block.logits, bias, block.ref_logits, ref_bias, self.targets[block.begin :]),
            table[block.begin :].data_ptr(), *block.logits.shape, block.logits.stride(0), block.first, *self.scalars,
            self.threads, *out,
        )  # fmt: skip

    def with_gradient(self, block: LogitBlock, coefficients: Tensor, reference: CpuHead | None = None) -> LogitBlock:
        """Return a block with the gradient of its logits in their place, in the dtype of the products."""
        if not self.use_bf16:
            self.run_kernel("head_gradient", block, coefficients, reference, (0, 0))
            return block
        count = block.logits.numel()
        if self.grad_buffer is None or len(self.grad_buffer) < count:
            self.grad_buffer = self.hidden.new_empty(count)
        grads = self.grad_buffer[:count].view(block.logits.shape)
        self.run_kernel("head_gradient", block, coefficients, reference, (grads.data_ptr(), grads.stride(0)))
        return block._replace(logits=grads)

    def new_state(self) -> Tensor:
        """Return (N, head_state_floats), the running statistics of rows of which no logit has been seen."""
        state = empty_float32(self.hidden, self.N, self.kernels.head_state_floats)
        self.kernels.head_init(state.data_ptr(), self.N)
        return state

    def results(self, state: Tensor, with_reference: bool = False) -> Tensor:
        """Return (6, n): log p, entropy, of all tokens but the target the largest raw logit and the sum of
        exp(z - its z), log_z, and 1 where the target has the largest logit, else 0. With a reference (11, n): also its
        log p, the KL, the largest logit and the sum of the reference, and the part of the KL of all tokens but the
        target."""
        out = empty_float32(state, 11 if with_reference else 6, len(state))
        self.kernels.head_results(state.data_ptr(), out.data_ptr(), len(state), with_reference, *self.scalars)
        return out

    def statistics(self, reference: CpuHead | None = None) -> Tensor:
        """Return the `results` of every row, beside a reference's head."""
        state = self.new_state()
        for block in self.logit_blocks(reference):
            self.run_kernel("head_statistics", block, state, reference, (0, 0, 0, 0))
        return self.results(state, reference is not None)

    def grads(self, coefficients: Tensor, needs_grad: NeedsGrad, reference: CpuHead | None = None):
        """Return the gradients of hidden, weight and bias: the second pass of the order of four products.

        coefficients (N, 9) come from `pack_row_grads`.
        """
        out = GradAccumulator(self, needs_grad, whole_weight=False)
        for block in self.logit_blocks(reference):
            out.add(self.with_gradient(block, coefficients, reference))
        return out.finish()

    def results_and_grads(
        self,
        coefficients_of: Callable[[Tensor, slice], Tensor],
        needs_grad: NeedsGrad,
        needs_all_rows: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the `results` of every row and the gradients of a loss of them.

        coefficients_of(results, rows) returns the coefficients of some rows, given their results; of all rows at once
        if `needs_all_rows`, which takes four products where their logits are too many to be kept.
        """
        if not any(needs_grad):
            return self.statistics(), self.no_grads()
        if self.use_bf16 and self.scalars[1] == 0 and 2 * self.N * self.V <= KEPT_BYTES:
            return self._kept_products(coefficients_of, needs_grad)
        max_rows = max(LOGITS_BYTES_3_GEMM // (4 * sum(row_stride(j - i) for i, j in self.vocab_blocks(kept=True))), 1)
        if self.N > max_rows and (needs_all_rows or (needs_grad[1] and not self.can_sum_weight_grad())):
            results = self.statistics()
            return results, self.grads(coefficients_of(results, slice(None)), needs_grad)
        chunk = max_rows if self.N <= max_rows else max_rows // FULL_CHUNK * FULL_CHUNK or max_rows
        return self._three_products(split_evenly(self.N, chunk), coefficients_of, needs_grad)

    def _three_products(self, chunks, coefficients_of, needs_grad):
        rows = max((end - begin for begin, end in chunks), default=0)
        columns = list(self.vocab_blocks(kept=True))
        strides = [row_stride(stop - first) for first, stop in columns]
        state = self.new_state()
        buffer = empty_in_huge_pages(self.kernels, state, rows * sum(strides))
        coefficients = self.hidden.new_empty(self.N, 9, dtype=torch.float64)
        results = []
        out = GradAccumulator(self, needs_grad, whole_weight=True)
        for begin, end in chunks:
            blocks, rest = [], buffer
            for first, stop in columns:
                weight = self.weight_block(first, stop)
                logits = rows_in(rest, end - begin, stop - first)
                rest = rest[(end - begin) * row_stride(stop - first) :]
                blocks.append(LogitBlock(begin, end, first, self.multiply(begin, end, weight, logits), None))
                self.run_kernel("head_statistics", blocks[-1], state, None, (0, 0, 0, 0))
            results.append(self.results(state[begin:end]))
            coefficients[begin:end] = coefficients_of(results[-1], slice(begin, end))
            for block in reversed(blocks):  # the last ones are still in the cache
                block = self.with_gradient(block, coefficients)
                if needs_grad[0]:
                    block = block._replace(weight=self.weight_block(block.first, block.first + block.logits.shape[1]))
                out.add(block)
        return torch.cat(results, 1) if results else self.results(state), out.finish()

    def _kept_products(self, coefficients_of, needs_grad):
        """Three products in bfloat16: kept are not the logits but their exponentials, in bfloat16."""
        tile, width = self.kernels.head_tile, VOCAB_TILES * self.kernels.head_tile
        kept = empty_in_huge_pages(self.kernels, self.hidden, self.N * self.V)
        origins = empty_float32(self.hidden, self.N, -(-self.V // tile))
        chunks = split_evenly(self.N, LOGITS_BYTES_4_GEMM // (4 * min(width, self.V)))
        buffer = empty_float32(self.hidden, (chunks[0][1] - chunks[0][0] + 1) * min(width, self.V))
        state = self.new_state()
        blocks = []
        for first in range(0, self.V, width):
            stop = min(first + width, self.V)
            weight, exps = self.weight[first:stop], kept[self.N * first : self.N * stop].view(self.N, -1)
            blocks.append(LogitBlock(0, self.N, first, exps, weight))
            for begin, end in chunks:
                logits = buffer[: (end - begin) * (stop - first)].view(end - begin, -1)
                self.multiply(begin, end, weight, logits)
                self.run_kernel(
                    "head_statistics", LogitBlock(begin, end, first, logits, weight), state, None,
                    (exps[begin:].data_ptr(), exps.stride(0), origins[begin:, first // tile].data_ptr(),
                     origins.stride(0)),
                )  # fmt: skip
        results = self.results(state)
        coefficients = coefficients_of(results, slice(None))
        out = GradAccumulator(self, needs_grad, whole_weight=True)
        for block in reversed(blocks):
            self.kernels.head_kept_gradient(
                *data_ptrs(block.logits, self.targets, coefficients), *block.logits.shape, block.logits.stride(0),
                block.first, self.scalars[0], self.threads, origins[:, block.first // tile].data_ptr(),
                origins.stride(0),
            )  # fmt: skip
            out.add(block)
        return results, out.finish()

    def can_sum_weight_grad(self) -> bool:
        """Return whether dW may be summed over chunks: it is float32 itself, or its float32 sum is small."""
        sum_bytes = 4 * self.V * self.D
        return self.weight.dtype == torch.float32 or sum_bytes <= LOGITS_BYTES_3_GEMM

    def no_grads(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight.new_empty(0), self.weight.new_empty(0), self.weight.new_empty(0)


class GradAccumulator:
    """The gradients of a head, summed in float32 over blocks of logits.

    whole_weight: chunks of rows are the outer loop, so that all of dW is incomplete until the last of them.
    """

    def __init__(self, head: CpuHead, needs_grad: NeedsGrad, whole_weight: bool):
        self.head = head
        self.whole_weight = whole_weight
        self.hidden = empty_float32(head.hidden, head.N, head.D).zero_() if needs_grad[0] else None
        self.weight = empty_in_huge_pages(head.kernels, head.weight, head.V, head.D) if needs_grad[1] else None
        self.bias = empty_float32(head.weight, head.V).zero_() if needs_grad[2] else None
        self.weight_sums: Tensor | None = None  # None: dW is float32 and its own sum
        if needs_grad[1] and head.weight.dtype != torch.float32:
            rows = head.V if whole_weight else min(head.vocab_block, head.V)
            self.weight_sums = empty_float32(head.weight, rows, head.D)

    def add(self, block: LogitBlock) -> None:
        """Add what a block contributes, whose logits have been overwritten with their gradient."""
        x = block.logits
        if self.bias is not None:
            self.bias[block.first : block.first + x.shape[1]] += x.sum(0, dtype=torch.float32)
        if self.hidden is not None and block.weight is not None:
            rows = self.hidden[block.begin : block.end]
            if self.head.use_bf16:
                rows += torch.mm(x, block.weight)
            else:
                f32_product(self.head.kernels, x, block.weight, rows, adds=True)
        if self.weight is not None:
            self._add_to_weight(self.weight[block.first : block.first + x.shape[1]], block, x)

    def _add_to_weight(self, grad: Tensor, block: LogitBlock, x: Tensor) -> None:
        hidden = self.head.hidden[block.begin : block.end]
        is_first = block.begin == 0
        is_last = block.end == self.head.N
        if self.head.use_bf16 and is_first and is_last:
            torch.mm(x.T, hidden, out=grad)
            return
        sums = grad
        if self.weight_sums is not None:
            offset = block.first if self.whole_weight else 0
            sums = self.weight_sums[offset : offset + x.shape[1]]
        if self.head.use_bf16:
            product = torch.mm(x.T, hidden)
            if is_first:
                sums.copy_(product)
            else:
                sums.add_(product)
        else:
            f32_product(self.head.kernels, x.T, hidden, sums, adds=not is_first)
        if self.weight_sums is not None and is_last:
            grad.copy_(sums)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden, weight and bias in their dtypes and shapes, (0,) where not needed."""
        head = self.head
        d_hidden, d_weight, d_bias = head.no_grads()
        if self.hidden is not None:
            d_hidden = self.hidden.to(head.hidden_dtype)
            if head.valid_rows is not None:
                full = d_hidden.new_zeros(head.shape.numel(), head.D)
                d_hidden = full.index_copy_(0, head.valid_rows, d_hidden)
            d_hidden = d_hidden.view(head.hidden_shape)
        if self.weight is not None:
            d_weight = self.weight if head.N else self.weight.zero_()
        if self.bias is not None:
            d_bias = self.bias.to(head.bias_dtype)
        return d_hidden, d_weight, d_bias


def pack_row_grads(largest: Tensor, grads: RowGrads, ref_largest: Tensor | None = None) -> Tensor:
    """Return (N, 9) float64, the columns that head_gradient reads."""
    out = largest.new_zeros(len(largest), 9, dtype=torch.float64)
    for i, x in enumerate((largest, *grads[:6], ref_largest, grads.ref_log_scale)):
        if x is not None:
            out[:, i] = x
    return out
