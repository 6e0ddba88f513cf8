"""PPO's policy loss from hidden states: log-probability, entropy, clipping and KL, gradients in the forward pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._cpu_head import KERNELS, CpuHead, pack_row_grads
from rlhf_fast.kernels._head_checks import check_head, check_rows, check_targets
from rlhf_fast.kernels._head_inputs import cost, random_head_inputs
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._ppo import (
    KL,
    LOSS_ESTIMATORS,
    STATS,
    Clip,
    PolicyLoss,
    TokenInputs,
    Whitening,
    policy_loss,
)
from rlhf_fast.kernels._tensors import as_float, detached, token_weights


def _fake(hidden, _weight, targets, *_options):
    logprobs = head.empty_rows(hidden, targets)
    return logprobs.new_empty(()), logprobs, torch.empty_like(logprobs), logprobs.new_empty(len(STATS))


@op(fake=_fake)
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | float,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    advantage_shift: float | Tensor | None = None,
    advantage_scale: float | Tensor | None = None,
    log_ratio_clamp: float = 20.0,
    clip_mode: str = "ppo",
    ratio_level: str = "token",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (), logprobs and entropy of each row (...), and stats (13,), all float32.

        ratio = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp))          A = (advantages - shift) * scale
        loss = sum weights * (max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
                              + kl_coef * kl - entropy_coef * entropy)

    (Schulman et al. 2017, arXiv 1707.06347, eq. 7.)

    hidden (..., D), weight (V, D), bias (V,), targets (...), temperature, softcap: as in `linear_logprobs`, which
        defines logprobs and entropy, and has the rules of dtypes and torch.autocast. (...) is (B, T) or (N,). Row t
        predicts targets[t]: of a causal model's output pass hidden[:, :-1] with labels[:, 1:]. Rows of target -100 are
        ignored.
    old_logprobs, advantages, ref_logprobs (...): not read where the target is ignored or the weight 0.
    weights (...): with 1 / (tokens of the whole optimizer batch) the losses of micro-batches add up. A number or a
        tensor () is the weight of every row.
    dual_clip: c > 0 bounds the clipped term by -A c where A < 0 (Ye et al. 2020, arXiv 1912.09729).
    kl_estimator: of KL(policy || reference), from d = logprobs - ref_logprobs: "k1" d, "k2" d^2 / 2, "k3"
        exp(-d) - 1 + d with d clamped like the log-ratio (Schulman 2020, joschu.net/blog/kl-approx.html). As a loss,
        k2 has the exact KL's gradient in expectation; k1 has none.
    advantage_shift, advantage_scale: numbers or tensors of one element, to whiten the advantages.
    log_ratio_clamp: 0 turns it off.
    clip_mode, ratio_level: as in `ppo_loss`: "cispo" has the clipped term -A min(ratio, 1 + clip_high) logprobs;
        "sequence", for (B, T), one ratio for each row, from its tokens with a target and a weight. kl and entropy stay
        those of tokens. "sequence" needs all log-probabilities before the first gradient: a fourth matrix product
        beside the three of "token" where the logits take more than a chunk: on a CPU 36 MiB of float32 (128
        MiB of bfloat16 where products are so and there is no softcap), on a GPU 2 GiB or more.

    Gradients: of the loss with respect to hidden, weight and bias, in their dtypes, summed in float32. A frozen tensor
    costs nothing. At a clip bound and at a tie with the dual clip the gradient is that of torch.clamp and
    torch.maximum; beyond log_ratio_clamp it is 0, but not that of "cispo". logprobs, entropy and stats have none: for a
    term of one's own in the loss call `linear_logprobs`, whose outputs have gradients.
    Raises ValueError where shapes do not fit, a target is out of range (on CPU only), kl_estimator, clip_mode or
    ratio_level is unknown, kl_coef is not 0 without ref_logprobs, "cispo" is given a dual_clip, or "sequence" a shape
    that is not (B, T).

    stats, named in `linear_ppo_loss.stats`, are sums over rows of weight * x that add up over micro-batches, with x:
        weight: 1
        clipped_low, clipped_high, clipped_dual: 1 where that clip is active, else 0; of "cispo" as in `ppo_loss`
        kl_k1, kl_k3: -log ratio and ratio - 1 - log ratio, two estimates of KL(old || new)
        ratio, ratio_square: ratio and its square
        policy_loss: the clipped term
        ref_kl: kl, 0 without ref_logprobs
        entropy: entropy
    and two extremes, to be joined by max and min:
        ratio_max, ratio_min: the largest and the smallest ratio; -inf and inf without a token
    """
    x = Inputs.bundle(
        hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip,
        kl_coef, kl_estimator, entropy_coef, temperature, softcap, bias, advantage_shift, advantage_scale,
        log_ratio_clamp, clip_mode, ratio_level,
    )  # fmt: skip
    _, _, logprobs, entropy, loss = _reference(x)
    return loss.loss, logprobs.detach(), entropy.detach(), torch.stack(loss.stats)


