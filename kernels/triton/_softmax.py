"""The softmax of a row of logits: its statistics in one walk over the row, and its gradient in another. Not an op.

    z = cap(x + bias) / temperature      m = max z   s = sum e^(z-m)   A = sum (z-m) e^(z-m)
    log p(t) = (z_t - m) - log s   entropy = log s - A / s      both of the sign that they must have

and beside the row z2 of a reference, B = sum (z2-m2) e^(z-m): KL = (A / s - log s) - (B / s - log s2).

A tile is UNROLL x LANES x EACH numbers: EACH neighbours are a group, which a thread reads at once. A lane keeps its own
sums over its groups, so that nothing is exchanged between threads until a segment of SEGMENT tiles is done. Segments
join in their order: one program may walk them all, or each may have its own; the bits are the same. Where rows start
at any address (50257 bfloat16 numbers apart, say), a tile starts at the row's address rounded down to a group: a group
is read whole if any of it counts, which leaves no 32 bytes that a row has a part in. So of one row the bits hang on its
values, on V, and, in logits that others have laid out, on its address within those 32 bytes.

Products and sums are not contracted (`options`): another kernel around these functions gives the same bits.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels.triton import launch

EACH = 8
SEGMENT = 4  # tiles
IGNORED = tl.constexpr(head.IGNORE_INDEX)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum to start from: finite, so that no difference is NaN
FAR = tl.constexpr(-1e30)  # e^FAR is 0, and FAR times that 0 is 0, where it is NaN for -inf


def geometry(V: int, half: bool = False) -> dict:
    """Tiles and warps, from the size of the vocabulary alone; half as much at once where each number takes more
    registers: a second row's or a bias', or those of tanh."""
    unroll, lanes = (2, 256) if V > 4096 else (2, 128) if V > 512 else (1, 32)
    return {
        "UNROLL": 1 if half else unroll,
        "LANES": lanes,
        "EACH": EACH,
        "num_warps": lanes // 32,
        "enable_fp_fusion": False,
    }


def segments(V: int, half: bool = False) -> int:
    """How many segments a row may have, wherever it starts."""
    at = geometry(V, half)
    return triton.cdiv(V + EACH - 1, SEGMENT * at["UNROLL"] * at["LANES"] * EACH)


@triton.jit
def rounded_down(row, ALIGNED: tl.constexpr, EACH: tl.constexpr):
    """The address of the group in which the row starts, and how many numbers of it stand before the row."""
    size: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    skew = 0
    if not ALIGNED:
        skew = ((row.to(tl.int64) & (EACH * size - 1)) // size).to(tl.int32)
    return tl.multiple_of(row - skew, 16), skew


@triton.jit
def grid(UNROLL: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """Where the groups of the first tile start, and the numbers of a group."""
    group = (tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]) * EACH
    return group[:, :, None], tl.arange(0, EACH)[None, None, :]


@triton.jit
def some_of(first, skew, V, ALIGNED: tl.constexpr, EACH: tl.constexpr):
    """Which groups have any of the row; `first` is where they start, behind the rounded address."""
    some = first < skew + V
    if not ALIGNED:
        some = some & (first > skew - EACH)
    return some


@triton.jit
def inside_of(at, skew, V, ALIGNED: tl.constexpr):
    """Which numbers are of the row."""
    inside = at < skew + V
    if not ALIGNED:
        inside = inside & (at >= skew)
    return inside


@triton.jit
def raw(x, bias, at, some):
    """Logits in float32, the bias added. With a bias rows start at a group, and it ends with one."""
    y = tl.load(x + at, mask=some, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + at, mask=some, other=0.0).to(tl.float32)
    return y


@triton.jit
def raw_one(x, bias, column, known):
    """The logit of one column; NaN where there is no such column."""
    y = tl.load(x + column, mask=known, other=float("nan")).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    return y


@triton.jit
def scaled(x, by, CAP: tl.constexpr):
    """z of raw logits; by: 1 / temperature, softcap, 1 / softcap."""
    if CAP:
        x = by[1] * launch.tanh(x * by[2])
    return x * by[0]


@triton.jit
def moved(before, after):
    """What sums around one maximum are shifted and multiplied by, around a larger one."""
    shift = tl.maximum(before - after, FAR)
    return shift, tl.exp(shift)


@triton.jit
def joined(one, other, REF: tl.constexpr):
    """The sums (m, s, A, m2, s2, B) of two parts of a row."""
    m = tl.maximum(one[0], other[0])
    shift, factor = moved(one[0], m)
    shift1, factor1 = moved(other[0], m)
    s = factor * one[1] + factor1 * other[1]
    a = factor * (one[2] + shift * one[1]) + factor1 * (other[2] + shift1 * other[1])
    m2, s2, b = one[3], one[4], one[5]
    if REF:
        m2 = tl.maximum(one[3], other[3])
        shift, grown = moved(one[3], m2)
        shift1, grown1 = moved(other[3], m2)
        s2 = grown * one[4] + grown1 * other[4]
        b = tl.where(factor > 0, factor * (one[5] + shift * one[1]), 0.0)  # one whose factor is 0 may be infinite
        b += tl.where(factor1 > 0, factor1 * (other[5] + shift1 * other[1]), 0.0)
    return m, s, a, m2, s2, b


@triton.jit
def nothing_yet():
    zero = tl.full((), 0.0, tl.float32)
    return zero + LOWEST, zero, zero, zero + LOWEST, zero, zero


@triton.jit
def loaded(part, stride, REF: tl.constexpr):
    """A segment's sums."""
    sums = (tl.load(part), tl.load(part + stride), tl.load(part + 2 * stride))
    if REF:
        sums += (tl.load(part + 3 * stride), tl.load(part + 4 * stride), tl.load(part + 5 * stride))
    else:
        sums += (sums[0], sums[1], sums[2])  # nobody looks at them
    return sums


