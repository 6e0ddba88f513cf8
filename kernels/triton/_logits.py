"""Rows of logits on a GPU, given ones or a chunk of a head's own: what the ops of both launch. Not an op.

Many rows: a program a row. It walks the row once for the statistics, knows then what the loss's slopes are, and walks
it once more, from the end, where the caches still have it, to write the gradient. Few rows (fewer than fill the GPU):
a program for each segment of a row, in `_parts`; `_rows` then joins the segments, and `_gradient` writes the gradient
of each. Both ways give the same bits. An ignored row is never read.

Bytes a logit: its statistics read it once, its gradient reads it and is written once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import _ppo as policy
from rlhf_fast.kernels.triton import _softmax as softmax
from rlhf_fast.kernels.triton import launch

A_PROCESSOR = 4  # programs of whole rows that should be there for each
NONE, GIVEN, LIKELIHOOD, POLICY = (tl.constexpr(i) for i in range(4))


@triton.jit
def _parts(
    x, ref, bias, ref_bias, targets, parts, V, x_stride, begin, rows, inverse_temperature, softcap, inverse_softcap,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """parts (segments, 6, rows): the sums of every segment."""
    row, segment = (tl.program_id(0) % rows).to(tl.int64), tl.program_id(0) // rows
    by = (inverse_temperature, softcap, inverse_softcap)
    if ref is not None:
        ref += row * x_stride
    base, skew = softmax.rounded_down(x + row * x_stride, ALIGNED, EACH)
    here = tl.load(targets + begin + row) != softmax.IGNORED
    tiles = tl.where(here, tl.cdiv(V + skew, UNROLL * LANES * EACH), 0)
    first = segment * SEGMENT
    sums = softmax.segment_statistics(
        base,
        ref,
        bias,
        ref_bias,
        skew,
        V,
        first,
        tl.minimum(first + SEGMENT, tiles),
        by,
        ALIGNED,
        CAP,
        UNROLL,
        LANES,
        EACH,
    )
    part = parts + segment * 6 * rows + row
    for i in tl.static_range(6 if ref is not None else 3):
        tl.store(part + i * rows, sums[i])


@triton.jit
def _rows(
    x, ref, y, bias, ref_bias, targets, parts, logprobs, entropy, statistics, ref_logprobs, kl, slopes,
    grad_logprobs, grad_entropy, weights, count, old_logprobs, advantages, drawn_logprobs, shift, factor,
    V, x_stride, y_stride, begin, rows, N, inverse_temperature, softcap, inverse_softcap,
    low, high, dual_clip, bound, kl_coef, entropy_coef, gain,
    LOSS: tl.constexpr, DUAL: tl.constexpr, ESTIMATOR: tl.constexpr, CAP: tl.constexpr, ALIGNED: tl.constexpr,
    BARRIER: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The results of a row, its statistics made here or joined from `parts`, its gradient, and its slopes."""
    local = tl.program_id(0).to(tl.int64)
    row = begin + local
    by = (inverse_temperature, softcap, inverse_softcap)
    REF: tl.constexpr = ref is not None
    if REF:
        ref += local * x_stride
    x_row = x + local * x_stride
    base, skew = softmax.rounded_down(x_row, ALIGNED, EACH)
    target = tl.load(targets + row).to(tl.int64)
    here = target != softmax.IGNORED
    tiles = tl.where(here, tl.cdiv(V + skew, UNROLL * LANES * EACH), 0)
    known = (target >= 0) & (target < V)
    z = softmax.scaled(softmax.raw_one(x_row, bias, target, known), by, CAP)  # before the gradient may lie over it
    z2 = z
    if REF:
        z2 = softmax.scaled(softmax.raw_one(ref, ref_bias, target, known), by, CAP)
    sums = softmax.nothing_yet()
    if parts is None:
        for first in range(0, tiles, SEGMENT):
            more = softmax.segment_statistics(
                base, ref, bias, ref_bias, skew, V, first, tl.minimum(first + SEGMENT, tiles), by, ALIGNED, CAP, UNROLL,
                LANES, EACH,
            )  # fmt: skip
            sums = softmax.joined(sums, more, REF)
    else:
        for segment in range(0, tl.cdiv(tiles, SEGMENT)):
            more = softmax.loaded(parts + segment * 6 * rows + local, rows, REF)
            sums = softmax.joined(sums, more, REF)
    m, m2, mean = sums[0], sums[3], sums[2] / sums[1]
    log_sum, log_sum2 = tl.log(sums[1]), tl.log(sums[4])
    logp, h = (z - m) - log_sum, log_sum - mean
    if logprobs is not None:
        tl.store(logprobs + row, tl.where(here, logp, 0.0))
        tl.store(entropy + row, tl.where(here, h, 0.0))
    if statistics is not None:
        tl.store(statistics + row, tl.where(here, m, 0.0))
        tl.store(statistics + N + row, tl.where(here, log_sum, 0.0))
    if REF:
        tl.store(ref_logprobs + row, tl.where(here, (z2 - m2) - log_sum2, 0.0))
        tl.store(kl + row, tl.where(here, (mean - sums[5] / sums[1]) - (log_sum - log_sum2), 0.0))
        if statistics is not None:
            tl.store(statistics + 2 * N + row, tl.where(here, m2, 0.0))
            tl.store(statistics + 3 * N + row, tl.where(here, log_sum2, 0.0))
    if LOSS != NONE:
        by_logprob, by_entropy = 0.0, 0.0
        if LOSS == GIVEN:
            by_logprob = tl.load(grad_logprobs + row).to(tl.float32)
            by_entropy = tl.load(grad_entropy + row).to(tl.float32)
        elif LOSS == POLICY:
            by_logprob, by_entropy = policy.row_slopes(
                row, logp, weights, old_logprobs, advantages, drawn_logprobs, shift, factor,
                (low, high, dual_clip, bound), kl_coef, entropy_coef, DUAL, ESTIMATOR,
            )  # fmt: skip
        elif weights is None:
            by_logprob = -1.0 / tl.load(count).to(tl.float32)
        else:
            by_logprob = -tl.load(weights + row).to(tl.float32)
        if slopes is not None:
            tl.store(slopes + row, by_logprob)
            tl.store(slopes + N + row, by_entropy)
        if y is not None:
            column = tl.where(known, target, -1).to(tl.int32)
            live = here & ((by_logprob != 0) | (by_entropy != 0))
            each = (gain * by_logprob, -gain * (by_logprob + by_entropy * h), -gain * by_entropy, 0.0)
            softmax.write_gradient(
                x_row, None, y + local * y_stride, bias, None, V, 0, tl.cdiv(V + skew, UNROLL * LANES * EACH),
                column, live, (m, log_sum, 0.0, 0.0), each, by, ALIGNED, BARRIER, CAP, UNROLL, LANES, EACH,
            )  # fmt: skip