linear_ppo_loss.stats = STATS


class Inputs(NamedTuple):
    """The arguments of `linear_ppo_loss`, bundled."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    token_inputs: TokenInputs
    whitening: Whitening
    clip: Clip
    kl: KL
    entropy_coef: float
    temperature: float
    softcap: float

    @classmethod
    def bundle(
        cls, hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip,
        kl_coef, kl_estimator, entropy_coef, temperature, softcap, bias, shift, scale, log_ratio_clamp,
        clip_mode, ratio_level,
    ) -> "Inputs":  # fmt: skip
        token_inputs = TokenInputs(old_logprobs, advantages, weights, ref_logprobs)
        clip = Clip(clip_low, clip_high, dual_clip, 0.0, log_ratio_clamp, clip_mode, ratio_level)
        whitening, kl = Whitening(shift, scale), KL(kl_coef, kl_estimator)
        return cls(hidden, weight, targets, bias, token_inputs, whitening, clip, kl, entropy_coef, temperature, softcap)

    def flat(self) -> tuple:
        """Return the arguments in the op's order."""
        clip = self.clip
        return (
            self.hidden, self.weight, self.targets, *self.token_inputs, clip.low, clip.high, clip.dual, *self.kl,
            self.entropy_coef, self.temperature, self.softcap, self.bias, *self.whitening, clip.log_ratio,
            clip.mode, clip.level,
        )  # fmt: skip

    def loss(self, logprobs: Tensor, entropy: Tensor, valid: Tensor) -> PolicyLoss:
        return policy_loss(
            logprobs, entropy, valid, self.token_inputs, self.whitening, self.clip, self.kl, self.entropy_coef
        )


@linear_ppo_loss.normalize
def _(*args):
    x = Inputs.bundle(*args)
    check_head("linear_ppo_loss", x.hidden, x.weight, x.targets, x.bias, x.temperature, x.softcap)
    weights = token_weights(x.token_inputs.weights, x.hidden, x.targets.shape)
    x = x._replace(token_inputs=x.token_inputs._replace(weights=weights))
    check_rows("linear_ppo_loss", x.targets, **x.token_inputs._asdict())
    x.clip.check("linear_ppo_loss", x.targets.shape)
    if x.kl.estimator not in LOSS_ESTIMATORS:
        names = ", ".join(LOSS_ESTIMATORS)
        raise ValueError(f"linear_ppo_loss: kl_estimator must be one of {names}, got {x.kl.estimator!r}")
    if x.kl.coef and x.token_inputs.ref_logprobs is None:
        raise ValueError(f"linear_ppo_loss: kl_coef={x.kl.coef} needs ref_logprobs")
    return x._replace(
        token_inputs=x.token_inputs.map(Tensor.detach),
        whitening=Whitening.normalize("linear_ppo_loss", *x.whitening, x.hidden),
        clip=Clip(*(as_float(bound) for bound in x.clip[:-2]), *x.clip[-2:]),
        kl=KL(as_float(x.kl.coef), x.kl.estimator),
        entropy_coef=as_float(x.entropy_coef),
        temperature=float(x.temperature),
        softcap=float(x.softcap),
    ).flat()


def _reference(x: Inputs) -> tuple[Tensor, head.Softmax, Tensor, Tensor, PolicyLoss]:
    """Return the raw logits, their softmax, logprobs and entropy of the targets, and the loss."""
    check_targets("linear_ppo_loss", x.targets, x.weight.shape[0])
    raw_logits = head.raw_logits(x.hidden, x.weight, x.bias, x.targets)
    softmax = head.log_softmax(raw_logits, x.targets, x.temperature, x.softcap)
    rows = head.gather_targets(softmax, x.targets), head.entropy(softmax, x.targets)
    logprobs, entropy = (row.to(raw_logits.dtype) for row in rows)
    valid = (x.targets != head.IGNORE_INDEX) & (x.token_inputs.weights != 0)
    return raw_logits, softmax, logprobs, entropy, x.loss(logprobs, entropy, valid)


