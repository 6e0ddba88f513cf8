"""Rows of logits on a GPU, given ones or a chunk of a head's own: statistics and gradients. Not an op.

token_logprobs and the linear ops launch these kernels:

    many rows    | row 0 |           one program per row (`row_kernel`). It walks the row once for the statistics, which
                 | row 1 |           give the gradients of the loss, and once more, from the end, where the caches still
                   ...               have the row, to store the gradient of the logits.

    few rows     | seg 0 | seg 1 | ... | row 0    one program per segment (`segment_kernel`), then one per row that
                 | seg 0 | seg 1 | ... | row 1    merges them (`row_kernel`), then one per segment for the gradient
                                                  of the logits (`gradient_kernel`).

Both give the same bits. An ignored row is never read. _softmax.py has the mathematics and the picture of a tile.

Floor: the statistics read each logit once; its gradient reads and writes it once. The second read of a head's float32
logits, 4 of their 10 bytes, comes from memory but for the end of the row: 5 programs on each of an H100's 132 SMs walk
660 rows of 608 KB (V = 151936) at a time, and its L2 cache has 50 MB.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _ppo as ppo
from rlhf_fast.kernels.triton import _softmax as softmax
from rlhf_fast.kernels.triton import _target, launch

ROWS_PER_SM = 4  # rows for each SM from which on one program takes a whole row
LOSS_NONE, LOSS_GIVEN, LOSS_CROSS_ENTROPY, LOSS_PPO = (tl.constexpr(i) for i in range(4))


class RowInputs(NamedTuple):
    """The rows of a chunk. Kernels make a `softmax.Row` of it themselves: Triton 3.6 cannot return None in a tuple."""

    x: Tensor  # raw logits without the bias
    bias: Tensor | None
    ref: Tensor | None  # raw logits of a reference, with x's stride
    ref_bias: Tensor | None
    targets: Tensor
    V: int
    stride: int


class RowRange(NamedTuple):
    """A chunk's rows: `num_rows` of all N rows, from `first` on.

    Kernels take the numbers one by one: Triton compiles anew for a number in a tuple that is 1 or a multiple of 16."""

    first: int
    num_rows: int
    N: int


class Statistics(NamedTuple):
    """Results of N rows, float32. sums: of all columns but the target the largest raw logit and s; with a reference
    also its two, and their part of the KL."""

    logprobs: Tensor | None
    entropy: Tensor
    sums: Tensor | None  # (2, N) or (5, N)
    ref_logprobs: Tensor | None
    kl: Tensor | None
    log_z: Tensor | None = None
    top1: Tensor | None = None  # uint8: 1 where the target has the largest logit, else 0

    @staticmethod
    def empty(targets: Tensor, has_ref: bool = False, has_log_z: bool = False) -> "Statistics":
        def floats(*leading):
            return empty_float32(targets, *leading, *targets.shape)

        ref = (floats(), floats()) if has_ref else (None, None)
        log_z = (floats(), torch.empty_like(targets, dtype=torch.uint8)) if has_log_z else (None, None)
        return Statistics(floats(), floats(), floats(5 if has_ref else 2), *ref, *log_z)


class RowGrads(NamedTuple):
    """Gradients of a loss with respect to rows' log p, entropy, KL and log_z, of N rows each."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None
    log_z: Tensor | None = None


class CrossEntropy(NamedTuple):
    """The loss -sum weights log p; without weights they are 1 / num_valid, a tensor of one element."""

    weights: Tensor | None
    num_valid: Tensor | None


class PolicyLoss(NamedTuple):
    """PPO's loss of a row."""

    tokens: ppo.Tokens
    clip: ppo.ClipBounds
    kl_coef: float
    entropy_coef: float


class Loss(NamedTuple):
    """A loss whose gradients with respect to a row's log p and entropy follow from its statistics, or are given."""

    kind: tl.constexpr = LOSS_NONE
    inputs: RowGrads | CrossEntropy | PolicyLoss | None = None
    is_dual: bool = False
    is_cispo: bool = False
    estimator: str = "k1"

    @staticmethod
    def of_grads(logprobs: Tensor, entropy: Tensor) -> "Loss":
        return Loss(LOSS_GIVEN, RowGrads(logprobs, entropy))

    @staticmethod
    def cross_entropy(weights: Tensor | None, num_valid: Tensor | None) -> "Loss":
        return Loss(LOSS_CROSS_ENTROPY, CrossEntropy(weights, num_valid))

    @staticmethod
    def ppo(
        tokens: ppo.Tokens, clip: ppo.ClipBounds, kl_coef: float, kl_estimator: str, entropy_coef: float, is_cispo: bool
    ) -> "Loss":  # fmt: skip
        return Loss(LOSS_PPO, PolicyLoss(tokens, clip, kl_coef, entropy_coef), clip.dual > 0, is_cispo, kl_estimator)