@triton.jit
def segment_statistics(
    x, ref, bias, ref_bias, skew, V, first, end, by,
    ALIGNED: tl.constexpr, CAP: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """(m, s, A, m2, s2, B) of the tiles from `first` to `end`; the last three only where there is a reference. A NaN
    shows in s."""
    zero = tl.zeros((LANES,), tl.float32)
    m, s, a, m2, s2, b = zero + LOWEST, zero, zero, zero + LOWEST, zero, zero
    groups, each = grid(UNROLL, LANES, EACH)
    for tile in range(first, end):
        group = tile * (UNROLL * LANES * EACH) + groups
        at = group + each
        some, inside = some_of(group, skew, V, ALIGNED, EACH), inside_of(at, skew, V, ALIGNED)
        z = tl.where(inside, scaled(raw(x, bias, at, some), by, CAP), float("-inf"))
        most = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))
        shift, factor = moved(m, most)
        d = z - most[None, :, None]
        e = tl.exp(d)
        if ref is not None:
            z2 = tl.where(inside, scaled(raw(ref, ref_bias, at, some), by, CAP), float("-inf"))
            most2 = tl.maximum(m2, tl.max(tl.max(z2, axis=2), axis=0))
            shift2, factor2 = moved(m2, most2)
            d2 = z2 - most2[None, :, None]
            b = tl.where(factor > 0, factor * (b + shift2 * s), 0.0)
            b += tl.sum(tl.sum(tl.where(e == 0, 0.0, d2 * e), axis=2), axis=0)
            s2 = factor2 * s2 + tl.sum(tl.sum(tl.exp(d2), axis=2), axis=0)
            m2 = most2
        a = factor * (a + shift * s) + tl.sum(tl.sum(tl.maximum(d, FAR) * e, axis=2), axis=0)
        s = factor * s + tl.sum(tl.sum(e, axis=2), axis=0)
        m = most
    largest = tl.max(m, axis=0)
    shift, factor = moved(m, largest)
    largest2, total2, cross = largest, largest, largest
    if ref is not None:
        largest2 = tl.max(m2, axis=0)
        shift2, factor2 = moved(m2, largest2)
        total2 = tl.sum(factor2 * s2, axis=0)
        cross = tl.sum(tl.where(factor > 0, factor * (b + shift2 * s), 0.0), axis=0)
    return largest, tl.sum(factor * s, axis=0), tl.sum(factor * (a + shift * s), axis=0), largest2, total2, cross


