"""PPO's policy loss from hidden states: log-probability, entropy, clipping and KL, gradients in the forward pass."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _cpu_head as blocks
from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels import _ppo as policy
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast


def _fake(hidden, weight, targets, *rest):
    logprobs = torch.empty(targets.shape, dtype=upcast(hidden[..., :0]).dtype, device=hidden.device)
    return logprobs.new_empty(()), logprobs, torch.empty_like(logprobs), logprobs.new_empty(len(policy.STATS))


@op(fake=_fake)
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
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
    advantage_shift: Tensor | None = None,
    advantage_scale: Tensor | None = None,
    log_ratio_clamp: float = 20.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), logprobs and entropy of targets (...), stats (13,), float32, from hidden (..., D), weight (V, D).

        ratio = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp))          A = (advantages - shift) * scale
        loss = sum weights * (max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
                              + kl_coef * kl - entropy_coef * entropy)

    with logprobs and entropy as `linear_logprobs` defines them (Schulman et al. 2017, arXiv 1707.06347, eq. 7). kl
    estimates KL(policy || reference) from d = logprobs - ref_logprobs: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d, -d
    clamped like the log-ratio (Schulman 2020, joschu.net/blog/kl-approx.html). As a loss, k2 has the exact KL's
    gradient in expectation, k1 none. dual_clip c > 0 bounds the first term by -A c where A < 0 (Ye et al. 2020,
    arXiv 1912.09729). advantage_shift and advantage_scale, numbers or tensors of one element, whiten on the fly.

    The loss is a sum: with weights 1 / (tokens of the whole optimizer batch) it adds up over micro-batches. targets of
    -100 are ignored, as in `linear_logprobs`. Where a weight is 0 the token has its logprobs and entropy, and nothing
    else is looked at. The gradients of hidden, weight and bias come with the loss, in their dtypes, summed in
    float32; a frozen one costs nothing. logprobs, entropy and stats have none. Where a clip's branches tie the slope is
    that of torch.clamp and torch.maximum; beyond log_ratio_clamp it is 0. ValueError where shapes do not fit, a target
    is out of range (on CPU), kl_estimator is another word, or kl_coef is not 0 without ref_logprobs.

    stats, named in `linear_ppo_loss.stats`: sums of weight times 1, the indicators that the lower, the upper and the
    dual clip were active, -log ratio, ratio - 1 - log ratio (both estimate KL(old || new), nats), ratio, its square,
    the clipped term, kl (0 without ref_logprobs) and entropy; they add up over micro-batches. The last two, the largest
    and the smallest ratio (-inf and inf without a token), join by max and min.
    """
    head.check_targets("linear_ppo_loss", targets, weight.shape[0])
    logp = head.scale(head.logits(hidden, weight, bias, targets), temperature, softcap).log_softmax(-1)
    logprobs, entropy = head.gathered(logp, targets), head.entropy_of(logp, targets)
    on = (targets != head.IGNORED) & (weights != 0)
    loss, stats, _, _ = policy.policy_loss(
        logprobs, entropy, on, weights, old_logprobs, advantages, ref_logprobs, advantage_shift, advantage_scale,
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, log_ratio_clamp,
    )  # fmt: skip
    return loss, logprobs.detach(), entropy.detach(), stats


linear_ppo_loss.stats = policy.STATS


