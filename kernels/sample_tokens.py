"""Draw one token a row, and say how probable it was: raw, at the temperature, and after the filters.

Noise is keyed, not streamed: token v of a row gets the word v % 4 of Philox4x32-10 (Salmon et al. 2011) with

    counter = (v // 4, step, row id low 32 bits, row id high)        key = (seed low 32 bits, seed high)

so a draw depends on (seed, row id, step) alone: never on the batch around it, its slot or the device. The token is the
argmax of z + g over the kept tokens (Gumbel 1954), g = -log(-log1p(-u)), u = (word + 1/2) 2^-32. The other common
form, -log(-log u) with a 24-bit u, cannot exceed 16.6 and draws tokens 18 nats down fifteen times too rarely.
"""

import torch
from torch import Tensor

from rlhf_fast.kernels._op import Declined, lane, op, wide

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


def _fake(logits, *options):
    rows = logits.shape[:1]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    return (tokens, *(torch.empty(rows, dtype=wide(logits).dtype, device=logits.device) for _ in range(5)))


@op(fake=_fake)
def sample_tokens(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    steps: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token for each row of `logits` (B, V), with its log-probabilities in nats; all outputs (B,).

        z = logits / temperature        token = argmax over kept v of z_v + gumbel(seed, row id, step, v)

    `temperature`, `top_k`, `top_p` and `min_p` are numbers or tensors (B,); 1, 0, 1 and 0 (or None) switch them off.
    Filters apply in that order: the `top_k` largest logits; of those the fewest largest whose mass reaches `top_p` of
    theirs; of those the ones at least `min_p` times as probable as the most probable token. Equal logits rank by
    index, lowest first, so that exactly `top_k` tokens are kept.
    `row_ids` (B,) int64 names each sample for good (say, prompt * samples + sample), `steps` (B,) or an int counts its
    tokens; required. `noise` (B, V) replaces the keyed noise by the caller's Gumbel values.

    Returns tokens int64, then float32: `logprobs` at the temperature, before the filters: what a trainer computes
    again; `raw_logprobs` at temperature 1; `kept_logprobs` after the filters; `log_kept_mass`, the log of the mass that
    the filters keep (kept_logprobs = logprobs - log_kept_mass); `entropy` at the temperature, before the filters.
    Temperature 0 takes the largest logit, the lowest index among equals. That choice has probability one: logprobs,
    kept_logprobs, log_kept_mass and entropy are 0, raw_logprobs are as ever.
    A row that has no distribution (a NaN or +inf, no finite logit, parameters out of range, temperature above 1e6)
    gets token -1 and NaN. No gradient.
    """
    V, dtype = logits.shape[1], wide(logits).dtype
    x = logits.double()
    largest = x.amax(-1, keepdim=True)
    valid = largest[:, 0].isfinite()  # amax hands on a NaN
    T = x.new_ones(x.shape[0]) if temperature is None else temperature.double()
    greedy = T == 0
    for bound, low, high in ((T, 0, 1e6), (top_k, 0, 2**62), (top_p, 1e-30, 1), (min_p, 0, 1)):
        if bound is not None:
            valid = valid & (bound >= low) & (bound <= high)
    shifted = x - largest
    z = shifted / torch.where(greedy, 1.0, T)[:, None]
    kept = _kept(x, z, top_k, top_p, min_p)
    noise = gumbel_noise(seed, row_ids, steps, V) if noise is None else noise.double()
    best = torch.where(kept, z + noise, float("-inf")).max(-1)
    tokens = torch.where(greedy, x.argmax(-1), best.indices)
    valid = valid & (greedy | (best.values > float("-inf")))

    mass, at = z.exp(), tokens[:, None]
    total = mass.sum(-1)
    logprobs = z.gather(1, at)[:, 0] - total.log()
    raw_logprobs = shifted.gather(1, at)[:, 0] - shifted.exp().sum(-1).log()
    log_kept_mass = ((mass * kept).sum(-1) / total).log()
    entropy = total.log() - (mass * z.clamp(min=-1000)).sum(-1) / total
    certain = [torch.where(greedy, 0.0, x) for x in (logprobs, logprobs - log_kept_mass, log_kept_mass, entropy)]
    outputs = (certain[0], raw_logprobs, *certain[1:])
    return (torch.where(valid, tokens, -1), *(torch.where(valid, x, float("nan")).to(dtype) for x in outputs))


def _per_row(name, value, logits, dtype, off, low, high, rule):
    """A number or tensor as a tensor (B,); None where it changes nothing."""
    if value is None or isinstance(value, Tensor):
        if value is not None and value.shape not in ((), logits.shape[:1]):
            raise ValueError(
                f"sample_tokens: {name} must be a number or have shape ({logits.shape[0]},), got {list(value.shape)}"
            )
        return value if value is None else value.to(logits.device, dtype).expand(logits.shape[0])
    if not low <= value <= high:
        raise ValueError(f"sample_tokens: {name} must be {rule}, got {value}")
    return None if value == off else torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


@sample_tokens.arguments
def _(logits, temperature, top_k, top_p, min_p, seed, row_ids, steps, noise):
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"sample_tokens: logits must be floating point of shape (B, V > 0), got {logits.dtype} {list(logits.shape)}"
        )
    if row_ids is None or steps is None:
        raise ValueError("sample_tokens: row_ids and steps must be given, they key the noise; got None")
    steps = torch.full_like(row_ids, steps) if isinstance(steps, int) else steps
    if row_ids.shape != logits.shape[:1] or steps.shape != logits.shape[:1]:
        shapes = [list(row_ids.shape), list(steps.shape)]
        raise ValueError(f"sample_tokens: row_ids and steps must have shape ({logits.shape[0]},), got {shapes}")
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"sample_tokens: noise must have shape {list(logits.shape)}, got {list(noise.shape)}")
    return (
        logits.detach(),
        _per_row("temperature", temperature, logits, torch.float32, 1, 0, 1e6, "between 0 and 1e6"),
        _per_row("top_k", top_k, logits, torch.int64, 0, 0, 2**62, "0 (off) or more"),
        _per_row("top_p", top_p, logits, torch.float32, 1, 1e-30, 1, "above 0 and at most 1"),
        _per_row("min_p", min_p, logits, torch.float32, 0, 0, 1, "between 0 and 1"),
        (seed + 2**63) % 2**64 - 2**63,
        row_ids.long(),
        steps.long(),
        noise if noise is None else noise.float(),
    )


@sample_tokens.compiled
def _(kernels, logits, temperature, top_k, top_p, min_p, seed, row_ids, steps, noise):
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.shape[1] > 2**31 - 2**20:
        raise Declined(f"no compiled kernel for {logits.dtype} and a vocabulary of {logits.shape[1]}")
    logits = logits.contiguous()
    options = [x if x is None else x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    keys = [x if x is None else x.contiguous() for x in (row_ids, steps, noise)]
    outputs = _fake(logits)
    kernels.sample_tokens(
        logits.data_ptr(), logits.dtype == torch.bfloat16, *logits.shape,
        *(0 if x is None else x.data_ptr() for x in options), seed, *(0 if x is None else x.data_ptr() for x in keys),
        *(x.data_ptr() for x in outputs), lane(logits),
    )  # fmt: skip
    return outputs


@sample_tokens.inputs(
    small=[
        {"B": 1, "V": 1},
        {"B": 3, "V": 17},
        {"B": 5, "V": 1000, "temperature": 0.7},
        {"B": 4, "V": 999, "top_k": 5},
        {"B": 4, "V": 131, "top_p": 0.8},
        {"B": 3, "V": 65, "min_p": 0.05, "temperature": 1.5},
        {"B": 16, "V": 257, "mixed": True},
        {"B": 7, "V": 40, "injected": True, "top_k": 20},
        {"B": 0, "V": 7},
    ],
    large=[{"B": 1, "V": 50257}, {"B": 64, "V": 50257}, {"B": 64, "V": 151936}],
)
def _(B, V, device, dtype, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mixed=False, injected=False):
    logits = 3 * torch.randn(B, V, device=device, dtype=dtype)
    if mixed:  # every option off and on in one batch: masked tokens, ties, a row with one finite logit, greedy rows
        logits = logits.round().masked_fill(torch.rand(B, V, device=device) < 0.2, float("-inf"))
        logits[1, 1:], logits[:, 0] = float("-inf"), 1.0
        temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1e-3, 1.0], device=device).repeat(B)[:B]
        top_k = torch.tensor([0, 3, V, 40, 1], device=device).repeat(B)[:B]
        top_p = torch.tensor([1.0, 0.9, 0.5, 1e-6], device=device).repeat(B)[:B]
        min_p = torch.tensor([0.0, 0.02, 1.0], device=device).repeat(B)[:B]
    row_ids, steps = torch.randint(-(2**62), 2**62, (2, B), device=device)
    noise = torch.randn(B, V, device=device) if injected else None
    return logits, temperature, top_k, top_p, min_p, int(torch.randint(2**62, ())), row_ids, steps % 2**31, noise
