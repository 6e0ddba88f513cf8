"""The keyed noise, the filters and the choice of a token, in plain torch, for sample_tokens and linear_sample_tokens.

Noise is keyed, not streamed: token v of a row gets the word v % 4 of Philox4x32-10 (Salmon et al. 2011) with

    counter = (v // 4, step, row id low 32 bits, row id high)        key = (seed low 32 bits, seed high)

A sample therefore depends only on (seed, row id, step), never on the batch around it, its place there or the device.
The token is the argmax of z + g over the kept tokens (Gumbel 1954), g = -log(-log1p(-u)), u = (word + 1/2) 2^-32. The
other common form, -log(-log u) with a 24-bit u, cannot exceed 16.6: tokens 18 nats below the best are sampled fifteen
times too rarely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._head import one_logprob, zero_where_minus_inf
from rlhf_fast.kernels._tensors import upcast_dtype

OUTPUTS = ("tokens", "logprobs", "raw_logprobs", "kept_logprobs", "log_kept_mass", "entropy")
_LOW = 0xFFFFFFFF


class SamplingOptions(NamedTuple):
    """Sampling options of the rows: tensors (B,), or None for an option that changes nothing."""

    temperature: Tensor | None  # float32
    top_k: Tensor | None  # int64
    top_p: Tensor | None  # float32
    min_p: Tensor | None  # float32
    seed: int | Tensor  # in [-2^63, 2^63); or int64 (1,)
    row_ids: Tensor  # int64
    steps: Tensor  # int64


class _Range(NamedTuple):
    dtype: torch.dtype
    off: float  # the value that changes nothing
    low: float
    high: float
    rule: str


_RANGES = {
    "temperature": _Range(torch.float32, 1, 0, 1e6, "between 0 and 1e6"),
    "top_k": _Range(torch.int64, 0, 0, 2**62, "0 (off) or more"),
    "top_p": _Range(torch.float32, 1, 1e-30, 1, "above 0 and at most 1"),
    "min_p": _Range(torch.float32, 0, 0, 1, "between 0 and 1"),
}


def normalize_options(
    op: str, logits: Tensor, temperature, top_k, top_p, min_p, seed, row_ids, steps
) -> SamplingOptions:
    """Check the options of an op, numbers or tensors, for `logits` (B, ...), and return them as tensors (B,)."""
    if row_ids is None or steps is None:
        missing = "row_ids" if row_ids is None else "steps"
        raise ValueError(
            f"{op}: row_ids, int64 of shape ({logits.shape[0]},), and steps, the same or an int, must be given: they"
            f" key the noise; {missing} is None"
        )
    steps = torch.full_like(row_ids, steps) if isinstance(steps, int) else steps
    if row_ids.shape != logits.shape[:1] or steps.shape != logits.shape[:1]:
        shapes = [list(row_ids.shape), list(steps.shape)]
        raise ValueError(f"{op}: row_ids and steps must have shape ({logits.shape[0]},), got {shapes}")
    values = zip(_RANGES, (temperature, top_k, top_p, min_p), strict=True)
    temperature, top_k, top_p, min_p = (_per_row(op, name, value, logits) for name, value in values)
    seed = (seed + 2**63) % 2**64 - 2**63
    return SamplingOptions(temperature, top_k, top_p, min_p, seed, row_ids.long(), steps.long())


def _per_row(op: str, name: str, value: Tensor | float | None, logits: Tensor) -> Tensor | None:
    """Return a number or tensor as a tensor (B,), or None if it changes nothing."""
    allowed = _RANGES[name]
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.shape not in ((), logits.shape[:1]):
            raise ValueError(
                f"{op}: {name} must be a number or have shape ({logits.shape[0]},), got {list(value.shape)}"
            )
        return value.to(logits.device, allowed.dtype).expand(logits.shape[0])
    if not allowed.low <= value <= allowed.high:
        raise ValueError(f"{op}: {name} must be {allowed.rule}, got {value}")
    if value == allowed.off:
        return None
    return torch.full(logits.shape[:1], value, dtype=allowed.dtype, device=logits.device)


def philox(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Return Philox4x32-10's four 32-bit words for a four-word counter and a two-word key, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 products wrap
        c0 = (right >> 32 & _LOW) ^ c1 ^ k0  # the shift copies the sign, the mask removes the copies
        c2 = (left >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = right & _LOW, left & _LOW
        k0 = (k0 + 0x9E3779B9) & _LOW
        k1 = (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def noise_words(seed: int | Tensor, row_ids: Tensor, steps: Tensor, V: int) -> Tensor:
    """Return the integers behind the noise, (B, V) int64 in [0, 2^32), for `row_ids` and `steps` (B,)."""
    quads = torch.arange((V + 3) // 4, device=row_ids.device)
    low, high, step = (x[:, None] for x in (row_ids & _LOW, row_ids >> 32 & _LOW, steps & _LOW))
    words = philox(torch.broadcast_tensors(quads, step, low, high), (seed & _LOW, seed >> 32 & _LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :V]


def gumbel_noise(seed: int | Tensor, row_ids: Tensor, steps: Tensor, V: int) -> Tensor:
    """Return standard Gumbel noise (B, V) float64, between -3.14 and 22.9: that of `sample_tokens`."""
    uniform = (noise_words(seed, row_ids, steps, V).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def _kept_tokens(logits: Tensor, z: Tensor, options: SamplingOptions) -> Tensor:
    """Return the mask (B, V) of the tokens that the filters keep: the first ones by falling logit, then by index."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if options.top_k is not None or options.top_p is not None:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        kept_sorted = torch.ones_like(kept)
        if options.top_k is not None:
            rank = torch.arange(logits.shape[1], device=logits.device)
            top_k = options.top_k[:, None]
            kept_sorted = (rank < top_k) | (top_k == 0)
        if options.top_p is not None:
            mass = z.exp().gather(1, order) * kept_sorted
            sums = mass.cumsum(1)
            mass_before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
            top_p = options.top_p.double()[:, None]
            kept_sorted = kept_sorted & ((mass_before < top_p * sums[:, -1:]) | (top_p == 1))
        kept = torch.empty_like(kept).scatter_(1, order, kept_sorted)
    if options.min_p is not None:
        kept = kept & (z >= options.min_p.double().log()[:, None])
    return kept