@triton.jit
def column_of(target, V):
    """Return the column of a target, or -1 if it does not exist."""
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def segment_kernel(
    rows, first_row, num_rows, parts, scaling,
    SEGMENT: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store the state of the program's segment in parts (segments, 6, num_rows)."""
    local = (tl.program_id(0) % num_rows).to(tl.int64)
    segment = tl.program_id(0) // num_rows
    ref = rows.ref
    if rows.ref is not None:
        ref = rows.ref + local * rows.stride
    row = softmax.Row(rows.x + local * rows.stride, rows.bias, ref, rows.ref_bias)
    base, misalignment = softmax.align_down(row.x, ALIGNED, VEC)
    target = tl.load(rows.targets + first_row + local).to(tl.int64)
    valid = target != launch.IGNORE_INDEX
    tiles = tl.where(valid, tl.cdiv(rows.V + misalignment, UNROLL * THREADS * VEC), 0)
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, tiles)
    aligned_row = softmax.Row(base, row.bias, row.ref, row.ref_bias)
    state = softmax.segment_state(
        aligned_row, misalignment, rows.V, column_of(target, rows.V), first, end, scaling,
        CAP, ALIGNED, UNROLL, THREADS, VEC,
    )  # fmt: skip
    part = parts + segment * 6 * num_rows + local
    for i in tl.static_range(6 if rows.ref is not None else 3):
        tl.store(part + i * num_rows, state[i])


@triton.jit
def merge_segments(parts, local, num_rows, segments, scaling, CAP: tl.constexpr, REF: tl.constexpr):
    """Return the state of a row from those of its segments."""
    state = softmax.empty_state()
    for segment in range(0, segments):
        part = softmax.load_state(parts + segment * 6 * num_rows + local, num_rows, REF)
        state = softmax.merge(state, part, scaling, CAP, REF)
    return state


