"""The target's place in a row's softmax on a GPU: its log-probability, and what the gradient needs. Not an op.

A row's sums s and A (_softmax.py) are over all logits but the target's. A target that is far ahead has p = 1 - 1e-12,
say, and log p = -1e-12: the others' sum, relative to the target, has that number in full precision. A sum with the
target in it has 1. `join` puts the two together, z being the target's and m the largest of the others:

    z > m    f = e^(m - z)    S = 1 + f s    log p = -log1p(f s)           factor = f / S
    else     e = e^(z - m)    S = s + e      log p = (z - m) - log S       factor = 1 / S

Another logit has p = factor e^(z - m). All sums have terms of one sign, so log p and 1 - p keep their precision however
close p is to 1, and 1 - p = factor s is the sum of the others' p.

Triton's exp and log are one instruction each, with an absolute error of |x| 2^-24 in the exponent and of 2^-22 in the
logarithm. A row's few single numbers take `exp`, `log1p` and `one_minus_exp` of this file, and z - m is float64.
"""

import math
import struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch

MAX_FACTOR = 3e38  # finite, so that its product with 0 is not NaN
MIN_FLOAT = tl.constexpr(-3.4028234663852886e38)  # a maximum to start from: finite, so that no difference is NaN
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


class Scaling(NamedTuple):
    """Factors that turn raw logits x into y, tanh(x / softcap) or x where there is none, and y into z = y u: u is
    softcap / temperature or 1 / temperature."""

    exp2_factor: float  # u / ln 2: z in powers of 2
    inverse_temperature: float
    low_inverse_temperature: float  # what float32 lacks of it
    softcap: float
    inverse_softcap: float

    @staticmethod
    def of(temperature: float, softcap: float) -> "Scaling":
        inverse = min(1 / temperature, MAX_FACTOR)
        low = inverse - struct.unpack("f", struct.pack("f", inverse))[0]
        factor = min((softcap or 1.0) / (math.log(2) * temperature), MAX_FACTOR)
        return Scaling(factor, inverse, low, softcap, 1 / softcap if softcap else 0.0)


class Target(NamedTuple):
    """A target's log p, p and 1 - p, the entropy of its row, and the factor of the others' p and its logarithm."""

    logp: Tensor
    p: Tensor
    rest: Tensor
    entropy: Tensor
    factor: Tensor
    log_factor: Tensor


@triton.jit
def exp(x, low):
    """Return e^(x + low) for x <= 0 with a relative error of 2e-7; 0 below 2e-38. low: a small correction."""
    power = tl.floor(x * LOG2_E + 0.5)
    rest = (x - power * 0.693359375) + power * 2.1219444005469057e-4  # 0.693359375 times an integer is exact
    return tl.where(x < -87.0, 0.0, tl.exp(rest + low) * tl.exp2(power))


@triton.jit
def log1p(x):
    """Return log(1 + x) for finite x >= 0 with a relative error of 2e-7, also for small x."""
    u = 1.0 + x
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23  # u = (1 + f) 2^power, (1 + f)^2 between 1/2 and 2
    f = tl.where(power == 0, x, (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0)
    lost = tl.where(power == 0, 0.0, tl.where(x > 1.0, 1.0 - (u - x), x - (u - 1.0)) / u)  # by the rounding of u
    r = f / (2.0 + f)
    square = r * r
    series = square * (0.66666662693 + square * (0.40000972152 + square * (0.28498786688 + square * 0.24279078841)))
    half = 0.5 * f * f
    n = power.to(tl.float32)
    y = n * 0.69313812256 + (f - (half - (r * (half + series) + (n * 9.0580006145e-06 + lost))))
    return tl.where(x < float("inf"), y, x)


@triton.jit
def one_minus_exp(x):
    """Return 1 - e^x for x <= 0 with a relative error of 3e-7, also for x near 0."""
    series = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))))
    series = -x * (1.0 + x * 0.5 * (1.0 + x * (1 / 3) * (1.0 + x * 0.25 * series)))
    return tl.where(x > -0.35, series, 1.0 - exp(x, 0.0))


@triton.jit
def exact_tanh(x):
    """Return tanh(x) in float64."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def to_float64(scalar):
    """Return a float32 argument of a kernel in float64."""
    return tl.full((), scalar, tl.float32).to(tl.float64)


@triton.jit
def lead_over(x, largest, scaling, CAP: tl.constexpr):
    """Return in float64 how far the raw logit x is above another one, in z; and how much z of that one is above its
    float32 value, from which the others' distances are."""
    inverse = to_float64(scaling.inverse_temperature) + to_float64(scaling.low_inverse_temperature)
    lead = x.to(tl.float64) - largest.to(tl.float64)
    error = 0.0
    if CAP:
        softcap = to_float64(scaling.softcap)
        base = exact_tanh(largest.to(tl.float64) / softcap)
        lead = softcap * (exact_tanh(x.to(tl.float64) / softcap) - base)
        rounded = launch.tanh(largest * scaling.inverse_softcap)
        error = ((base - rounded.to(tl.float64)) * softcap * inverse).to(tl.float32)
    return lead * inverse, error


@triton.jit
def join(lead, error, s, a):
    """Return the `Target` that is `lead` above the largest of the others (`lead_over`), which have the sums s and A."""
    is_ahead = lead > 0
    exact = -tl.abs(lead)
    distance = exact.to(tl.float32)
    low = tl.where(distance > -87.0, (exact - distance.to(tl.float64)).to(tl.float32), 0.0)
    lesser = tl.where(lead < float("inf"), exp(distance, low), float("nan"))
    exact_s = tl.where(s > 1, s - (s - 1.0) * error, s)
    excess = tl.where(is_ahead, lesser * exact_s, (exact_s - 1.0) + lesser)
    excess = tl.where(excess > -1, excess, float("nan"))  # a row without a logit above -inf
    log_sum = log1p(excess)
    inverse = tl.div_rn(1.0, 1.0 + excess)
    factor = tl.where(is_ahead, lesser * inverse, inverse) * tl.where(s > 1, exact_s / s, 1.0)
    finite = tl.maximum(distance, launch.MIN_EXPONENT)
    entropy = log_sum - factor * (a + finite * tl.where(is_ahead, s, lesser))
    logp = tl.where(is_ahead, 0.0, distance) - log_sum
    log_factor = tl.where(is_ahead, tl.maximum(distance, MIN_FLOAT), 0.0) - log_sum
    p = tl.where(is_ahead, inverse, lesser * inverse)
    return Target(logp, p, factor * s, entropy, factor, log_factor)


@triton.jit
def log_z_and_top1(target, x, largest, scaling, CAP: tl.constexpr):
    """Return logsumexp z of a row, and True if no logit is larger than x, the target's. largest: of the others."""
    z = tl.maximum(x, largest).to(tl.float64)
    if CAP:
        softcap = to_float64(scaling.softcap)
        z = softcap * exact_tanh(z / softcap)
    z = z * (to_float64(scaling.inverse_temperature) + to_float64(scaling.low_inverse_temperature))
    is_number = target.logp == target.logp
    log_z = (z - tl.maximum(target.logp, target.log_factor)).to(tl.float32)
    return tl.where(is_number, log_z, float("nan")), is_number & (x >= largest)


@triton.jit
def known_target(logp, entropy, s):
    """Return the `Target` of a row with known results."""
    rest = one_minus_exp(logp)
    factor = tl.where(s == 0, rest, rest / s)  # of no others 0, or NaN
    return Target(logp, exp(logp, 0.0), rest, entropy, factor, tl.maximum(tl.log(factor), MIN_FLOAT))
