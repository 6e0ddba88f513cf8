"""token_logprobs on a GPU: one read of the logits; its gradient is another read, mostly from L2, and a write.

Floor: in bfloat16 2 bytes per logit forward; backward 2 read (and 2 from the cache) and 2 written. Loads have 16 bytes
wherever a row starts. So have stores, if the gradient's rows start as the logits' do; they do unless the logits are a
slice of wider rows. _logits.py has the kernels and the mapping of programs to rows, _softmax.py the mathematics.
"""

import torch

from rlhf_fast.kernels._head_checks import check_targets
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._logits import Logits, Loss, Statistics, compute_statistics


def rows_of(logits, targets, temperature, softcap) -> Logits:
    """Return the rows of logits (..., V), checked, as the caller has laid them out."""
    launch.require_dtypes(logits)
    V = logits.shape[-1]
    check_targets("token_logprobs", targets, V)
    x = logits.detach().reshape(-1, V)
    x = x if x.stride(1) == 1 or V == 1 else x.contiguous()
    return Logits(x, V, targets.reshape(-1).contiguous(), temperature, softcap, aligned=False)


def token_logprobs(logits, targets, temperature, softcap):
    out = Statistics.empty(targets)
    compute_statistics(rows_of(logits, targets, temperature, softcap), out._replace(sums=None))
    return out.logprobs, out.entropy


def token_logprobs_backward(grad_logprobs, grad_entropy, logits, targets, temperature, softcap):
    rows = rows_of(logits, targets, temperature, softcap)
    loss = Loss.of_grads(grad_logprobs.reshape(-1).contiguous(), grad_entropy.reshape(-1).contiguous())
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    compute_statistics(rows, Statistics.empty(rows.targets), loss, grad.view(-1, rows.V))
    return grad
