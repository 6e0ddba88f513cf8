"""sample_tokens beside torch's own ways to draw a token: softmax + multinomial, and top-p by sorting."""

import pytest
import torch

from rlhf_fast import ops


def multinomial(logits):
    """Sample a token and its log-probability, which is what a rollout needs at least."""
    logprobs = logits.float().log_softmax(-1)
    tokens = torch.multinomial(logprobs.exp(), 1)
    return tokens, logprobs.gather(1, tokens)


def multinomial_token_only(logits):
    return torch.multinomial(logits.float().softmax(-1), 1)


def sorted_top_p(logits, top_p):
    """Apply top-p as transformers does, then sample a token and its log-probability."""
    ascending, order = logits.float().sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1:] = False
    return multinomial(logits.float().masked_fill(removed.scatter(1, order, removed), float("-inf")))


def topk_then_multinomial(logits, top_k):
    return multinomial(logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf")))


def check_near_reference(args):
    def check():
        args_few = [a[:4] if isinstance(a, torch.Tensor) else a for a in args]
        ours, truth = (
            ops.sample_tokens(*args_few),
            ops.sample_tokens.reference(*ops.sample_tokens.normalized(*args_few)),
        )
        assert torch.equal(ours[0], truth[0])
        torch.testing.assert_close(ours[1:], truth[1:], atol=2e-5, rtol=1e-5)

    return check


PLAIN = [size for size in ops.sample_tokens.large_sizes if size.keys() == {"B", "V"}]


# Floor: logits read once, and about 55 operations a token (Philox 35, exp 12, sums).
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", PLAIN, ids=lambda size: f"{size['B']}x{size['V']}")
def test_unfiltered(compare, size, dtype):
    args = ops.sample_tokens.make_inputs(device="cpu", dtype=dtype, **size)
    target = 5 if size == {"B": 64, "V": 50257} and dtype == torch.float32 else None
    compare(
        f"sample_tokens {list(size.values())} {str(dtype)[6:]}",
        lambda: ops.sample_tokens(*args),
        {
            "softmax + multinomial": (lambda: multinomial_token_only(args[0]), target),
            "log_softmax + multinomial + gather": lambda: multinomial(args[0]),
        },
        check=check_near_reference(args),
        bytes=args[0].nbytes,
        flops=55 * args[0].numel(),
    )


FILTERS = {
    "top-p 0.95": ({"top_p": 0.95}, lambda x: sorted_top_p(x, 0.95), "sort-based top-p", 12),
    "top-p 0.95, T 0.7": (
        {"top_p": 0.95, "temperature": 0.7}, lambda x: sorted_top_p(x / 0.7, 0.95), "sort-based top-p", 12,
    ),
    "top-k 50": ({"top_k": 50}, lambda x: topk_then_multinomial(x, 50), "topk + multinomial", None),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("filters", FILTERS)
def test_filtered(compare, filters, dtype):
    options, baseline, name, target = FILTERS[filters]
    args = ops.sample_tokens.make_inputs(device="cpu", dtype=dtype, B=64, V=50257, **options)
    compare(
        f"sample_tokens [64, 50257] {filters} {str(dtype)[6:]}",
        lambda: ops.sample_tokens(*args),
        {name: (lambda: baseline(args[0]), target)},
        check=check_near_reference(args),
        bytes=args[0].nbytes,
        flops=30 * args[0].numel(),
    )