@triton.jit
def slope(x, ref, target, of, slopes, by, CAP: tl.constexpr, REF: tl.constexpr):
    """The gradient of raw logits x: (p (a + b log p + c (log p_ref - log p)) + g where target) dz/dx.

    of: m, log s, and m, log s of the reference. slopes: g, a, b, c."""
    chain = by[0]
    if CAP:
        t = launch.tanh(x * by[2])
        chain = (1.0 - t * t) * by[0]
        z = by[1] * t * by[0]
    else:
        z = x * by[0]
    logp = (z - of[0]) - of[1]
    p = tl.exp(logp)
    logp = tl.maximum(logp, FAR)
    inner = slopes[1] + slopes[2] * logp
    if REF:
        ref_logp = (scaled(ref, by, CAP) - of[2]) - of[3]
        inner += slopes[3] * (tl.where(ref_logp == float("-inf"), 0.0, ref_logp) - logp)
    return (tl.where(p == 0, 0.0, p * inner) + tl.where(target, slopes[0], 0.0)) * chain


@triton.jit
def _walk(
    x, ref, y, bias, ref_bias, skew, V, first, end, target, live, of, slopes, by,
    ALIGNED: tl.constexpr, BARRIER: tl.constexpr, CAP: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """The gradient by the tiles from `end` down to `first`: the groups that are whole, or, if ALIGNED, all of them."""
    groups, each = grid(UNROLL, LANES, EACH)
    for i in range(first, end):
        group = (first + (end - 1 - i)) * (UNROLL * LANES * EACH) + groups
        at, some = group + each, some_of(group, skew, V, ALIGNED, EACH)
        given = raw(x, bias, at, some & live)
        reference = given
        if ref is not None:
            reference = raw(ref, ref_bias, at, some & live)
        d = slope(given, reference, at == skew + target, of, slopes, by, CAP, ref is not None)
        d = launch.cast(tl.where(live, d, 0.0), y.dtype.element_ty)
        if not ALIGNED:
            some = (group >= skew) & (group + EACH <= skew + V)
        if BARRIER:
            tl.debug_barrier()
        tl.store(y + at, d, mask=some)


@triton.jit
def write_gradient(
    x, ref, y, bias, ref_bias, V, first, end, target, live, of, slopes, by,
    ALIGNED: tl.constexpr, BARRIER: tl.constexpr, CAP: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """The gradient of a row x to the row y, its tiles from `end` down to `first`; zeros, and nothing is read, if not
    live.

    ALIGNED: x and y are our own rows, of whole groups. BARRIER: y is the upper half of x's own memory, in 16-bit
    numbers (`half_of`). Tile t of y lies over columns of x from tile t on, all of which this walk has passed, but other
    warps perhaps have not: each waits, once it has read its part of the tile, until all have.
    """
    if ALIGNED:
        _walk(
            x, ref, y, bias, ref_bias, 0, V, first, end, target, live, of, slopes, by, True, BARRIER, CAP, UNROLL,
            LANES, EACH,
        )  # fmt: skip
    else:
        base, skew = rounded_down(x, False, EACH)
        to, other = rounded_down(y, False, EACH)
        if skew == other:
            _walk(
                base, ref, to, bias, ref_bias, skew, V, first, end, target, live, of, slopes, by, False, False, CAP,
                UNROLL, LANES, EACH,
            )  # fmt: skip
            if first == 0:  # the groups at both ends that are not whole
                group = tl.arange(0, 2)[:, None] * ((skew + V) // EACH * EACH)
                at = group + tl.arange(0, EACH)[None, :]
                part = (at >= skew) & (at < skew + V) & ((group < skew) | (group + EACH > skew + V))
                given = raw(x, bias, at - skew, part & live)
                d = slope(given, given, at == skew + target, of, slopes, by, CAP, False)
                tl.store(y + (at - skew), launch.cast(tl.where(live, d, 0.0), y.dtype.element_ty), mask=part)
        else:  # number by number
            times: tl.constexpr = UNROLL * EACH
            _walk(
                x, ref, y, bias, ref_bias, 0, V, first * times, end * times, target, live, of, slopes, by, True, False,
                CAP, 1, LANES, 1,
            )  # fmt: skip