@linear_ppo_loss.normalize
def _(
    hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip, kl_coef,
    kl_estimator, entropy_coef, temperature, softcap, bias, advantage_shift, advantage_scale, log_ratio_clamp,
):  # fmt: skip
    head.check_head("linear_ppo_loss", hidden, weight, targets, bias, temperature, softcap)
    rows = {"old_logprobs": old_logprobs, "advantages": advantages, "weights": weights, "ref_logprobs": ref_logprobs}
    head.check_rows("linear_ppo_loss", targets, **rows)
    if kl_estimator not in policy.ESTIMATORS:
        names = ", ".join(policy.ESTIMATORS)
        raise ValueError(f"linear_ppo_loss: kl_estimator must be one of {names}, got {kl_estimator!r}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"linear_ppo_loss: kl_coef={kl_coef} needs ref_logprobs")
    old_logprobs, advantages, weights, ref_logprobs = (x if x is None else x.detach() for x in rows.values())
    shift = _one_element("advantage_shift", advantage_shift, hidden)
    factor = _one_element("advantage_scale", advantage_scale, hidden)
    return (
        hidden, weight, targets, old_logprobs, advantages, weights.float() if weights.dtype == torch.bool else weights,
        ref_logprobs, float(clip_low), float(clip_high), float(dual_clip), float(kl_coef), kl_estimator,
        float(entropy_coef), float(temperature), float(softcap), bias, shift, factor, float(log_ratio_clamp),
    )  # fmt: skip


def _one_element(name: str, x: Tensor | float | None, like: Tensor) -> Tensor | None:
    if x is None or not isinstance(x, Tensor):
        return None if x is None else torch.full((), x, dtype=upcast(like[..., :0]).dtype, device=like.device)
    if x.numel() != 1:
        raise ValueError(f"linear_ppo_loss: {name} must be a number or one element, got shape {list(x.shape)}")
    return x.detach().reshape(())


@linear_ppo_loss.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    return _train(kernels, *args, False, False, False)[:4]


def _train(
    kernels, hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip,
    kl_coef, kl_estimator, entropy_coef, temperature, softcap, bias, shift, factor, log_ratio_clamp, *by,
):  # fmt: skip
    of = blocks.Head(kernels, "linear_ppo_loss", hidden, weight, targets, bias, temperature, softcap)
    weights, old_logprobs, advantages, ref_logprobs = (
        x if x is None else of.compact(x.flatten()) for x in (weights, old_logprobs, advantages, ref_logprobs)
    )

    def loss_of(results, rows):
        ref = ref_logprobs if ref_logprobs is None else ref_logprobs[rows]
        return policy.policy_loss(
            *results[:2], weights[rows] != 0, weights[rows], old_logprobs[rows], advantages[rows], ref, shift, factor,
            clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, log_ratio_clamp,
        )  # fmt: skip

    def slopes(results, rows):
        _, _, g, h = loss_of(results, rows)
        _, entropy, largest, log_sum = results
        return blocks.slopes(largest, log_sum, g, -g - h * entropy, -h)

    results, grads = of.train(slopes, by)
    loss, stats, _, _ = loss_of(results, slice(None))
    return loss, of.expand(results[0]), of.expand(results[1]), stats, *grads


def _fake_with_gradients(hidden, weight, targets, *rest):
    *rest, by_hidden, by_weight, by_bias = rest
    grads = head.empty_products(hidden, weight, rest[12], (by_hidden, by_weight, by_bias))
    return *_fake(hidden, weight, targets), *grads


@op(fake=_fake_with_gradients)
def linear_ppo_loss_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    temperature: float,
    softcap: float,
    bias: Tensor | None,
    advantage_shift: Tensor | None,
    advantage_scale: Tensor | None,
    log_ratio_clamp: float,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_ppo_loss` gives, then the loss's gradients by hidden, weight and bias, (0,) where not asked for."""
    head.check_targets("linear_ppo_loss", targets, weight.shape[0])
    x = head.logits(hidden, weight, bias, targets)
    logp = head.scale(x, temperature, softcap).log_softmax(-1)
    logprobs, entropy = head.gathered(logp, targets), head.entropy_of(logp, targets)
    on = (targets != head.IGNORED) & (weights != 0)
    loss, stats, g, h = policy.policy_loss(
        logprobs, entropy, on, weights, old_logprobs, advantages, ref_logprobs, advantage_shift, advantage_scale,
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, log_ratio_clamp,
    )  # fmt: skip
    dz = head.logits_gradient(logp, targets, g, -g - h * entropy, -h)
    dx, by = dz * head.slope(x, temperature, softcap), (by_hidden, by_weight, by_bias)
    return loss, logprobs, entropy, stats, *head.products(dx, hidden, weight, bias, targets, by)


linear_ppo_loss_with_gradients.compiled(_train, required_symbols=blocks.KERNELS)


def _forward(ctx, *args):
    by = [ctx.needs_input_grad[i] for i in (0, 1, 15)]
    loss, logprobs, entropy, stats, *grads = linear_ppo_loss_with_gradients.torch_op(*args, *by)
    head.keep(ctx, grads, by, args)
    ctx.mark_non_differentiable(logprobs, entropy, stats)
    return loss, logprobs, entropy, stats


def _backward(ctx, grad_loss, *_):
    d_hidden, d_weight, d_bias = head.scaled(ctx, grad_loss, linear_ppo_loss_with_gradients.torch_op)
    return d_hidden, d_weight, *[None] * 13, d_bias, None, None, None


linear_ppo_loss.gradient(_backward, forward=_forward)

ALL = {"bias": True, "reference": True, "kl_coef": 0.3, "entropy_coef": 0.1, "temperature": 0.8, "softcap": 6.0}
SMALL = [
    {"N": 1, "D": 1, "V": 2, "clip_low": 0.9, "clip_high": 0.9},
    {"N": 23, "D": 17, "V": 33, **ALL, "kl_estimator": "k1", "far": True},
    {"N": 37, "D": 24, "V": 1031, "offset": -100.0, "index": torch.int32, "dual_clip": 3.0, "whiten": True},
    {"N": 9, "D": 8, "V": 2050, "reference": True, "kl_coef": 0.3, "entropy_coef": 0.1, "clip_high": 0.28},
    {"N": 9, "D": 8, "V": 50, **ALL, "kl_estimator": "k3", "frozen_weight": True},
    {"N": 0, "D": 4, "V": 5},
]


@linear_ppo_loss.cost
def _(gradient, hidden, weight, targets, *rest):
    return head.cost(gradient, hidden, weight, targets)


@linear_ppo_loss.inputs(
    small_sizes=SMALL, large_sizes=[{"N": 512, "D": 768, "V": 50257}, {"N": 2048, "D": 256, "V": 8192}]
)
def _make(N, D, V, device, dtype, far=False, whiten=False, reference=False, **options):
    """far: log-ratios beyond every bound. NaN stands wherever a target is ignored or a weight 0."""
    scalars = {name: options.pop(name) for name in list(options) if name in linear_ppo_loss.defaults and name != "bias"}
    hidden, weight, targets, bias = head.make_head(N, D, V, device, dtype, **options)
    off = (torch.rand(N, device=device) < 0.2) & (torch.arange(N, device=device) > 0)
    weights = (torch.rand(N, device=device) + 0.1).masked_fill(off, 0) / max(N, 1)
    off = (targets == head.IGNORED) | (weights == 0)

    def rows(values):
        return values.masked_fill(off, torch.nan)

    with torch.no_grad():
        logp = head.scale(
            head.logits(hidden, weight, bias, targets), scalars.get("temperature", 1.0), scalars.get("softcap", 0.0)
        ).log_softmax(-1)
        old = head.gathered(logp, targets) + (40 if far else 0.5) * (2 * torch.rand(N, device=device) - 1)
        ref = head.gathered(logp, targets) + 0.5 * torch.randn(N, device=device)
    args = {
        "hidden": hidden, "weight": weight, "targets": targets, "old_logprobs": rows(old),
        "advantages": rows(torch.randn(N, device=device)), "weights": weights, "bias": bias, **scalars,
        "ref_logprobs": rows(ref) if reference else None,
    }  # fmt: skip
    if whiten:
        args |= {
            "advantage_shift": torch.tensor(0.3, device=device),
            "advantage_scale": torch.tensor(1.7, device=device),
        }
    return tuple(args.get(name, linear_ppo_loss.defaults.get(name)) for name in linear_ppo_loss.names)


@linear_ppo_loss_with_gradients.inputs(small_sizes=SMALL[1:4], large_sizes=[{"N": 1024, "D": 256, "V": 8192}])
def _(**size):
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in _make(**size))
    return *args, True, True, args[15] is not None
