"""The softmax of a row of logits on a GPU: its statistics in one walk over the row, its gradient in another. Not an op.

    y = x + bias, or tanh of it / softcap    m = max y    d = (y - m) u / ln 2    s = sum 2^d    A = sum d 2^d

over all columns but the target's; _target.py has u and joins the sums with the target's logit. A distance is made of
y - m, which is exact or nearly so, and not of y u. With d2 of a reference's logits B = sum d2 2^d, and

    KL = p_t (log p_t - log p2_t) + factor ln 2 (A - B) + factor s (log factor - log factor2)

for the target t and the factors of `Target`. Signs are exact: log p <= 0, entropy >= 0.

A tile is UNROLL x THREADS x VEC elements. VEC consecutive ones are a group, which a thread loads at once:

    row      |.......|================================================|...|        = elements of the row
    groups   |  0  |  1  |  2  | ...                              | last  |        aligned to VEC elements
              misalignment: elements of group 0 before the row

Rows may start at any address, for instance 50257 bfloat16 elements apart. The first group starts at the row's address
rounded down. We load a whole 32-byte group if any element of it belongs to the row. A row's result therefore depends on
its values, on V, and, for logits that the caller provides, on its address modulo 32 bytes.

A thread keeps its own sums over its groups, so threads exchange nothing until a segment of SEGMENT tiles is done.
Segments are merged in order. One program may walk all of them, or each may have its own: the bits are the same.

Products and sums are not contracted to FMAs (`enable_fp_fusion` in `tile_meta`), so that another kernel around these
functions gives the same bits.

Constants come last in every signature, in the order CAP, ALIGNED, UNROLL, THREADS, VEC. CAP: there is a softcap.
ALIGNED: rows are our own; they start at 32 bytes and have memory of whole groups.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._target import LN2, MIN_FLOAT

VEC = 8
SEGMENT = 4  # tiles


class Row(NamedTuple):
    """Pointers to a row's raw logits, to a bias, and to the same of a reference; all but x may be None."""

    x: Tensor
    bias: Tensor | None
    ref: Tensor | None
    ref_bias: Tensor | None


class State(NamedTuple):
    """The sums s, A and s2, B of a part of a row, m and m2 as raw logits. Without a reference the last three are not
    used."""

    m: Tensor
    s: Tensor
    a: Tensor
    m2: Tensor
    s2: Tensor
    b: Tensor


class Normalizer(NamedTuple):
    """y of the largest logit but the target, the factor of p = factor 2^d and its log2; y of a reference's largest."""

    base: Tensor
    factor: Tensor
    log2_factor: Tensor
    base2: Tensor


class Coefficients(NamedTuple):
    """The gradient with respect to z: `target` for the target, else p (a + b log2 p + c (d2 - log2 p))."""

    target: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


