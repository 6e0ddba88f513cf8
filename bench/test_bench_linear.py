"""The linear head's ops beside plain torch, torch's own fused loss and the three bare matrix products."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.bench.compare import bare_products
from rlhf_fast.bench.timing import Cpu, has_bf16_products

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZES = pytest.mark.parametrize("N, D, V", [(512, 768, 50257), (2048, 256, 8192)])
BARE_TARGET = {torch.float32: 1 / 1.15, torch.bfloat16: 1 / 1.2}
VOCAB_BLOCK = 4096


def head(N, D, V, dtype):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,))


def product(hidden, weight):
    """Return plain torch's logits, float32 after the product."""
    if hidden.dtype == torch.bfloat16 and not has_bf16_products():
        hidden, weight = hidden.float(), weight.float()
    return (hidden @ weight.T).float()


def training(loss, hidden, weight):
    """Return a forward and backward pass into fresh gradients."""

    def run():
        hidden.grad = weight.grad = None
        loss(hidden, weight).backward()

    return run


def peaks(ours, eager, hidden, weight) -> str:
    """Return the peak memory of both passes, without the inputs' gradients."""
    found = []
    for run in (ours, eager):
        hidden.grad = weight.grad = None
        found.append(Cpu().peak_bytes(run) - hidden.nbytes - weight.nbytes)
    ours, eager = found
    return f"peak {ours / 1e6:.0f} MB of eager's {eager / 1e6:.0f} ({eager / max(ours, 1):.1f}x less)"


def agree(ours, eager, hidden, weight, dtype):
    """Assert that the gradients differ by rounding only. In bfloat16 plain torch rounds its logits, ours does not."""
    found = []
    for run in (ours, eager):
        run()
        found.append((hidden.grad.float(), weight.grad.float()))
    for mine, theirs in zip(*found, strict=True):
        scale = theirs.abs().max()
        assert (mine - theirs).abs().max() <= scale * (1e-4 if dtype == torch.float32 else 0.05)


def compare_head(compare, name, ours, eager, hidden, weight, others=()):
    (N, D), V, dtype = hidden.shape, weight.shape[0], hidden.dtype
    ours, eager = training(ours, hidden, weight), training(eager, hidden, weight)
    label = " float32" if dtype == torch.bfloat16 and not has_bf16_products() else ""
    baselines = {"eager": eager}
    for key, block in (("bare mm", 0), ("bare mm, blocks", VOCAB_BLOCK)):
        bare = bare_products([(hidden, weight)], hidden_grad=True, weight_grad=True, vocab_block=block)
        baselines[key + label] = (bare.run, BARE_TARGET[dtype])
    baselines |= {key: training(loss, hidden, weight) for key, loss in dict(others).items()}
    memory = peaks(ours, eager, hidden, weight)
    compare(
        f"{name} {str(dtype)[6:]} [{N}, {D}] x {V}: {memory}", ours, baselines,
        check=lambda: agree(ours, eager, hidden, weight, dtype), flops=6 * N * D * V, memory=memory,
    )  # fmt: skip


@SIZES
@DTYPES
def test_linear_cross_entropy(compare, N, D, V, dtype):
    hidden, weight, targets = head(N, D, V, dtype)
    others = {}
    if hasattr(torch.nn.functional, "linear_cross_entropy") and N * V < 1 << 25 and dtype == torch.float32:
        fused = torch.nn.functional.linear_cross_entropy
        others["F.linear_cross_entropy"] = lambda x, w: fused(x, w, targets)
    compare_head(
        compare, "linear_cross_entropy", lambda x, w: ops.linear_cross_entropy(x, w, targets)[0],
        lambda x, w: torch.nn.functional.cross_entropy(product(x, w), targets), hidden, weight, others,
    )  # fmt: skip


@SIZES
@DTYPES
def test_linear_ppo_loss(compare, N, D, V, dtype):
    hidden, weight, targets = head(N, D, V, dtype)
    # No ratio is near a clip bound: plain torch rounds the logits, and beyond the bound a row has another gradient.
    log_ratio = torch.where(torch.rand(N) < 0.1, 0.4, 0.1 * torch.rand(N)) * torch.randn(N).sign()
    with torch.no_grad():
        old = ops.linear_logprobs(hidden, weight, targets)[0] - log_ratio
    advantages, weights = torch.randn(N), torch.full((N,), 1 / N)

    def eager(x, w):
        logp = product(x, w).log_softmax(-1)
        ratio = (logp.gather(-1, targets[:, None]).squeeze(-1) - old).clamp(-20, 20).exp()
        entropy = -(logp.exp() * logp).sum(-1)
        terms = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        return (weights * (terms - 0.01 * entropy)).sum()

    def ours(x, w):
        return ops.linear_ppo_loss(x, w, targets, old, advantages, weights, entropy_coef=0.01)[0]

    compare_head(compare, "linear_ppo_loss", ours, eager, hidden, weight)


@DTYPES
@pytest.mark.parametrize("N, V", [(256, 32000), (256, 50257)])
def test_token_logprobs(compare, N, V, dtype):
    logits, targets = (3 * torch.randn(N, V)).to(dtype), torch.randint(V, (N,))

    def plain():
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])

    def plain_and_entropy():
        logp = torch.log_softmax(logits.float(), -1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    def check():
        for ours, theirs in zip(ops.token_logprobs(logits, targets), plain_and_entropy(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    target = 3.0 if (V, dtype) == (32000, torch.float32) else None
    compare(
        f"token_logprobs {str(dtype)[6:]} [{N}, {V}]", lambda: ops.token_logprobs(logits, targets),
        {"log_softmax + gather": (plain, target) if target else plain, "and entropy": plain_and_entropy},
        check=check, bytes=logits.nbytes,
    )  # fmt: skip


@DTYPES
def test_token_logprobs_backward(compare, dtype):
    logits, targets = (3 * torch.randn(256, 32000)).to(dtype).requires_grad_(), torch.randint(32000, (256,))
    ours = ops.token_logprobs(logits, targets)
    logp = torch.log_softmax(logits.float(), -1)
    plain = logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    def gradient(outputs):
        return torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), logits, retain_graph=True)[0]

    def check():
        a, b = gradient(ours).float(), gradient(plain).float()
        assert (a - b).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-2) * b.abs().max()

    compare(
        f"token_logprobs backward {str(dtype)[6:]} [256, 32000]", lambda: gradient(ours),
        {"log_softmax + gather + entropy": lambda: gradient(plain)}, check=check, bytes=2 * logits.nbytes,
    )  # fmt: skip


def test_linear_logprobs_scoring(compare):
    hidden, weight, targets = (x.detach() for x in head(512, 768, 50257, torch.float32))

    def plain():
        return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    def check():
        torch.testing.assert_close(ops.linear_logprobs(hidden, weight, targets)[0], plain(), atol=1e-5, rtol=1e-5)

    compare(
        "linear_logprobs scoring float32 [512, 768] x 50257", lambda: ops.linear_logprobs(hidden, weight, targets),
        {"eager": plain, "bare mm": lambda: hidden @ weight.T}, check=check, flops=2 * 512 * 768 * 50257,
    )  # fmt: skip