@linear_ppo_loss.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    return _launch(kernels, *args, False, False, False)[:4]


def _launch(kernels, *args):
    x = Inputs.bundle(*args[:-3])
    cpu_head = CpuHead(kernels, "linear_ppo_loss", x.hidden, x.weight, x.targets, x.bias, x.temperature, x.softcap)
    valid_inputs = x.token_inputs.map(lambda values: cpu_head.gather_valid(values.flatten()))

    def loss_of_rows(results):
        """Return the loss of sequences; all results are there."""
        valid = (x.targets != head.IGNORE_INDEX) & (x.token_inputs.weights != 0)
        loss = x.loss(*(cpu_head.scatter_valid(values) for values in results[:2]), valid)
        grads = (cpu_head.gather_valid(grad.flatten()) for grad in (loss.logprob_grad, loss.entropy_grad))
        return PolicyLoss(loss.loss, loss.stats, *grads)

    def loss_of(results, chunk):
        if x.clip.is_by_row:
            return loss_of_rows(results)
        chunk_inputs = valid_inputs.map(lambda values: values[chunk])
        return x._replace(token_inputs=chunk_inputs).loss(*results[:2], chunk_inputs.weights != 0)

    losses = []

    def coefficients_of(results, chunk):
        loss = loss_of(results, chunk)
        losses.append(loss)
        logprobs, entropy, largest, sums, *_ = results
        grads = head.row_grads(loss.logprob_grad, loss.entropy_grad, logprobs, entropy, sums)
        return pack_row_grads(largest, grads)

    results, grads = cpu_head.results_and_grads(coefficients_of, args[-3:], needs_all_rows=x.clip.is_by_row)
    loss = losses[0] if len(losses) == 1 else loss_of(results, slice(None))  # a single chunk has all rows
    logprobs, entropy = map(cpu_head.scatter_valid, results[:2])
    return loss.loss, logprobs, entropy, torch.stack(loss.stats), *grads


def _fake_with_gradients(*args):
    x = Inputs.bundle(*args[:-3])
    return *_fake(*args), *head.empty_input_grads(x.hidden, x.weight, x.bias, args[-3:])


@linear_ppo_loss.variant(outputs=7, flags=head.NEEDS_GRAD, fake=_fake_with_gradients)
def linear_ppo_loss_with_gradients(*args):
    """Return the outputs of `linear_ppo_loss` and the loss's gradients of hidden, weight and bias, (0,) where not
    needed."""
    x = Inputs.bundle(*args[:-3])
    raw_logits, softmax, logprobs, entropy, loss = _reference(x)
    z_grad = head.logits_grad(softmax, x.targets, loss.logprob_grad, loss.entropy_grad)
    raw_grad = (z_grad * head.scale_logits_grad(raw_logits, x.temperature, x.softcap)).to(raw_logits.dtype)
    grads = head.input_grads(raw_grad, x.hidden, x.weight, x.bias, x.targets, args[-3:])
    return loss.loss, logprobs, entropy, torch.stack(loss.stats), *grads


linear_ppo_loss_with_gradients.compiled(_launch, required_symbols=KERNELS)


def _forward(ctx, *args):
    needed = Inputs.bundle(*ctx.needs_input_grad)
    needs_grad = [needed.hidden, needed.weight, needed.bias]
    loss, logprobs, entropy, stats, *grads = linear_ppo_loss_with_gradients.torch_op(*args, *needs_grad)
    head.save_grads(ctx, grads, needs_grad, args)
    ctx.mark_non_differentiable(logprobs, entropy, stats)
    return loss, logprobs, entropy, stats


def _backward(ctx, grad_loss, *_):
    d_hidden, d_weight, d_bias = head.scale_grads(ctx, grad_loss, linear_ppo_loss_with_gradients.torch_op)
    no_grads = Inputs.bundle(*[None] * len(linear_ppo_loss.names))
    return no_grads._replace(hidden=d_hidden, weight=d_weight, bias=d_bias).flat()


linear_ppo_loss.gradient(_backward, wrt=("hidden", "weight", "bias"), forward=_forward)
linear_ppo_loss.cost(cost)

