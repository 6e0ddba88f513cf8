"""Sample one token for each row of logits. kernels/_sampling.py defines the noise, the filters and the choice."""

import torch
from torch import Tensor

from rlhf_fast.kernels._arguments import check_floating
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._sampling import SamplingOptions, empty_outputs, normalize_options, sample_reference
from rlhf_fast.kernels._tensors import as_matrix, contiguous

BLOCKS_PER_SM = 6  # of the filters' CUDA kernels: two rounds of sample_kept_kernel's three
MIN_SPLIT = 4096  # tokens of a row that are worth a block


def _fake(logits, *_options):
    return empty_outputs(logits.shape[:1], logits)


@op(fake=_fake)
def sample_tokens(
    logits: Tensor,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    steps: int | Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample one token for each row of `logits` (B, V), and return it with its log-probabilities in nats, all (B,).
    `row_ids` and `steps` are required: they key the noise.

        z = logits / temperature        token = argmax over kept v of z_v + gumbel(seed, row id, step, v)

    temperature, top_k, top_p, min_p: numbers or tensors (B,). 1, 0, 1 and 0 (or None) turn them off. The filters apply
        in this order, and equal logits rank by index, lowest first:
        top_k keeps the top_k largest logits;
        top_p keeps of those the fewest largest whose mass reaches top_p of theirs;
        min_p keeps of those the ones at least min_p times as probable as the most probable token.
    temperature 0: takes the largest logit, the lowest index among equals. That choice has probability one: logprobs,
        kept_logprobs, log_kept_mass and entropy are 0; raw_logprobs is as with any temperature.
    row_ids (B,) int64: names each sample, say prompt * samples + sample.
    steps (B,) or an int: counts the tokens of each sample.
    noise (B, V): Gumbel values that replace the keyed noise; a token whose noise is NaN is not sampled.

    Returns, the first int64, the others float32:
        tokens: -1, and NaN in the other outputs, for a row without a distribution: a NaN or +inf, no finite logit, an
            option out of range, a temperature above 1e6
        logprobs: at the temperature, before the filters, as a trainer computes it again
        raw_logprobs: at temperature 1, before the filters
        kept_logprobs: at the temperature, after the filters: logprobs - log_kept_mass
        log_kept_mass: the log of the probability that the filters keep
        entropy: at the temperature, before the filters

    Gradients: none.
    Raises ValueError where shapes differ, a number is out of range, or row_ids or steps are missing.
    """
    assert row_ids is not None and steps is not None  # the normalizer has checked it
    options = SamplingOptions._make((temperature, top_k, top_p, min_p, seed, row_ids, steps))
    return sample_reference(logits, options, noise)


@sample_tokens.normalize
def _(logits, *args):
    *options, noise = args
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"sample_tokens: logits must be floating point of shape (B, V > 0), got {logits.dtype} {list(logits.shape)}"
        )
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"sample_tokens: noise must have shape {list(logits.shape)}, got {list(noise.shape)}")
    check_floating("sample_tokens", ("noise",), (noise,))  # before it is converted
    options = normalize_options("sample_tokens", logits, *options)
    return logits.detach(), *options, noise if noise is None else noise.float()


@sample_tokens.compiled(devices=("cpu",))
def _(kernels, logits, *args):
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.shape[1] > 2**31 - 2**20:
        raise Unsupported(f"no compiled kernel for {logits.dtype} and a vocabulary of {logits.shape[1]}")
    logits, outputs = logits.contiguous(), _fake(logits)
    *options, seed, row_ids, steps, noise = args
    options, keys = contiguous(*options), contiguous(row_ids, steps, noise)
    kernels.sample_tokens(
        logits.data_ptr(), logits.dtype == torch.bfloat16, *logits.shape, *data_ptrs(*options), seed,
        *data_ptrs(*keys, *outputs), stream_or_threads(logits),
    )  # fmt: skip
    return outputs


# Before Triton: on an H100 at 256 x 128256 in bfloat16 104 us on the device, Triton 112; with top-p 148 against 474.
@sample_tokens.compiled(devices=("cuda",))
def _(kernels, logits, *args):
    (code,) = dtype_codes(kernels, logits)
    B, V = logits.shape
    if V > 2**30:
        raise Unsupported(f"no compiled kernel for a vocabulary of {V}")
    logits, outputs = as_matrix(logits), _fake(logits)
    *options, seed, row_ids, steps, noise = args
    options, keys = contiguous(*options), contiguous(row_ids, steps, noise)
    threads = kernels.sample_tokens_max_threads if V > 1024 else 64
    tiles = -(-V // (kernels.sample_tokens_per_thread * threads))
    tile_results = torch.empty(B, tiles, kernels.sample_tokens_tile_bytes, dtype=torch.uint8, device=logits.device)
    filter_states, splits = None, 1
    if not all(option is None for option in options[1:]):
        states = (B, kernels.sample_tokens_state_bytes)
        filter_states = torch.empty(states, dtype=torch.uint8, device=logits.device)
        splits = min(_filter_splits(B, V, logits), kernels.sample_tokens_max_splits)
    kernels.sample_tokens(
        logits.data_ptr(), code, B, V, logits.stride(0), *data_ptrs(*options), seed, *data_ptrs(*keys, *outputs),
        threads, tiles, tile_results.data_ptr(), splits, *data_ptrs(filter_states), stream_or_threads(logits),
    )  # fmt: skip
    return outputs


def _filter_splits(B: int, V: int, logits: Tensor) -> int:
    """Return how many blocks share a row in the filters' CUDA kernels. No bit depends on it."""
    num_sms = torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 4
    return max(1, min(BLOCKS_PER_SM * num_sms // max(B, 1), V // MIN_SPLIT))


@sample_tokens.inputs(
    small_sizes=[
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
    large_sizes=[
        {"B": 1, "V": 50257},
        {"B": 64, "V": 50257},
        {"B": 64, "V": 151936},
        {"B": 64, "V": 151936, "temperature": 0.7, "top_k": 1000, "top_p": 0.9, "min_p": 0.01},
    ],
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