@triton.jit
def _gradient(
    x, ref, y, bias, ref_bias, targets, entropy, kl, statistics, grad_logprobs, grad_entropy, grad_kl,
    V, x_stride, y_stride, begin, rows, N, inverse_temperature, softcap, inverse_softcap, gain,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, BARRIER: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr,
    LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of a row whose statistics are known: the gradient of SEGMENT tiles, or of the whole row where that is 0."""
    local, segment = (tl.program_id(0) % rows).to(tl.int64), tl.program_id(0) // rows
    row = begin + local
    if ref is not None:
        ref += local * x_stride
    x += local * x_stride
    _, skew = softmax.rounded_down(x, ALIGNED, EACH)
    target = tl.load(targets + row).to(tl.int64)
    here, column = target != softmax.IGNORED, tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    g = tl.load(grad_logprobs + row, mask=here, other=0.0).to(tl.float32)
    h = tl.load(grad_entropy + row, mask=here, other=0.0).to(tl.float32)
    live, inner = (g != 0) | (h != 0), g + h * tl.load(entropy + row, mask=here, other=0.0)
    of = (tl.load(statistics + row), tl.load(statistics + N + row))
    k, known = 0.0, (0.0, 0.0)
    if ref is not None:
        k = tl.load(grad_kl + row, mask=here, other=0.0).to(tl.float32)
        live, inner = live | (k != 0), inner + k * tl.load(kl + row, mask=here, other=0.0)
        known = (tl.load(statistics + 2 * N + row), tl.load(statistics + 3 * N + row))
    last = tl.cdiv(V + skew, UNROLL * LANES * EACH)
    first, end = segment * SEGMENT, last
    if SEGMENT != 0:
        end = tl.minimum(first + SEGMENT, last)
    softmax.write_gradient(
        x, ref, y + local * y_stride, bias, ref_bias, V, first, end, column, here & live, of + known,
        (gain * g, -gain * inner, -gain * h, -gain * k), (inverse_temperature, softcap, inverse_softcap),
        ALIGNED, BARRIER, CAP, UNROLL, LANES, EACH,
    )  # fmt: skip


class Logits(NamedTuple):
    """Rows of raw logits, and what is known of them: rows from `begin` on of all N. ref: a reference's logits, in rows
    as far apart. `aligned`: our own rows, which start at 32 bytes and may be read and written a little beyond V, as the
    biases may be read."""

    x: Tensor
    V: int
    targets: Tensor
    temperature: float
    softcap: float
    bias: Tensor | None = None
    ref: Tensor | None = None
    ref_bias: Tensor | None = None
    begin: int = 0
    aligned: bool = True

    @property
    def scaling(self) -> tuple[float, float, float]:
        return 1 / self.temperature, self.softcap, 1 / self.softcap if self.softcap else 0.0

    @property
    def half(self) -> bool:
        return self.ref is not None or self.bias is not None or self.softcap > 0

    @property
    def segments(self) -> int:
        return softmax.segments(self.V, self.half)

    @property
    def whole(self) -> bool:
        """Whether a program takes a row, not a segment of it."""
        return self.segments == 1 or len(self.x) >= A_PROCESSOR * launch.processors(self.x)

    @property
    def constants(self) -> dict:
        return {"CAP": self.softcap > 0, "ALIGNED": self.aligned, **softmax.geometry(self.V, self.half)}


class Results(NamedTuple):
    """What is known of N rows, float32: statistics are (2, N), or (4, N) with a reference: m, log s, of both."""

    logprobs: Tensor
    entropy: Tensor
    statistics: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor | None

    @staticmethod
    def empty(targets: Tensor, reference: bool = False) -> "Results":
        def floats(*shape):
            return torch.empty((*shape, *targets.shape), dtype=torch.float32, device=targets.device)

        rest = (floats(), floats()) if reference else (None, None)
        return Results(floats(), floats(), floats(4 if reference else 2), *rest)


class Loss(NamedTuple):
    """What a row's slopes by its log-probability and its entropy follow from. kind: GIVEN, their gradients; LIKELIHOOD,
    minus weights, or minus one over `count`; POLICY, PPO's."""

    kind: tl.constexpr
    grad_logprobs: Tensor | None = None
    grad_entropy: Tensor | None = None
    weights: Tensor | None = None
    count: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    ref_logprobs: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    bounds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    coefficients: tuple[float, float] = (0.0, 0.0)
    estimator: str = "k1"


def half_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper half of the memory of each float32 row of x, as a row of 16-bit numbers."""
    return x.view(dtype).narrow(1, x.shape[1], x.shape[1])


def statistics(of: Logits, results: Results, loss: Loss | None = None, y: Tensor | None = None, gain: float = 1.0):
    """Results of the rows and, with a loss, the gradient of the raw logits in y (rows, at least V), times `gain`.

    y may be x, or `half_of` x where of.whole."""
    loss = loss or Loss(NONE)
    rows, N = len(of.x), of.targets.numel()
    parts = slopes = None
    if not of.whole:
        many = of.segments
        parts = torch.empty((many, 6, rows), dtype=torch.float32, device=of.x.device)
        launch.run(
            _parts,
            (rows * many,),
            of.x,
            of.ref,
            of.bias,
            of.ref_bias,
            of.targets,
            parts,
            of.V,
            of.x.stride(0),
            of.begin,
            rows,
            *of.scaling,
            SEGMENT=softmax.SEGMENT,
            **of.constants,
        )
        if y is not None:
            slopes = torch.empty((2, N), dtype=torch.float32, device=of.x.device)
    direct = y if of.whole else None
    launch.run(
        _rows,
        (rows,),
        of.x,
        of.ref,
        direct,
        of.bias,
        of.ref_bias,
        of.targets,
        parts,
        *results,
        slopes,
        *loss[1:10],
        of.V,
        of.x.stride(0),
        0 if direct is None else direct.stride(0),
        of.begin,
        rows,
        N,
        *of.scaling,
        *loss.bounds,
        *loss.coefficients,
        gain,
        LOSS=loss.kind.value,
        DUAL=loss.bounds[2] > 0,
        ESTIMATOR=loss.estimator,
        BARRIER=direct is not None and direct.dtype != of.x.dtype,
        SEGMENT=softmax.SEGMENT,
        **of.constants | ({} if of.whole else {"num_warps": 1}),
    )
    if slopes is not None:
        gradient(of, results, (*slopes.unbind(), None), y, gain)


def gradient(of: Logits, known: Results, slopes: tuple[Tensor, Tensor, Tensor | None], y: Tensor, gain: float = 1.0):
    """The gradient of the raw logits, times `gain`, by the slopes of log p, entropy and KL, of known statistics."""
    segments = 1 if of.whole else of.segments
    launch.run(
        _gradient,
        (len(of.x) * segments,),
        of.x,
        of.ref,
        y,
        of.bias,
        of.ref_bias,
        of.targets,
        known.entropy,
        known.kl,
        known.statistics,
        *slopes,
        of.V,
        of.x.stride(0),
        y.stride(0),
        of.begin,
        len(of.x),
        of.targets.numel(),
        *of.scaling,
        gain,
        BARRIER=of.aligned and y.dtype != of.x.dtype and of.whole,
        SEGMENT=0 if of.whole else softmax.SEGMENT,
        **of.constants,
    )
