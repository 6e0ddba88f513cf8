"""token_logprobs on a GPU: one read of the logits, and for the gradient one more, which mostly the second-level cache
answers, and one write.

2 bytes a logit in bfloat16 forward, the floor; backward 2 read (and 2 of the cache) and 2 written. Loads take 16 bytes
wherever a row starts, stores do where the gradient's rows start as the logits' do, as they do unless the logits are a
part of something wider. _softmax.py has the mathematics, _logits.py the kernels.
"""

import torch

from rlhf_fast.kernels._head_checks import check_targets
from rlhf_fast.kernels.triton import _logits as rows
from rlhf_fast.kernels.triton import launch


def _logits(logits, targets, temperature, softcap) -> rows.Logits:
    launch.serves(logits)
    check_targets("token_logprobs", targets, logits.shape[-1])
    V = logits.shape[-1]
    x = logits.detach().reshape(-1, V)
    x = x if x.stride(1) == 1 or V == 1 else x.contiguous()
    return rows.Logits(x, V, targets.reshape(-1).contiguous(), temperature, softcap, aligned=False)


def token_logprobs(logits, targets, temperature, softcap):
    results = rows.Results.empty(targets)
    rows.statistics(_logits(logits, targets, temperature, softcap), results._replace(statistics=None))
    return results.logprobs, results.entropy


def token_logprobs_backward(grad_logprobs, grad_entropy, logits, targets, temperature, softcap):
    of = _logits(logits, targets, temperature, softcap)
    grads = (x.reshape(-1).contiguous() for x in (grad_logprobs, grad_entropy))
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows.statistics(of, rows.Results.empty(of.targets), rows.Loss(rows.GIVEN, *grads), out.view(-1, of.V))
    return out