def tile_meta(V: int, is_register_heavy: bool = False) -> dict:
    """Return the constants of a tile and its warps, which depend only on V.

    is_register_heavy: each element takes more registers, for a reference, a bias or a softcap's tanh; the tile is then
    half as large."""
    if V > 4096:
        unroll, threads = 2, 256
    elif V > 512:
        unroll, threads = 2, 128
    else:
        unroll, threads = 1, 32
    if is_register_heavy:
        unroll = 1
    return {"UNROLL": unroll, "THREADS": threads, "VEC": VEC, "num_warps": threads // 32, "enable_fp_fusion": False}


def num_segments(V: int, is_register_heavy: bool = False) -> int:
    """Return the number of segments of a row at the worst alignment."""
    meta = tile_meta(V, is_register_heavy)
    return triton.cdiv(V + VEC - 1, SEGMENT * meta["UNROLL"] * meta["THREADS"] * VEC)


@triton.jit
def align_down(row, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Return the address of the row's first group, and the number of its elements that are before the row."""
    size: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    misalignment = 0
    if not ALIGNED:
        misalignment = ((row.to(tl.int64) & (VEC * size - 1)) // size).to(tl.int32)
    return tl.multiple_of(row - misalignment, 16), misalignment


@triton.jit
def tile_offsets(UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Return the offsets of the groups of the first tile (UNROLL, THREADS, 1), and of the elements of a group."""
    group = (tl.arange(0, UNROLL)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]) * VEC
    return group[:, :, None], tl.arange(0, VEC)[None, None, :]


@triton.jit
def group_mask(group, misalignment, V, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Return which groups, given by their offsets, have any element of the row."""
    mask = group < misalignment + V
    if not ALIGNED:
        mask = mask & (group > misalignment - VEC)
    return mask


@triton.jit
def element_mask(index, misalignment, V, ALIGNED: tl.constexpr):
    """Return which elements belong to the row."""
    mask = index < misalignment + V
    if not ALIGNED:
        mask = mask & (index >= misalignment)
    return mask


@triton.jit
def load_logits(x, bias, index, mask, LAST: tl.constexpr):
    """Return x + bias in float32. With a bias the rows are our own, and it has memory of whole groups.

    LAST: nobody reads x again, and the L2 cache should rather keep rows whose gradient still comes."""
    y = tl.load(x + index, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "").to(tl.float32)
    if bias is not None:
        y += tl.load(bias + index, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def load_logit(x, bias, column, exists):
    """Return x + bias of one column in float32; NaN if the column does not exist."""
    y = tl.load(x + column, mask=exists, other=float("nan")).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    return y


@triton.jit
def apply_softcap(x, scaling, CAP: tl.constexpr):
    """Return y of raw logits."""
    if CAP:
        x = launch.tanh(x * scaling.inverse_softcap)
    return x


@triton.jit
def rescale(old_max, new_max, scaling, CAP: tl.constexpr):
    """Return the shift, in powers of 2, and the factor that move sums around old_max to a larger new_max."""
    distance = apply_softcap(old_max, scaling, CAP) - apply_softcap(new_max, scaling, CAP)
    shift = tl.maximum(distance * scaling.exp2_factor, launch.MIN_EXPONENT)
    return shift, tl.exp2(shift)


@triton.jit
def merge(x, y, scaling, CAP: tl.constexpr, REF: tl.constexpr):
    """Return the `State` of two parts of a row. REF: there is a reference."""
    m = tl.maximum(x.m, y.m)
    x_shift, x_factor = rescale(x.m, m, scaling, CAP)
    y_shift, y_factor = rescale(y.m, m, scaling, CAP)
    s = x_factor * x.s + y_factor * y.s
    a = x_factor * (x.a + x_shift * x.s) + y_factor * (y.a + y_shift * y.s)
    m2, s2, b = x.m2, x.s2, x.b
    if REF:
        m2 = tl.maximum(x.m2, y.m2)
        x_shift2, x_factor2 = rescale(x.m2, m2, scaling, CAP)
        y_shift2, y_factor2 = rescale(y.m2, m2, scaling, CAP)
        s2 = x_factor2 * x.s2 + y_factor2 * y.s2
        # A part whose factor is 0 may have an infinite b.
        b = tl.where(x_factor > 0, x_factor * (x.b + x_shift2 * x.s), 0.0)
        b += tl.where(y_factor > 0, y_factor * (y.b + y_shift2 * y.s), 0.0)
    return State(m, s, a, m2, s2, b)


@triton.jit
def empty_state():
    """Return the `State` of no element."""
    zero = tl.full((), 0.0, tl.float32)
    return State(zero + MIN_FLOAT, zero, zero, zero + MIN_FLOAT, zero, zero)


@triton.jit
def load_state(part, stride, REF: tl.constexpr):
    """Return the `State` of a segment from memory."""
    m = tl.load(part)
    s = tl.load(part + stride)
    a = tl.load(part + 2 * stride)
    m2, s2, b = m, s, a
    if REF:
        m2 = tl.load(part + 3 * stride)
        s2 = tl.load(part + 4 * stride)
        b = tl.load(part + 5 * stride)
    return State(m, s, a, m2, s2, b)


@triton.jit
def distances(x, counts, m, scaling, CAP: tl.constexpr):
    """Return d of a tile's raw logits, -inf for those that do not count, and m as it is with them."""
    raw = tl.where(counts, x, float("-inf"))
    new_m = tl.maximum(m, tl.max(tl.max(raw, axis=2), axis=0))
    d = apply_softcap(raw, scaling, CAP) - apply_softcap(new_m, scaling, CAP)[None, :, None]
    d = d * scaling.exp2_factor
    if CAP:  # softcap made -inf finite
        d = tl.where(counts, d, float("-inf"))
    return d, new_m


@triton.jit
def segment_state(
    row, misalignment, V, target, first, end, scaling,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Return the `State` of the tiles [first, end) of a row without its target, with row.x rounded down. NaN logits
    show in s."""
    zero = tl.zeros((THREADS,), tl.float32)
    m, s, a = zero + MIN_FLOAT, zero, zero
    m2, s2, b = zero + MIN_FLOAT, zero, zero
    groups, elements = tile_offsets(UNROLL, THREADS, VEC)
    for tile in range(first, end):
        group = tile * (UNROLL * THREADS * VEC) + groups
        index = group + elements
        loaded = group_mask(group, misalignment, V, ALIGNED, VEC)
        counts = element_mask(index, misalignment, V, ALIGNED) & (index != misalignment + target)
        x = load_logits(row.x, row.bias, index, loaded, False)
        d, new_m = distances(x, counts, m, scaling, CAP)
        shift, factor = rescale(m, new_m, scaling, CAP)
        e = tl.exp2(d)
        if row.ref is not None:
            ref = load_logits(row.ref, row.ref_bias, index, loaded, False)
            d2, new_m2 = distances(ref, counts, m2, scaling, CAP)
            shift2, factor2 = rescale(m2, new_m2, scaling, CAP)
            b = tl.where(factor > 0, factor * (b + shift2 * s), 0.0)
            b += tl.sum(tl.sum(tl.where(e == 0, 0.0, d2 * e), axis=2), axis=0)
            s2 = factor2 * s2 + tl.sum(tl.sum(tl.exp2(d2), axis=2), axis=0)
            m2 = new_m2
        a = factor * (a + shift * s) + tl.sum(tl.sum(tl.maximum(d, launch.MIN_EXPONENT) * e, axis=2), axis=0)
        s = factor * s + tl.sum(tl.sum(e, axis=2), axis=0)
        m = new_m
    return reduce_threads(State(m, s, a, m2, s2, b), scaling, CAP, row.ref is not None)


@triton.jit
def reduce_threads(states, scaling, CAP: tl.constexpr, REF: tl.constexpr):
    """Return the `State` of all threads together."""
    m = tl.max(states.m, axis=0)
    shift, factor = rescale(states.m, m, scaling, CAP)
    m2, s2, b = m, m, m
    if REF:
        m2 = tl.max(states.m2, axis=0)
        shift2, factor2 = rescale(states.m2, m2, scaling, CAP)
        s2 = launch.sum_threads(factor2 * states.s2)
        b = tl.sum(tl.where(factor > 0, factor * (states.b + shift2 * states.s), 0.0), axis=0)
    s = launch.sum_threads(factor * states.s)
    a = tl.sum(factor * (states.a + shift * states.s), axis=0)
    return State(m, s, a, m2, s2, b)


@triton.jit
def row_kl(difference, target, ref_target):
    """Return KL(policy || reference) of a row with A - B and both `Target`s, and the part of all other columns."""
    own = tl.where(target.p == 0, 0.0, target.p * (target.logp - ref_target.logp))
    moment = tl.where(target.factor == 0, 0.0, target.factor * (LN2 * difference))
    others = moment + target.rest * (target.log_factor - ref_target.log_factor)
    return own + others, others


@triton.jit
def coefficients_of(target, logprob_grad, entropy_grad):
    """Return the `Coefficients` of a row from the gradients with respect to its log p and entropy."""
    surprise = tl.where(target.p == 0, 0.0, target.p * (target.entropy + target.logp))
    a = -(logprob_grad + entropy_grad * target.entropy)
    return Coefficients(logprob_grad * target.rest - entropy_grad * surprise, a, -LN2 * entropy_grad, 0.0)


@triton.jit
def add_log_z(coefficients, target, log_z_grad):
    """Return the `Coefficients` with the gradient with respect to the row's log_z."""
    own = coefficients.target + log_z_grad * target.p
    return Coefficients(own, coefficients.a + log_z_grad, coefficients.b, coefficients.c)


@triton.jit
def add_kl(coefficients, target, ref_logp, ref_log_factor, kl, kl_of_others, kl_grad):
    """Return the `Coefficients` with the gradient with respect to the row's KL.

    Of a reference whose target is far ahead, the KL and the logarithm of the factor are hundreds of nats, which cancel:
    once in a row, and not in every column, where each sum would round."""
    difference = target.rest * (target.logp - ref_logp) - kl_of_others
    own = tl.where((target.p == 0) | (kl_grad == 0), 0.0, kl_grad * target.p * difference)
    a = coefficients.a - tl.where(kl_grad == 0, 0.0, kl_grad * (kl + ref_log_factor))
    return Coefficients(coefficients.target + own, a, coefficients.b, -LN2 * kl_grad)


@triton.jit
def logit_grad(x, ref, is_target, normalizer, coefficients, scaling, CAP: tl.constexpr, REF: tl.constexpr):
    """Return the gradient with respect to raw logits x: that of `Coefficients` times dz/dx."""
    dz_dx = scaling.inverse_temperature
    if CAP:
        t = launch.tanh(x * scaling.inverse_softcap)
        dz_dx = (1.0 - t * t) * scaling.inverse_temperature
        x = t
    d = (x - normalizer.base) * scaling.exp2_factor
    p = tl.exp2(d) * normalizer.factor
    log2_p = tl.maximum(d + normalizer.log2_factor, launch.MIN_EXPONENT)
    inner = coefficients.a + coefficients.b * log2_p
    if REF:
        d2 = (apply_softcap(ref, scaling, CAP) - normalizer.base2) * scaling.exp2_factor
        inner += coefficients.c * (tl.maximum(d2, MIN_FLOAT) - log2_p)  # -inf times 0 is NaN
    return tl.where(is_target, coefficients.target, tl.where(p == 0, 0.0, p * inner)) * dz_dx


@triton.jit
def store_gradient_tiles(
    row, y, misalignment, V, first, end, target, valid, normalizer, coefficients, scaling,
    BARRIER: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the tiles [first, end), from the last to the first: all groups if ALIGNED, otherwise those
    that are inside the row."""
    groups, elements = tile_offsets(UNROLL, THREADS, VEC)
    for i in range(first, end):
        group = (first + (end - 1 - i)) * (UNROLL * THREADS * VEC) + groups
        index = group + elements
        mask = group_mask(group, misalignment, V, ALIGNED, VEC)
        x = load_logits(row.x, row.bias, index, mask & valid, True)
        ref = x
        if row.ref is not None:
            ref = load_logits(row.ref, row.ref_bias, index, mask & valid, True)
        is_target = index == misalignment + target
        grad = logit_grad(x, ref, is_target, normalizer, coefficients, scaling, CAP, row.ref is not None)
        grad = launch.cast(tl.where(valid, grad, 0.0), y.dtype.element_ty)
        if not ALIGNED:
            mask = (group >= misalignment) & (group + VEC <= misalignment + V)
        if BARRIER:
            tl.debug_barrier()
        tl.store(y + index, grad, mask=mask)


@triton.jit
def store_gradient_ends(
    x, y, misalignment, V, target, valid, normalizer, coefficients, scaling, CAP: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Store the gradient of the first and the last group of a row, where they are not inside it."""
    group = tl.arange(0, 2)[:, None] * ((misalignment + V) // VEC * VEC)
    index = group + tl.arange(0, VEC)[None, :]
    is_partial = (group < misalignment) | (group + VEC > misalignment + V)
    mask = (index >= misalignment) & (index < misalignment + V) & is_partial
    logits = load_logits(x, None, index - misalignment, mask & valid, True)
    is_target = index == misalignment + target
    grad = logit_grad(logits, logits, is_target, normalizer, coefficients, scaling, CAP, False)
    grad = launch.cast(tl.where(valid, grad, 0.0), y.dtype.element_ty)
    tl.store(y + (index - misalignment), grad, mask=mask)


@triton.jit
def store_gradient(
    row, y, V, first, end, target, valid, normalizer, coefficients, scaling,
    BARRIER: tl.constexpr,
    CAP: tl.constexpr, ALIGNED: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a row in the row y, its tiles [first, end) from the last to the first. A row that is not
    valid is not read and gets zeros.

    BARRIER: y is the upper half of the row's own memory, in 16-bit numbers (`upper_half`):

        x    | tile 0 | tile 1 | tile 2 | tile 3 |        float32
        y                      | 0  | 1  | 2 | 3  |       tile t of y overwrites columns of x from tile t on

    This walk has already read those columns, but other warps may not have: each warp waits, after its loads of the
    tile, until all warps have loaded theirs.
    """
    if ALIGNED:
        store_gradient_tiles(
            row, y, 0, V, first, end, target, valid, normalizer, coefficients, scaling,
            BARRIER, CAP, True, UNROLL, THREADS, VEC,
        )  # fmt: skip
    else:
        base, misalignment = align_down(row.x, False, VEC)
        y_base, y_misalignment = align_down(y, False, VEC)
        if y_misalignment == misalignment:
            aligned_row = Row(base, row.bias, row.ref, row.ref_bias)
            store_gradient_tiles(
                aligned_row, y_base, misalignment, V, first, end, target, valid, normalizer, coefficients, scaling,
                False, CAP, False, UNROLL, THREADS, VEC,
            )  # fmt: skip
            if first == 0:
                store_gradient_ends(
                    row.x, y, misalignment, V, target, valid, normalizer, coefficients, scaling, CAP, VEC
                )
        else:  # element by element
            tiles: tl.constexpr = UNROLL * VEC
            store_gradient_tiles(
                row, y, 0, V, first * tiles, end * tiles, target, valid, normalizer, coefficients, scaling,
                False, CAP, True, 1, THREADS, 1,
            )  # fmt: skip