SEQUENCE = {"ratio_level": "sequence"}
ALL = {"bias": True, "reference": True, "kl_coef": 0.3, "entropy_coef": 0.1, "temperature": 0.8, "softcap": 6.0}
SMALL = [
    {"N": 1, "D": 1, "V": 2, "clip_low": 0.9, "clip_high": 0.9},
    {"N": 23, "D": 17, "V": 33, **ALL, "kl_estimator": "k1", "far": True},
    {"N": 37, "D": 24, "V": 1031, "offset": -100.0, "index": torch.int32, "dual_clip": 3.0, "whiten": True},
    {"N": 9, "D": 8, "V": 2050, "reference": True, "kl_coef": 0.3, "entropy_coef": 0.1, "clip_high": 0.28},
    {"N": 9, "D": 8, "V": 50, **ALL, "kl_estimator": "k3", "frozen_weight": True},
    {"N": 0, "D": 4, "V": 5},
    {"N": 11, "D": 8, "V": 70, "reference": True, "kl_coef": 0.3, "weights": 0.125},
    {"N": 19, "D": 8, "V": 65, "clip_mode": "cispo", "entropy_coef": 0.1, "clip_high": 0.1},
    {"N": 24, "D": 12, "V": 519, "B": 4, **SEQUENCE, **ALL, "clip_low": 0.05, "clip_high": 0.03, "whiten": True},
    {"N": 18, "D": 8, "V": 40, "B": 3, **SEQUENCE, "clip_mode": "cispo", "reference": True, "clip_high": 0.01},
    {"N": 21, "D": 8, "V": 40, "B": 7, **SEQUENCE, "far": True, "dual_clip": 3.0, "entropy_coef": 0.1},
]
LARGE = [{"N": 512, "D": 768, "V": 50257}, {"N": 2048, "D": 256, "V": 8192}]


SCALARS = {"weights", *linear_ppo_loss.defaults} - {"bias"}


@linear_ppo_loss.inputs(small_sizes=SMALL, large_sizes=LARGE)
def _make_inputs(N, D, V, device, dtype, far=False, whiten=False, reference=False, B=None, **options):
    """far: log-ratios beyond every bound. Rows are NaN where the target is ignored or the weight 0. B: the tokens are B
    sequences."""
    scalars = {name: options.pop(name) for name in list(options) if name in SCALARS}
    hidden, weight, targets, bias = random_head_inputs(N, D, V, device, dtype, **options)
    has_no_weight = (torch.rand(N, device=device) < 0.2) & (torch.arange(N, device=device) > 0)
    has_no_weight &= "weights" not in scalars
    weights = (torch.rand(N, device=device) + 0.1).masked_fill(has_no_weight, 0) / max(N, 1)
    invalid = (targets == head.IGNORE_INDEX) | (weights == 0)
    with torch.no_grad():
        raw_logits = head.raw_logits(hidden, weight, bias, targets)
        softmax = head.log_softmax(raw_logits, targets, scalars.get("temperature", 1.0), scalars.get("softcap", 0.0))
        logprobs = head.gather_targets(softmax, targets).to(raw_logits.dtype)
    old_logprobs = logprobs + (40 if far else 0.5) * (2 * torch.rand(N, device=device) - 1)
    ref_logprobs = logprobs + 0.5 * torch.randn(N, device=device)
    advantages = torch.randn(N, device=device)
    given = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "old_logprobs": old_logprobs.masked_fill(invalid, torch.nan),
        "advantages": advantages.masked_fill(invalid, torch.nan),
        "weights": weights,
        "bias": bias,
        **scalars,
    }
    if reference:
        given["ref_logprobs"] = ref_logprobs.masked_fill(invalid, torch.nan)
    if whiten:
        given["advantage_shift"] = torch.tensor(0.3, device=device)
        given["advantage_scale"] = torch.tensor(1.7, device=device)
    for name in ("hidden", "targets", "old_logprobs", "advantages", "weights", "ref_logprobs") if B else ():
        if isinstance(given.get(name), Tensor):
            rows = given[name].detach().unflatten(0, (B, -1))
            given[name] = rows.requires_grad_(given[name].requires_grad)
    return tuple(given.get(name, linear_ppo_loss.defaults.get(name)) for name in linear_ppo_loss.names)


@linear_ppo_loss_with_gradients.inputs(
    small_sizes=SMALL[1:4] + SMALL[7:], large_sizes=[{"N": 1024, "D": 256, "V": 8192}]
)
def _(**size):
    args = detached(_make_inputs(**size))
    return *args, True, True, args[15] is not None
