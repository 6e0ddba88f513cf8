"""A linear head on a GPU: the library's matrix products on chunks of rows, with our kernels on the logits between them.

Statistics alone are computed by a product of our own (_scoring.py) where `is_scored` says so. Not an op.

    chunk 0   | hidden rows  | x weight' -> | logits, V float32 | -> statistics, and the logits' gradient in their place
    chunk 1   | hidden rows  |              (one buffer)           -> products with weight and hidden: dX, dW
    ...

A chunk's float32 logits X W' go from the product's accumulators into one buffer. With a loss whose gradients follow
from the row's own statistics, one kernel computes the statistics, the gradients of the loss and the gradient of the
logits, which has the inputs' dtype and overwrites the logits (_softmax.py has a picture). Then dX and dW: three
products in all. dW is summed over the chunks in float32. Without a gradient only the statistics are computed.

Floor, bytes per logit in bfloat16: 4 written by X W', 4 read for the statistics and 4 (from the caches, if they still
have them) for the gradient, 2 written, 2 + 2 read by dX and dW: 18. bfloat16 logits would take 12, but make
log-probabilities wrong in the second digit. Each chunk also reads the weight twice and, if there is more than one
chunk, 8 bytes per element of dW. Hence chunks are few and large.

The sum of a 16-bit dW over chunks needs a float32 dW, as large as the logits of D rows. A chunk therefore has D rows
if CHUNK_BYTES are fewer, and c + D rows are one chunk, without that sum, where c rows were the largest: it costs no
more memory. At 8192 x 4096 x 151936 that is one chunk of 4.6 GiB of logits.

Rows of the buffer are a multiple of 64 elements apart, so that a vocabulary of 50257 has aligned rows too. Yet products
on tensor cores are slow where V is no multiple of 8 (130 TFLOP/s at 8192 x 768 x 50257 on an H100), so each is two
there, of 50256 columns and of 1 (`column_parts`). A padded weight would take memory. Models' D are multiples of 8.

Chunks depend only on N, D, V, the dtypes, the number of SMs and whether dW is needed, and are summed in order: the same
bits from run to run. The bits of a row may depend on the number of rows, as the library's products do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._head import NeedsGrad, empty_input_grads
from rlhf_fast.kernels._head_checks import check_targets
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _scoring as scoring
from rlhf_fast.kernels.triton import _softmax as softmax
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._logits import (
    Logits,
    Loss,
    RowGrads,
    Statistics,
    compute_gradient,
    compute_statistics,
    upper_half,
)  # fmt: skip

CHUNK_BYTES = 2 << 30  # of logits in a chunk, if dW's float32 sum does not take more
MIN_CHUNK_ROWS = 1024  # whatever they take: with fewer, reading weight and dW per chunk costs as much as the products
TILE_ROWS, TILE_COLUMNS = 128, 256  # of the library's products, of which an SM computes one at a time
MAX_SCORED_DEPTH = 2048  # D, of a pair the sum of both, up to which statistics alone are computed by our own product
PART_BYTES = 16 << 20  # of dW, where a chunk's part needs memory of its own: it should stay in the L2 cache
MIN_16_BIT_WORK = 1 << 26  # multiplications from which on dX and dW are 16-bit products; below, time does not matter
ALIGNMENT = 8  # columns, 16 bytes of a 16-bit row: what the library's fast products on tensor cores take
MIN_SPLIT_WORK = 1 << 32  # multiplications from which on a product is split for it; below, launches take longer
FLOAT16_GAIN = 1024.0  # factor of float16 gradients of logits, so that 6e-11 and more do not round to 0


@triton.jit(do_not_specialize=["first"])
def copy_rows_kernel(x, targets, out, D, row_stride, column_stride, first, BLOCK: tl.constexpr):
    """Copy a row of hidden in the products' dtype, or zeros if it is ignored: 0 times NaN would be NaN in dW."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(targets + first + row) != launch.IGNORE_INDEX
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        index = (first + row) * row_stride + column.to(tl.int64) * column_stride
        y = tl.load(x + index, mask=(column < D) & valid, other=0.0)
        tl.store(out + row * D + column, y.to(out.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    y, sums, rows, V, stride, factor, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add a chunk's part to the gradient of the bias. y has memory for the columns beyond V."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        index = row.to(tl.int64)[:, None] * stride + column[None, :]
        part = tl.load(y + index, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        total += tl.where((column < V)[None, :], part, 0.0)
    chunk_sum = factor * tl.sum(total, axis=0)
    if not FIRST:
        chunk_sum += tl.load(sums + column, mask=column < V, other=0.0)
    tl.store(sums + column, chunk_sum, mask=column < V)


@functools.cache
def can_multiply_to_float32(adds: bool, device: torch.device) -> bool:
    """Return whether torch multiplies 16-bit matrices with a float32 result there and, if `adds`, adds it to `out`."""
    a = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    out = torch.zeros((16, 16), dtype=torch.float32, device=device)
    try:
        if adds:
            torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def multiply_to_float32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a @ b of 16-bit a and b in float32."""
    if out.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0, add: bool = False) -> None:
    """Compute out = a @ b * factor (+ out), rounded once, from float32 accumulators. out: a's dtype or float32."""
    if a.dtype == out.dtype:
        if add or factor != 1:
            out.addmm_(a, b, beta=1 if add else 0, alpha=factor)
        else:
            torch.mm(a, b, out=out)
    elif not add:
        multiply_to_float32(a, b, out)
        if factor != 1:
            out.mul_(factor)
    elif can_multiply_to_float32(True, out.device):
        torch.addmm(out, a, b, alpha=factor, out_dtype=torch.float32, out=out)
    else:
        rows = max(1, PART_BYTES // (4 * out.shape[1]))
        for a_rows, out_rows in zip(a.split(rows), out.split(rows), strict=True):
            part = torch.empty(out_rows.shape, dtype=torch.float32, device=out.device)
            multiply_to_float32(a_rows, b, part)
            out_rows.add_(part, alpha=factor)


def count_waves(rows: int, columns: int, num_sms: int) -> int:
    """Return how many tiles of a product the busiest SM computes."""
    return triton.cdiv(triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, TILE_COLUMNS), num_sms)


def split_rows(total: int, max_size: int, columns: int, num_sms: int) -> list[tuple[int, int]]:
    """Split [0, total) into the fewest parts of at most max_size, all but the last of one size, a multiple of TILE_ROWS
    if it can be: the smallest with which the parts' products with `columns` columns take the fewest waves of tiles."""
    if total <= max_size:
        return [(0, total)] if total else []
    granule = min(TILE_ROWS, max_size)
    max_size = max_size // granule * granule
    num_parts = triton.cdiv(total, max_size)
    even_size = triton.cdiv(triton.cdiv(total, num_parts), granule) * granule

    def total_waves(size: int) -> int:
        last = total - (num_parts - 1) * size
        return (num_parts - 1) * count_waves(size, columns, num_sms) + count_waves(last, columns, num_sms)

    size = min(range(even_size, max_size + 1, granule), key=total_waves)
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


class GpuHead:
    """Rows of hidden (..., D) with their targets, and the weight (V, D) of a head."""

    def __init__(self, op: str, hidden, weight, targets, bias=None, temperature=1.0, softcap=0.0):
        launch.require_dtypes(hidden, weight, bias)
        self.V, self.D = weight.shape
        self.N = targets.numel()
        check_targets(op, targets, self.V)
        self.dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        is_on_gpu = hidden.device.type != "cpu"
        if self.dtype != torch.float32 and is_on_gpu and not can_multiply_to_float32(False, hidden.device):
            self.dtype = torch.float32
        self.given_hidden = hidden
        self.hidden = hidden.detach().reshape(-1, self.D)
        self.weight_dtype = weight.dtype
        self.weight = weight.detach().to(self.dtype)
        if 1 not in self.weight.stride():
            self.weight = self.weight.contiguous()
        self.bias = None if bias is None else bias.detach().contiguous()
        self.targets = targets.contiguous()
        self.temperature = temperature
        self.softcap = softcap
        self.logits_stride = triton.cdiv(self.V, 64) * 64
        self.grad_dtype = self.dtype if self.N * self.V * self.D >= MIN_16_BIT_WORK else torch.float32
        self.copies: dict[torch.dtype, Tensor] = {}

    @functools.cached_property
    def column_parts(self) -> list[tuple[int, int]]:
        """The parts of the vocabulary, (first column, number), of which each has products of its own."""
        rest = self.V % ALIGNMENT
        is_split = self.dtype != torch.float32 and 0 < rest < self.V and self.N * self.V * self.D >= MIN_SPLIT_WORK
        return [(0, self.V - rest), (self.V - rest, rest)] if is_split else [(0, self.V)]

    @property
    def loss_gain(self) -> float:
        """The factor that the gradients of the logits have where they are those of a loss."""
        return FLOAT16_GAIN if self.grad_dtype == torch.float16 else 1.0

    @functools.cached_property
    def padded_bias(self) -> Tensor | None:
        """The bias in memory of whole groups, as the kernels read it."""
        if self.bias is None or self.V % softmax.VEC == 0:
            return self.bias
        return torch.nn.functional.pad(self.bias, (0, -self.V % softmax.VEC))

    def max_chunk_rows(self, needs_weight: bool, num_buffers: int) -> int:
        """Return the largest number of rows of a chunk, given whether the gradient of the weight is needed."""
        rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * self.logits_stride * num_buffers))
        if needs_weight and self.weight_dtype == self.grad_dtype != torch.float32:
            rows_of_sum = self.V * self.D // (self.logits_stride * num_buffers)  # whose logits take as much memory
            rows = max(rows, rows_of_sum)
            if self.N <= rows + rows_of_sum:
                return rows + rows_of_sum
        return rows

    def chunks(self, needs_weight: bool = False, num_buffers: int = 1) -> list[tuple[int, int]]:
        """Return the rows [begin, end) of each chunk."""
        max_rows = self.max_chunk_rows(needs_weight, num_buffers)
        return split_rows(self.N, max_rows, self.D, launch.num_sms(self.hidden))

    def empty_logits(self, chunks: list[tuple[int, int]]) -> Tensor:
        """Return memory for the logits of the largest chunk."""
        return empty_float32(self.weight, max((end - begin for begin, end in chunks), default=0), self.logits_stride)

    def copy_hidden(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return a copy of hidden's rows in `dtype`, zeros where they are ignored. The next chunk overwrites it."""
        if dtype not in self.copies:  # no chunk is larger than the first
            self.copies[dtype] = torch.empty((end - begin, self.D), dtype=dtype, device=self.hidden.device)
        out = self.copies[dtype]
        block = launch.block_size(self.D, 2048)
        meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
        sizes = (self.D, *self.hidden.stride(), begin)
        launch.run(copy_rows_kernel, (end - begin,), self.hidden, self.targets, out, *sizes, **meta)
        return out.narrow(0, 0, end - begin)

    def logits(
        self, begin: int, end: int, buffer: Tensor, reference: GpuHead | None = None, ref_buffer: Tensor | None = None
    ) -> Logits:
        """Compute the raw logits of a chunk, without the bias, in `buffer`, and a reference's in `ref_buffer`."""
        x = buffer.narrow(0, 0, end - begin)
        if self.hidden.dtype == self.dtype and 1 in self.hidden.stride():
            hidden = self.hidden.narrow(0, begin, end - begin)
        else:
            hidden = self.copy_hidden(begin, end, self.dtype)
        for first, size in self.column_parts:
            multiply(hidden, self.weight.narrow(0, first, size).t(), x.narrow(1, first, size))
        ref = ref_bias = None
        if reference is not None:
            ref = reference.logits(begin, end, ref_buffer).x
            ref_bias = reference.padded_bias
        options = (self.temperature, self.softcap, self.padded_bias, ref, ref_bias, begin)
        return Logits(x, self.V, self.targets, *options)

    def gradient_memory(self, logits: Logits) -> Tensor:
        """Return memory for the gradient of the logits: their own, unless several programs share a row and the dtypes
        differ."""
        if self.grad_dtype == torch.float32:
            return logits.x
        if logits.is_walked_whole:
            return upper_half(logits.x, self.grad_dtype)
        return torch.empty_like(logits.x, dtype=self.grad_dtype)


def is_scored(head: GpuHead, reference: GpuHead | None = None) -> bool:
    """Return whether statistics alone come from _scoring.py's product, not from the library's.

    Estimate, not measured: our fused product saves 8 bytes of traffic per logit, but runs at about 0.8 of the library's
    rate (0.65 with a reference, in smaller tiles). On an H100 (700 TFLOP/s, 3.0 TB/s) that breaks even near D = 2400
    with the softmax behind each tile (1700 for a pair). The choice must not depend on the number of rows, or results
    would differ between batches: the two ways differ by the rounding of float32 sums."""
    heads = [head] if reference is None else [head, reference]
    if head.dtype == torch.float32 or any(x.dtype != head.dtype or x.D % 8 for x in heads):
        return False
    return sum(x.D for x in heads) <= MAX_SCORED_DEPTH


def score(head: GpuHead, reference: GpuHead | None, has_log_z: bool) -> Statistics:
    """Return the statistics of every row by _scoring.py's product."""
    out = Statistics.empty(head.targets, reference is not None, has_log_z)
    largest, sums, *ref_sums = out.sums.flatten(1).unbind()
    outputs = scoring.Outputs(out.logprobs.view(-1), out.entropy.view(-1), largest, sums)
    if has_log_z:
        outputs = outputs._replace(log_z=out.log_z.view(-1), top1=out.top1.view(-1))
    targets = head.targets.view(-1)
    options = (head.temperature, head.softcap)
    if reference is None:
        scoring.score(head.hidden, head.weight, targets, head.bias, *options, outputs)
    else:
        outputs = scoring.Outputs(*outputs[:4], out.ref_logprobs.view(-1), out.kl.view(-1), *ref_sums)
        matrices = (head.hidden, head.weight, reference.hidden, reference.weight)
        scoring.score_pair(*matrices, targets, *options, head.bias, reference.bias, outputs)
    return out


def compute_head_statistics(
    head: GpuHead, reference: GpuHead | None = None, has_log_z: bool = False, may_score: bool = True
) -> Statistics:
    """Return the statistics of every row, without a gradient. may_score: by _scoring.py's product where `is_scored`."""
    if may_score and is_scored(head, reference):
        return score(head, reference, has_log_z)
    out = Statistics.empty(head.targets, reference is not None, has_log_z)
    chunks = head.chunks(False, 1 if reference is None else 2)
    buffer = head.empty_logits(chunks)
    ref_buffer = None if reference is None else reference.empty_logits(chunks)
    for begin, end in chunks:
        compute_statistics(head.logits(begin, end, buffer, reference, ref_buffer), out)
    return out


def train(head: GpuHead, loss: Loss, needs_grad: NeedsGrad) -> tuple[Statistics, tuple[Tensor, Tensor, Tensor]]:
    """Return the statistics of every row, and the gradients of hidden, weight and bias by a loss that follows from
    them."""
    if not any(needs_grad):
        return compute_head_statistics(head), empty_input_grads(head.given_hidden, head.weight, head.bias, needs_grad)
    out = Statistics.empty(head.targets)
    _, needs_weight, _ = needs_grad
    chunks = head.chunks(needs_weight)
    buffer = head.empty_logits(chunks)
    grads = InputGrads(head, needs_grad, chunks, head.loss_gain)
    for begin, end in chunks:
        logits = head.logits(begin, end, buffer)
        y = head.gradient_memory(logits)
        compute_statistics(logits, out, loss, y, head.loss_gain)
        grads.add_chunk(begin, end, y.narrow(1, 0, head.V))
    return out, grads.finish()


def train_at_once(
    head: GpuHead, row_grads_of: Callable[[Statistics], RowGrads], needs_grad: NeedsGrad
) -> tuple[Statistics, tuple[Tensor, Tensor, Tensor]]:
    """Return what `train` returns, by a loss whose gradients by log p and entropy need the statistics of all rows.

    Several chunks take four products: the logits of one alone are still there when all statistics are known."""
    _, needs_weight, _ = needs_grad
    chunks = head.chunks(needs_weight)
    if len(chunks) != 1 or not any(needs_grad):
        # By the products of the gradient's pass: a row's bits must not depend on the number of chunks.
        out = compute_head_statistics(head, may_score=not any(needs_grad))
        return out, compute_input_grads(head, out, row_grads_of(out), needs_grad, gain=head.loss_gain)
    out = Statistics.empty(head.targets)
    logits = head.logits(0, head.N, head.empty_logits(chunks))
    y = head.gradient_memory(logits)
    grads = InputGrads(head, needs_grad, chunks, head.loss_gain)
    compute_statistics(logits, out)
    compute_gradient(logits, out, row_grads_of(out), y, head.loss_gain)
    grads.add_chunk(0, head.N, y.narrow(1, 0, head.V))
    return out, grads.finish()


def compute_input_grads(
    head: GpuHead,
    known: Statistics,
    row_grads: RowGrads,
    needs_grad: NeedsGrad,
    reference: GpuHead | None = None,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias from those of rows with known statistics. gain: the factor that
    the gradients of the logits have until then."""
    _, needs_weight, _ = needs_grad
    chunks = head.chunks(needs_weight, 1 if reference is None else 2)
    buffer = head.empty_logits(chunks)
    ref_buffer = None if reference is None else reference.empty_logits(chunks)
    grads = InputGrads(head, needs_grad, chunks, gain)
    for begin, end in chunks if any(needs_grad) else ():
        logits = head.logits(begin, end, buffer, reference, ref_buffer)
        y = head.gradient_memory(logits)
        compute_gradient(logits, known, row_grads, y, gain)
        grads.add_chunk(begin, end, y.narrow(1, 0, head.V))
    return grads.finish()


class InputGrads:
    """Gradients of hidden, weight and bias, summed chunk by chunk. One that is not needed is None and costs nothing.

    gain: the factor that the gradients of the logits have."""

    def __init__(self, head: GpuHead, needs_grad: NeedsGrad, chunks: list[tuple[int, int]], gain: float = 1.0):
        needs_hidden, needs_weight, needs_bias = needs_grad
        self.head = head
        self.factor = 1 / gain
        self.weight_copy = self.hidden = self.weight = self.bias = None
        if needs_hidden:
            self.weight_copy = head.weight.to(head.grad_dtype)
            self.hidden = torch.empty(head.hidden.shape, dtype=head.grad_dtype, device=head.hidden.device)
        if needs_weight:
            is_exact = len(chunks) == 1 and head.weight_dtype == head.grad_dtype
            dtype = head.grad_dtype if is_exact else torch.float32
            self.weight = torch.empty(head.weight.shape, dtype=dtype, device=head.weight.device)
        if needs_bias:
            self.bias = empty_float32(head.bias, *head.bias.shape)

    def add_chunk(self, begin: int, end: int, y: Tensor) -> None:
        """Add a chunk's part. y: `gain` times the gradient of its logits."""
        head = self.head
        if self.hidden is not None:
            self._store_hidden_grad(y, self.hidden.narrow(0, begin, end - begin))
        if self.weight is not None:
            hidden = head.copy_hidden(begin, end, head.grad_dtype)
            for first, size in head.column_parts:
                out = self.weight.narrow(0, first, size)
                multiply(y.narrow(1, first, size).t(), hidden, out, self.factor, add=begin > 0)
        if self.bias is not None:
            meta = {"FIRST": begin == 0, "ROWS": 64, "COLUMNS": 64, "num_warps": 4}
            sizes = (end - begin, head.V, y.stride(0))
            launch.run(column_sums_kernel, (triton.cdiv(head.V, 64),), y, self.bias, *sizes, self.factor, **meta)

    def _store_hidden_grad(self, y: Tensor, out: Tensor) -> None:
        """Compute out = y @ weight. The library may split the sum over V into parts and add these in the dtype of its
        result (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is True by default), so a 16-bit
        result goes through float32."""
        exact = out if out.dtype == torch.float32 else empty_float32(out, *out.shape)
        for first, size in self.head.column_parts:
            multiply(y.narrow(1, first, size), self.weight_copy.narrow(0, first, size), exact, add=first > 0)
        if exact is not out or self.factor != 1:
            torch.mul(exact, self.factor, out=out)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in the inputs' dtypes and shapes, (0,) where not needed."""
        head = self.head
        none = head.given_hidden.new_empty
        if not head.N:
            for x in (self.weight, self.bias):
                if x is not None:
                    x.zero_()
        return (
            none(0) if self.hidden is None else self.hidden.to(head.hidden.dtype).view(head.given_hidden.shape),
            none(0) if self.weight is None else self.weight.to(head.weight_dtype),
            none(0) if self.bias is None else self.bias.to(head.bias.dtype),
        )