def empty_outputs(rows: torch.Size, logits: Tensor) -> tuple[Tensor, ...]:
    """Return new memory for the outputs of `rows`, with statistics in the dtype for those of `logits`."""
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    dtype = upcast_dtype(logits)
    return (tokens, *(torch.empty(rows, dtype=dtype, device=logits.device) for _ in OUTPUTS[1:]))


def sample_reference(
    logits: Tensor, options: SamplingOptions, noise: Tensor | None = None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the six outputs of sample_tokens for `logits` (B, V), computed in float64.

    allowed: mask (B, V) of the tokens that the filters see. The others are never sampled, but logprobs, raw_logprobs
    and entropy include them.
    """
    V = logits.shape[1]
    dtype = upcast_dtype(logits)
    logits = logits.double()
    x = logits if allowed is None else logits.masked_fill(~allowed & ~(logits == float("inf")), float("-inf"))
    largest = x.amax(-1, keepdim=True)
    largest_of_all = logits.amax(-1, keepdim=True)
    valid = largest[:, 0].isfinite() & largest_of_all[:, 0].isfinite()  # amax returns NaN if there is one
    for value, allowed_range in zip(options[:4], _RANGES.values(), strict=True):
        if value is not None:
            valid = valid & (value >= allowed_range.low) & (value <= allowed_range.high)
    temperature = x.new_ones(x.shape[0]) if options.temperature is None else options.temperature.double()
    is_greedy = temperature == 0
    scale = torch.where(is_greedy, 1.0, temperature)[:, None]

    z = (x - largest) / scale
    kept = _kept_tokens(x, z, options)
    noise = (
        gumbel_noise(options.seed, options.row_ids, options.steps, V)
        if noise is None
        else noise.double().nan_to_num(float("-inf"))
    )
    best = torch.where(kept, z + noise, float("-inf")).max(-1)
    tokens = torch.where(is_greedy, x.argmax(-1), best.indices)
    valid = valid & (is_greedy | (best.values > float("-inf")))
    kept = kept if allowed is None else kept & allowed

    shifted = logits - largest_of_all
    column = tokens[:, None]
    z = shifted / scale
    logprobs, raw_logprobs = one_logprob(z, column)[:, 0], one_logprob(shifted, column)[:, 0]
    kept_logprobs = one_logprob(z.masked_fill(~kept, float("-inf")), column)[:, 0]
    kept_sum, other_sum = (z.masked_fill(~which, float("-inf")).logsumexp(-1) for which in (kept, ~kept))
    log_kept_mass = -torch.logaddexp(other_sum - kept_sum, torch.zeros_like(kept_sum))
    logp = z.log_softmax(-1).scatter(1, column, logprobs[:, None])
    entropy = -(logp.exp() * zero_where_minus_inf(logp)).sum(-1)

    def zero_if_greedy(x: Tensor) -> Tensor:
        return torch.where(is_greedy, 0.0, x)

    def output(x: Tensor) -> Tensor:
        return torch.where(valid, x, float("nan")).to(dtype)

    return (
        torch.where(valid, tokens, -1),
        output(zero_if_greedy(logprobs)),
        output(raw_logprobs),
        output(zero_if_greedy(kept_logprobs)),
        output(zero_if_greedy(log_kept_mass)),
        output(zero_if_greedy(entropy)),
    )