@triton.jit
def walk_row(
    row, misalignment, V, column, tiles, scaling,
    SEGMENT: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Return the state of a row without the target's column, segment by segment."""
    state = softmax.empty_state()
    for first in range(0, tiles, SEGMENT):
        end = tl.minimum(first + SEGMENT, tiles)
        part = softmax.segment_state(
            row, misalignment, V, column, first, end, scaling, CAP, ALIGNED, UNROLL, THREADS, VEC
        )
        state = softmax.merge(state, part, scaling, CAP, row.ref is not None)
    return state


@triton.jit
def store_statistics(out, row, N, state, logit, ref_logit, valid, scaling, CAP: tl.constexpr, REF: tl.constexpr):
    """Store the statistics of a row with state `state` and the target's raw logits. Return its `Target`."""
    lead, error = _target.lead_over(logit, state.m, scaling, CAP)
    target = _target.join(lead, error, state.s, _target.LN2 * state.a)
    if out.logprobs is not None:
        tl.store(out.logprobs + row, tl.where(valid, target.logp, 0.0))
        tl.store(out.entropy + row, tl.where(valid, target.entropy, 0.0))
    if out.sums is not None:
        tl.store(out.sums + row, tl.where(valid, state.m, 0.0))
        tl.store(out.sums + N + row, tl.where(valid, state.s, 0.0))
    if out.log_z is not None:
        log_z, is_top1 = _target.log_z_and_top1(target, logit, state.m, scaling, CAP)
        tl.store(out.log_z + row, tl.where(valid, log_z, 0.0))
        tl.store(out.top1 + row, (valid & is_top1).to(tl.uint8))
    if REF:
        ref_lead, ref_error = _target.lead_over(ref_logit, state.m2, scaling, CAP)
        ref_target = _target.join(ref_lead, ref_error, state.s2, 0.0)
        kl, kl_of_others = softmax.row_kl(state.a - state.b, target, ref_target)
        tl.store(out.ref_logprobs + row, tl.where(valid, ref_target.logp, 0.0))
        tl.store(out.kl + row, tl.where(valid, kl, 0.0))
        if out.sums is not None:
            tl.store(out.sums + 2 * N + row, tl.where(valid, state.m2, 0.0))
            tl.store(out.sums + 3 * N + row, tl.where(valid, state.s2, 0.0))
            tl.store(out.sums + 4 * N + row, tl.where(valid, kl_of_others, 0.0))
    return target


@triton.jit
def loss_grads(
    loss, row, logp, LOSS: tl.constexpr, DUAL: tl.constexpr, CISPO: tl.constexpr, ESTIMATOR: tl.constexpr
):  # fmt: skip
    """Return the gradients of the loss with respect to a row's log p and entropy."""
    logprob_grad = 0.0
    entropy_grad = 0.0
    if LOSS == LOSS_GIVEN:
        logprob_grad = tl.load(loss.logprobs + row).to(tl.float32)
        entropy_grad = tl.load(loss.entropy + row).to(tl.float32)
    elif LOSS == LOSS_PPO:
        logprob_grad, entropy_grad = ppo.row_grads(
            row, logp, loss.tokens, loss.clip, loss.kl_coef, loss.entropy_coef, DUAL, CISPO, ESTIMATOR
        )
    elif loss.weights is None:
        logprob_grad = -1.0 / tl.load(loss.num_valid).to(tl.float32)
    else:
        logprob_grad = -tl.load(loss.weights + row).to(tl.float32)
    return logprob_grad, entropy_grad


@triton.jit(do_not_specialize=["first_row", "num_rows", "N"])
def row_kernel(
    rows, first_row, num_rows, N, parts, out, loss, grads, y, y_stride, scaling, gain,
    LOSS: tl.constexpr, DUAL: tl.constexpr, CISPO: tl.constexpr, ESTIMATOR: tl.constexpr,
    BARRIER: tl.constexpr, SEGMENT: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store a row's statistics, made by a walk or merged from `parts`; with a loss also its gradients with respect to
    log p and entropy in grads (2, N), and `gain` times the gradient of the logits in y."""
    REF: tl.constexpr = rows.ref is not None
    V = rows.V
    local = tl.program_id(0).to(tl.int64)
    index = first_row + local
    ref = rows.ref
    if rows.ref is not None:
        ref = rows.ref + local * rows.stride
    row = softmax.Row(rows.x + local * rows.stride, rows.bias, ref, rows.ref_bias)
    base, misalignment = softmax.align_down(row.x, ALIGNED, VEC)
    target = tl.load(rows.targets + index).to(tl.int64)
    valid = target != launch.IGNORE_INDEX
    all_tiles = tl.cdiv(V + misalignment, UNROLL * THREADS * VEC)
    tiles = tl.where(valid, all_tiles, 0)
    column = column_of(target, V)
    # The target's logit is loaded before the gradient may overwrite it.
    logit = softmax.load_logit(row.x, row.bias, target, column >= 0)
    ref_logit = logit
    if REF:
        ref_logit = softmax.load_logit(row.ref, row.ref_bias, target, column >= 0)
    if parts is None:
        aligned_row = softmax.Row(base, row.bias, row.ref, row.ref_bias)
        state = walk_row(
            aligned_row, misalignment, V, column, tiles, scaling, SEGMENT, CAP, ALIGNED, UNROLL, THREADS, VEC
        )
    else:
        state = merge_segments(parts, local, num_rows, tl.cdiv(tiles, SEGMENT), scaling, CAP, REF)
    result = store_statistics(out, index, N, state, logit, ref_logit, valid, scaling, CAP, REF)
    if LOSS != LOSS_NONE:
        logprob_grad, entropy_grad = loss_grads(loss, index, result.logp, LOSS, DUAL, CISPO, ESTIMATOR)
        if grads is not None:
            tl.store(grads + index, logprob_grad)
            tl.store(grads + N + index, entropy_grad)
        if y is not None:
            is_nan = result.entropy != result.entropy  # it reaches the gradient even if its loss has no weight
            has_grad = valid & ((logprob_grad != 0) | (entropy_grad != 0) | is_nan)
            result = _target.known_target(result.logp, result.entropy, state.s)  # the bits of gradient_kernel
            coefficients = softmax.coefficients_of(result, gain * logprob_grad, gain * entropy_grad)
            policy_row = softmax.Row(row.x, row.bias, None, None)
            base = softmax.apply_softcap(state.m, scaling, CAP)
            normalizer = softmax.Normalizer(base, result.factor, _target.LOG2_E * result.log_factor, 0.0)
            softmax.store_gradient(
                policy_row, y + local * y_stride, V, 0, all_tiles, column, has_grad, normalizer, coefficients, scaling,
                BARRIER, CAP, ALIGNED, UNROLL, THREADS, VEC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "num_rows", "N"])
def gradient_kernel(
    rows, first_row, num_rows, N, known, grads, y, y_stride, scaling, gain,
    BARRIER: tl.constexpr, SEGMENT: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store `gain` times the gradient of the logits of SEGMENT tiles, or of the whole row where SEGMENT is 0, of a row
    with known statistics. grads: `RowGrads`."""
    V = rows.V
    local = (tl.program_id(0) % num_rows).to(tl.int64)
    segment = tl.program_id(0) // num_rows
    index = first_row + local
    ref = rows.ref
    if rows.ref is not None:
        ref = rows.ref + local * rows.stride
    row = softmax.Row(rows.x + local * rows.stride, rows.bias, ref, rows.ref_bias)
    _, misalignment = softmax.align_down(row.x, ALIGNED, VEC)
    target = tl.load(rows.targets + index).to(tl.int64)
    valid = target != launch.IGNORE_INDEX
    column = column_of(target, V)
    logprob_grad = tl.load(grads.logprobs + index, mask=valid, other=0.0).to(tl.float32)
    entropy_grad = tl.load(grads.entropy + index, mask=valid, other=0.0).to(tl.float32)
    logp = tl.load(known.logprobs + index)
    entropy = tl.load(known.entropy + index)
    has_grad = (logprob_grad != 0) | (entropy_grad != 0) | (entropy != entropy)
    result = _target.known_target(logp, entropy, tl.load(known.sums + N + index))
    coefficients = softmax.coefficients_of(result, gain * logprob_grad, gain * entropy_grad)
    if grads.log_z is not None:
        log_z_grad = tl.load(grads.log_z + index, mask=valid, other=0.0).to(tl.float32)
        has_grad = has_grad | (log_z_grad != 0)
        coefficients = softmax.add_log_z(coefficients, result, gain * log_z_grad)
    base = softmax.apply_softcap(tl.load(known.sums + index), scaling, CAP)
    base2 = 0.0
    if rows.ref is not None:
        kl_grad = tl.load(grads.kl + index, mask=valid, other=0.0).to(tl.float32)
        has_grad = has_grad | (kl_grad != 0)
        ref_logp = tl.load(known.ref_logprobs + index)
        base2 = softmax.apply_softcap(tl.load(known.sums + 2 * N + index), scaling, CAP)
        # Not from log p_ref, which is 0 where the reference's target is far ahead.
        ref_logit = softmax.load_logit(row.ref, row.ref_bias, target, (column >= 0) & valid)
        ref_lead, ref_error = _target.lead_over(ref_logit, tl.load(known.sums + 2 * N + index), scaling, CAP)
        ref_log_factor = _target.join(ref_lead, ref_error, tl.load(known.sums + 3 * N + index), 0.0).log_factor
        kl = tl.load(known.kl + index)
        kl_of_others = tl.load(known.sums + 4 * N + index)
        coefficients = softmax.add_kl(
            coefficients, result, ref_logp, ref_log_factor, kl, kl_of_others, gain * kl_grad
        )  # fmt: skip
    normalizer = softmax.Normalizer(base, result.factor, _target.LOG2_E * result.log_factor, base2)
    tiles = tl.cdiv(V + misalignment, UNROLL * THREADS * VEC)
    first = segment * SEGMENT
    end = tiles
    if SEGMENT != 0:
        end = tl.minimum(first + SEGMENT, tiles)
    softmax.store_gradient(
        row, y + local * y_stride, V, first, end, column, valid & has_grad, normalizer, coefficients, scaling,
        BARRIER, CAP, ALIGNED, UNROLL, THREADS, VEC,
    )  # fmt: skip


class Logits(NamedTuple):
    """Rows of raw logits: those from `first` on of all N rows, which `targets` has.

    aligned: rows are our own. They start at 32 bytes and may be read and written a little beyond V, and the biases may
    be read so."""

    x: Tensor
    V: int
    targets: Tensor
    temperature: float
    softcap: float
    bias: Tensor | None = None
    ref: Tensor | None = None
    ref_bias: Tensor | None = None
    first: int = 0
    aligned: bool = True

    @property
    def inputs(self) -> RowInputs:
        return RowInputs(self.x, self.bias, self.ref, self.ref_bias, self.targets, self.V, self.x.stride(0))

    @property
    def row_range(self) -> RowRange:
        return RowRange(self.first, len(self.x), self.targets.numel())

    @property
    def scaling(self) -> _target.Scaling:
        return _target.Scaling.of(self.temperature, self.softcap)

    @property
    def is_register_heavy(self) -> bool:
        return self.ref is not None or self.bias is not None or self.softcap > 0

    @property
    def num_segments(self) -> int:
        return softmax.num_segments(self.V, self.is_register_heavy)

    @property
    def is_walked_whole(self) -> bool:
        """True if one program takes a whole row, not a segment of it."""
        return self.num_segments == 1 or len(self.x) >= ROWS_PER_SM * launch.num_sms(self.x)

    @property
    def meta(self) -> dict:
        tile = softmax.tile_meta(self.V, self.is_register_heavy)
        return {"CAP": self.softcap > 0, "ALIGNED": self.aligned, **tile}


def upper_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the upper half of the memory of each float32 row of x, as a row in a 16-bit dtype."""
    return x.view(dtype).narrow(1, x.shape[1], x.shape[1])


def compute_statistics(logits: Logits, out: Statistics, loss: Loss | None = None, y: Tensor | None = None, gain=1.0):
    """Compute the statistics of the rows and, with a loss, `gain` times the gradient of the raw logits.

    y (rows, at least V) receives the gradient. It may be logits.x, or its `upper_half` if rows are walked whole."""
    loss = loss or Loss()
    rows = logits.inputs
    row_range = logits.row_range
    parts = grads = None
    if not logits.is_walked_whole:
        segments = logits.num_segments
        parts = empty_float32(rows.x, segments, 6, row_range.num_rows)
        meta = {"SEGMENT": softmax.SEGMENT, **logits.meta}
        grid = (row_range.num_rows * segments,)
        launch.run(segment_kernel, grid, rows, *row_range[:2], parts, logits.scaling, **meta)
        if y is not None:
            grads = empty_float32(rows.x, 2, row_range.N)
    row_y = y if logits.is_walked_whole else None
    y_stride = 0 if row_y is None else row_y.stride(0)
    meta = {
        "LOSS": loss.kind.value,
        "DUAL": loss.is_dual,
        "CISPO": loss.is_cispo,
        "ESTIMATOR": loss.estimator,
        "BARRIER": row_y is not None and row_y.dtype != rows.x.dtype,
        "SEGMENT": softmax.SEGMENT,
        **logits.meta,
    }
    if not logits.is_walked_whole:
        meta["num_warps"] = 1
    outputs = (out, loss.inputs, grads, row_y, y_stride)
    grid = (row_range.num_rows,)
    launch.run(row_kernel, grid, rows, *row_range, parts, *outputs, logits.scaling, gain, **meta)
    if grads is not None:
        compute_gradient(logits, out, RowGrads(*grads.unbind()), y, gain)


def compute_gradient(logits: Logits, known: Statistics, grads: RowGrads, y: Tensor, gain: float = 1.0):
    """Store `gain` times the gradient of the raw logits of rows with known statistics in y (rows, at least V)."""
    rows = logits.inputs
    row_range = logits.row_range
    is_whole = logits.is_walked_whole
    segments = 1 if is_whole else logits.num_segments
    meta = {
        "BARRIER": logits.aligned and y.dtype != rows.x.dtype and is_whole,
        "SEGMENT": 0 if is_whole else softmax.SEGMENT,
        **logits.meta,
    }
    grid = (row_range.num_rows * segments,)
    launch.run(gradient_kernel, grid, rows, *row_range, known, grads, y, y.stride(0), logits.scaling, gain, **meta)
