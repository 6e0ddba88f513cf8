"""A linear head on a GPU: the library's matrix products on chunks of rows, a kernel of our own on the logits between
them; for statistics alone, up to some D, a product of our own (`scored`). Not an op.

A chunk's float32 logits X W' go to one buffer, straight from the product's accumulator. With a loss whose slopes follow
from the row's own statistics, a kernel makes those, the slopes and the gradient of the logits in one go, the gradient
in the inputs' dtype, in the memory of the logits (_softmax.py says how). Then dX and dW: three products; dW adds up
over the chunks in float32. Without a gradient nothing but the statistics are made.

Bytes a logit, bfloat16: 4 written by X W', 4 read for the statistics and 4 (of the caches, where they still have them)
for the gradient, 2 written, 2 + 2 read by dX and dW: 18, where gradients from bfloat16 logits would take 12, at the
price of log-probabilities wrong in the second digit. Beside them, for a chunk: W twice, and 8 bytes for each number of
dW, if there is more than one chunk; hence few and large ones. Rows of the buffer are a multiple of 64 numbers apart, so
that a vocabulary of 50257 has aligned rows too.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._head_checks import check_targets
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _logits as rows
from rlhf_fast.kernels.triton import _scoring as scoring
from rlhf_fast.kernels.triton import _softmax as softmax
from rlhf_fast.kernels.triton import launch

IGNORED = tl.constexpr(head.IGNORE_INDEX)
BYTES = 1 << 30  # of logits in a chunk, but
LEAST = 1024  # rows, whatever they take: below, reading W and dW again for each chunk costs as much as the products
GRAIN = 128  # rows; the products' own tiles
SCORED = 2048  # the largest D (of a pair, both together) whose statistics alone are made by a product of our own
PART_BYTES = 16 << 20  # of dW, where a chunk's part needs a place of its own: it should not leave the caches
HALF_LEAST = 1 << 26  # multiplications from which on dX and dW are products of 16-bit numbers; fewer take no time
GAIN_HALF = 1024.0  # float16 gradients of a loss's logits are kept multiplied by it: from 6e-11 on they are not 0


@triton.jit
def _copy(x, targets, out, D, row_stride, column_stride, begin, BLOCK: tl.constexpr):
    """Rows of hidden in the products' dtype; zeros where the target is ignored, for 0 times NaN would be NaN in dW."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(targets + begin + row) != IGNORED
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = (begin + row) * row_stride + column.to(tl.int64) * column_stride
        y = tl.load(x + at, mask=(column < D) & live, other=0.0)
        tl.store(out + row * D + column, y.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _column_sums(y, sums, rows, V, stride, factor, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a chunk adds to the gradient of the bias; y's rows have memory for the columns beyond V."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        part = tl.load(y + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        total += tl.where((column < V)[None, :], part, 0.0)
    added = factor * tl.sum(total, axis=0)
    if not FIRST:
        added += tl.load(sums + column, mask=column < V, other=0.0)
    tl.store(sums + column, added, mask=column < V)


@functools.cache
def _can(what: str, device: torch.device) -> bool:
    """Whether torch multiplies 16-bit numbers there with a float32 result ("multiply"), and adds it to one ("add")."""
    a, out = (torch.zeros((16, 16), dtype=x, device=device) for x in (torch.bfloat16, torch.float32))
    try:
        if what == "multiply":
            torch.mm(a, a, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _multiply_widely(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, of 16-bit numbers in float32."""
    if out.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0, add: bool = False) -> None:
    """out = a @ b * factor (+ out): from its float32 accumulator straight into `out`, of a's dtype or float32."""
    if a.dtype == out.dtype:
        if add or factor != 1:
            out.addmm_(a, b, beta=1 if add else 0, alpha=factor)
        else:
            torch.mm(a, b, out=out)
    elif not add:
        _multiply_widely(a, b, out)
        if factor != 1:
            out.mul_(factor)
    elif _can("add", out.device):
        torch.addmm(out, a, b, alpha=factor, out_dtype=torch.float32, out=out)
    else:
        step = max(1, PART_BYTES // (4 * out.shape[1]))
        for some, sums in zip(a.split(step), out.split(step), strict=True):
            part = torch.empty(sums.shape, dtype=torch.float32, device=out.device)
            _multiply_widely(some, b, part)
            sums.add_(part, alpha=factor)


def even(total: int, most: int) -> list[tuple[int, int]]:
    """[0, total) in the fewest parts of `most`, nearly of one size, a multiple of GRAIN where that is no more."""
    grain = min(GRAIN, most)
    parts = triton.cdiv(total, most // grain * grain)
    size = triton.cdiv(triton.cdiv(total, max(parts, 1)), grain) * grain
    return [(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1))]


class Head:
    """Rows of hidden, and the weight that they meet."""

    def __init__(self, name, hidden, weight, targets, bias=None, temperature=1.0, softcap=0.0):
        launch.serves(hidden, weight, bias)
        (self.V, self.D), self.N = weight.shape, targets.numel()
        check_targets(name, targets, self.V)
        self.dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        if self.dtype != torch.float32 and hidden.device.type != "cpu" and not _can("multiply", hidden.device):
            self.dtype = torch.float32
        self.given, self.hidden = hidden, hidden.detach().reshape(-1, self.D)
        self.weight, self.weight_dtype = weight.detach().to(self.dtype), weight.dtype
        if 1 not in self.weight.stride():
            self.weight = self.weight.contiguous()
        self.bias, self.bias_dtype = (None, None) if bias is None else (bias.detach().contiguous(), bias.dtype)
        self.targets = targets.contiguous()
        self.scalars = temperature, softcap
        self.stride = triton.cdiv(self.V, 64) * 64
        self.slope_dtype = self.dtype if self.N * self.V * self.D >= HALF_LEAST else torch.float32
        self.copies: dict[torch.dtype, Tensor] = {}

    @functools.cached_property
    def grouped_bias(self) -> Tensor | None:
        """The bias, in memory of whole groups, as which it is read."""
        if self.bias is None or self.V % softmax.EACH == 0:
            return self.bias
        return torch.nn.functional.pad(self.bias, (0, -self.V % softmax.EACH))

    def chunks(self, buffers: int = 1) -> list[tuple[int, int]]:
        return even(self.N, max(LEAST, BYTES // (4 * self.stride * buffers)))

    def buffer(self, chunks: list[tuple[int, int]]) -> Tensor:
        """Where the logits of one chunk go after the other."""
        return empty_float32(self.weight, max((end - begin for begin, end in chunks), default=0), self.stride)

    def copied(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of hidden for a product, zeros where they are ignored; the next chunk overwrites them."""
        if dtype not in self.copies:  # no chunk is larger than the first
            self.copies[dtype] = torch.empty((end - begin, self.D), dtype=dtype, device=self.hidden.device)
        block = launch.block(self.D, 2048)
        launch.run(
            _copy,
            (end - begin,),
            self.hidden,
            self.targets,
            self.copies[dtype],
            self.D,
            *self.hidden.stride(),
            begin,
            BLOCK=block,
            num_warps=launch.warps(block, 8),
        )
        return self.copies[dtype].narrow(0, 0, end - begin)

    def logits(self, begin: int, end: int, buffer: Tensor, other: "Head | None" = None, ref: Tensor | None = None):
        """The raw logits of a chunk, without the bias, in `buffer`; beside a reference's, in `ref`."""
        x = buffer.narrow(0, 0, end - begin)
        direct = self.hidden.dtype == self.dtype and 1 in self.hidden.stride()
        hidden = self.hidden.narrow(0, begin, end - begin) if direct else self.copied(begin, end, self.dtype)
        multiply(hidden, self.weight.t(), x.narrow(1, 0, self.V))
        ref = None if other is None else other.logits(begin, end, ref).x
        ref_bias = None if other is None else other.grouped_bias
        return rows.Logits(x, self.V, self.targets, *self.scalars, self.grouped_bias, ref, ref_bias, begin)

    def gradient_memory(self, of: rows.Logits) -> Tensor:
        """Where the gradient of those logits goes: their own memory, unless programs share a row of another dtype."""
        if self.slope_dtype == torch.float32:
            return of.x
        return rows.half_of(of.x, self.slope_dtype) if of.whole else torch.empty_like(of.x, dtype=self.slope_dtype)


def scored(of: Head, other: Head | None = None) -> bool:
    """Whether statistics alone come from _scoring.py's product, whose logits never reach memory, or by the library's.

    By count, not yet by measurement: ours saves 8 bytes of traffic a logit and is expected at 0.8 of the library's
    rate (beside a reference, in smaller tiles, at 0.65). On an H100 (700 TFLOP/s, 3.0 TB/s) these balance near
    D = 3000, with the softmax behind each tile near 2400 (1700 for the pair). Never by the number of rows: bits may not
    hang on it. The two ways differ by the rounding of float32 sums."""
    heads = [of] if other is None else [of, other]
    if of.dtype == torch.float32 or any(x.dtype != of.dtype or x.D % 8 for x in heads):
        return False
    return of.D <= SCORED if other is None else of.D + other.D <= SCORED


def _score(of: Head, other: Head | None) -> rows.Results:
    results = rows.Results.empty(of.targets, other is not None)
    m, log_sum, *ref = results.statistics.flatten(1).unbind()
    out = (results.logprobs.view(-1), results.entropy.view(-1), m, log_sum)
    head, targets = (of.hidden, of.weight), of.targets.view(-1)
    if other is None:
        scoring.score(*head, targets, of.bias, *of.scalars, out)
    else:
        out += (results.ref_logprobs.view(-1), results.kl.view(-1), *ref)
        scoring.score_pair(*head, other.hidden, other.weight, targets, *of.scalars, of.bias, other.bias, out)
    return results


def statistics(of: Head, other: Head | None = None) -> rows.Results:
    """Results of every row, without a gradient, beside a reference's."""
    if scored(of, other):
        return _score(of, other)
    results, chunks = rows.Results.empty(of.targets, other is not None), of.chunks(1 if other is None else 2)
    buffer, ref = of.buffer(chunks), None if other is None else other.buffer(chunks)
    for begin, end in chunks:
        rows.statistics(of.logits(begin, end, buffer, other, ref), results)
    return results


def train(of: Head, loss: rows.Loss, by: tuple[bool, bool, bool]) -> tuple[rows.Results, tuple[Tensor, Tensor, Tensor]]:
    """Results of every row, and the gradients of hidden, weight and bias by a loss that follows from them."""
    if not any(by):
        return statistics(of), head.empty_input_grads(of.given, of.weight, of.bias, by)
    results, chunks = rows.Results.empty(of.targets), of.chunks()
    gain = GAIN_HALF if of.slope_dtype == torch.float16 else 1.0
    buffer, out = of.buffer(chunks), Gradients(of, by, chunks, gain)
    for begin, end in chunks:
        logits = of.logits(begin, end, buffer)
        y = of.gradient_memory(logits)
        rows.statistics(logits, results, loss, y, gain)
        out.add(begin, end, y.narrow(1, 0, of.V))
    return results, out.finish()


def gradients(
    of: Head, known: rows.Results, slopes: tuple[Tensor, Tensor, Tensor | None], by: tuple[bool, bool, bool],
    other: Head | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias by the slopes of rows whose statistics are known, slopes of any size."""
    chunks = of.chunks(1 if other is None else 2)
    buffer, ref = of.buffer(chunks), None if other is None else other.buffer(chunks)
    out = Gradients(of, by, chunks)
    for begin, end in chunks if any(by) else ():
        logits = of.logits(begin, end, buffer, other, ref)
        y = of.gradient_memory(logits)
        rows.gradient(logits, known, slopes, y)
        out.add(begin, end, y.narrow(1, 0, of.V))
    return out.finish()


class Gradients:
    """Of hidden, weight and bias, as the chunks bring them; one that is not asked for costs nothing.

    gain: what the gradients of the logits come multiplied by."""

    def __init__(self, of: Head, by: tuple[bool, bool, bool], chunks: list[tuple[int, int]], gain: float = 1.0):
        def empty(x: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.empty(x.shape, dtype=dtype, device=x.device)

        self.of, self.factor = of, 1 / gain
        one = len(chunks) == 1 and of.weight_dtype == of.slope_dtype
        self.by_weight = of.weight.to(of.slope_dtype) if by[0] else None
        self.hidden = empty(of.hidden, of.slope_dtype) if by[0] else None
        self.weight = empty(of.weight, of.slope_dtype if one else torch.float32) if by[1] else None
        self.bias = empty(of.bias, torch.float32) if by[2] else None

    def add(self, begin: int, end: int, y: Tensor) -> None:
        """y: gradient of the chunk's logits, times `gain`."""
        of = self.of
        if self.hidden is not None:
            multiply(y, self.by_weight, self.hidden.narrow(0, begin, end - begin), self.factor)
        if self.weight is not None:
            multiply(y.t(), of.copied(begin, end, of.slope_dtype), self.weight, self.factor, add=begin > 0)
        if self.bias is not None:
            launch.run(
                _column_sums,
                (triton.cdiv(of.V, 64),),
                y,
                self.bias,
                end - begin,
                of.V,
                y.stride(0),
                self.factor,
                FIRST=begin == 0,
                ROWS=64,
                COLUMNS=64,
                num_warps=4,
            )

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """In their dtypes and shapes, (0,) where not asked for."""
        of, nothing = self.of, self.of.given.new_empty
        if not of.N:
            for x in (self.weight, self.bias):
                if x is not None:
                    x.zero_()
        return (
            nothing(0) if self.hidden is None else self.hidden.to(of.hidden.dtype).view(of.given.shape),
            nothing(0) if self.weight is None else self.weight.to(of.weight_dtype),
            nothing(0) if self.bias is None else self.bias.to(of.bias_dtype),
        )
