"""What sample_tokens and linear_sample_tokens share: the keyed noise, the filters, the draw, in plain torch.

Noise is keyed, not streamed: token v of a row gets the word v % 4 of Philox4x32-10 (Salmon et al. 2011) with

    counter = (v // 4, step, row id low 32 bits, row id high)        key = (seed low 32 bits, seed high)

so a draw depends on (seed, row id, step) alone: never on the batch around it, its slot or the device. The token is the
argmax of z + g over the kept tokens (Gumbel 1954), g = -log(-log1p(-u)), u = (word + 1/2) 2^-32. The other common
form, -log(-log u) with a 24-bit u, cannot exceed 16.6 and draws tokens 18 nats down fifteen times too rarely.
"""

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import upcast

OUTPUTS = ("tokens", "logprobs", "raw_logprobs", "kept_logprobs", "log_kept_mass", "entropy")
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four 32-bit words of a four-word counter and a two-word key, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; the shift copies the sign, the mask removes the copies.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32 & _LOW) ^ c1 ^ k0, right & _LOW, (left >> 32 & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def noise_words(seed: int, row_ids: Tensor, steps: Tensor, V: int) -> Tensor:
    """The integers behind the noise, (B, V) int64 in [0, 2^32), for `row_ids` and `steps` (B,)."""
    quads = torch.arange((V + 3) // 4, device=row_ids.device)
    low, high, step = (x[:, None] for x in (row_ids & _LOW, row_ids >> 32 & _LOW, steps & _LOW))
    words = philox(torch.broadcast_tensors(quads, step, low, high), (seed & _LOW, seed >> 32 & _LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :V]


def gumbel_noise(seed: int, row_ids: Tensor, steps: Tensor, V: int) -> Tensor:
    """Standard Gumbel noise (B, V) float64 between -3.14 and 22.9, the same that `sample_tokens` draws."""
    uniform = (noise_words(seed, row_ids, steps, V).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def _kept(x: Tensor, z: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """Which tokens the filters keep, (B, V) bool: a prefix of the order (logit falling, index rising)."""
    kept = torch.ones_like(x, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        order = x.sort(dim=-1, descending=True, stable=True).indices
        first = torch.ones_like(kept)
        if top_k is not None:
            rank = torch.arange(x.shape[1], device=x.device)
            first = (rank < top_k[:, None]) | (top_k[:, None] == 0)
        if top_p is not None:
            mass = z.exp().gather(1, order) * first
            sums = mass.cumsum(1)
            before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
            bound = top_p.double()[:, None]
            first = first & ((before < bound * sums[:, -1:]) | (bound == 1))
        kept = torch.empty_like(kept).scatter_(1, order, first)
    if min_p is not None:
        kept = kept & (z >= min_p.double().log()[:, None])
    return kept


def fake_outputs(rows: torch.Size, logits: Tensor) -> tuple[Tensor, ...]:
    """Empty outputs of `rows`, as wide as statistics of `logits` are."""
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    return (tokens, *(torch.empty(rows, dtype=upcast(logits).dtype, device=logits.device) for _ in OUTPUTS[1:]))


def draw(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: int,
    row_ids: Tensor,
    steps: Tensor,
    noise: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six outputs of sample_tokens. `allowed` (B, V) bool: the tokens that the filters see; all others have no
    chance, but stay in logprobs, raw_logprobs and entropy."""
    V, dtype = logits.shape[1], upcast(logits).dtype
    every = logits.double()
    x = every if allowed is None else every.masked_fill(~allowed & ~(every == float("inf")), float("-inf"))
    largest, most = x.amax(-1, keepdim=True), every.amax(-1, keepdim=True)
    valid = largest[:, 0].isfinite() & most[:, 0].isfinite()  # amax hands on a NaN
    T = x.new_ones(x.shape[0]) if temperature is None else temperature.double()
    greedy = T == 0
    for bound, low, high in ((T, 0, 1e6), (top_k, 0, 2**62), (top_p, 1e-30, 1), (min_p, 0, 1)):
        if bound is not None:
            valid = valid & (bound >= low) & (bound <= high)
    scale = torch.where(greedy, 1.0, T)[:, None]
    z = (x - largest) / scale
    kept = _kept(x, z, top_k, top_p, min_p)
    noise = gumbel_noise(seed, row_ids, steps, V) if noise is None else noise.double()
    best = torch.where(kept, z + noise, float("-inf")).max(-1)
    tokens = torch.where(greedy, x.argmax(-1), best.indices)
    valid = valid & (greedy | (best.values > float("-inf")))
    kept_mass = (z.exp() * kept).sum(-1).log() + ((largest - most) / scale)[:, 0]

    shifted, at = every - most, tokens[:, None]
    z = shifted / scale
    mass = z.exp()
    total = mass.sum(-1)
    logprobs = z.gather(1, at)[:, 0] - total.log()
    raw_logprobs = shifted.gather(1, at)[:, 0] - shifted.exp().sum(-1).log()
    log_kept_mass = (kept_mass - total.log()).clamp(max=0)
    entropy = total.log() - (mass * z.clamp(min=-1000)).sum(-1) / total
    certain = [torch.where(greedy, 0.0, x) for x in (logprobs, logprobs - log_kept_mass, log_kept_mass, entropy)]
    outputs = (certain[0], raw_logprobs, *certain[1:])
    return (torch.where(valid, tokens, -1), *(torch.where(valid, x, float("nan")).to(dtype) for x in outputs))


def _per_row(op, name, value, logits, dtype, off, low, high, rule):
    """A number or tensor as a tensor (B,); None where it changes nothing."""
    if value is None or isinstance(value, Tensor):
        if value is not None and value.shape not in ((), logits.shape[:1]):
            raise ValueError(
                f"{op}: {name} must be a number or have shape ({logits.shape[0]},), got {list(value.shape)}"
            )
        return value if value is None else value.to(logits.device, dtype).expand(logits.shape[0])
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")
    return None if value == off else torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


def options(op: str, rows: Tensor, temperature, top_k, top_p, min_p, seed, row_ids, steps) -> tuple:
    """The options of a draw as tensors (B,), or None where they change nothing; `rows` (B, ...) says B and device."""
    if row_ids is None or steps is None:
        raise ValueError(f"{op}: row_ids and steps must be given, they key the noise; got None")
    steps = torch.full_like(row_ids, steps) if isinstance(steps, int) else steps
    if row_ids.shape != rows.shape[:1] or steps.shape != rows.shape[:1]:
        shapes = [list(row_ids.shape), list(steps.shape)]
        raise ValueError(f"{op}: row_ids and steps must have shape ({rows.shape[0]},), got {shapes}")
    return (
        _per_row(op, "temperature", temperature, rows, torch.float32, 1, 0, 1e6, "between 0 and 1e6"),
        _per_row(op, "top_k", top_k, rows, torch.int64, 0, 0, 2**62, "0 (off) or more"),
        _per_row(op, "top_p", top_p, rows, torch.float32, 1, 1e-30, 1, "above 0 and at most 1"),
        _per_row(op, "min_p", min_p, rows, torch.float32, 0, 0, 1, "between 0 and 1"),
        (seed + 2**63) % 2**64 - 2**63,
        row_ids.long(),
        steps.long(),
    )
