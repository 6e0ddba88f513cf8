"""Generalized advantage estimation: one scan, from the last token of each response to the first."""

import torch
from torch import Tensor

from rlhf_fast.kernels._gae import pieces, scan
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import promote_to_float64, upcast


def _fake(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None):
    out = torch.empty(rewards.shape, dtype=upcast(rewards).dtype, device=rewards.device)
    return out, torch.empty_like(out)


@op(fake=_fake)
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, T) float32 each, of rewards and values (B, T).

        delta_t = r_t + gamma V_next(t) - V_t        A_t = delta_t + gamma lam A_next(t)        R_t = A_t + V_t

    (Schulman et al. 2016, arXiv 1506.02438, eq. 16.) `mask` (B, T) bool: tokens outside it do not exist: they get 0,
    and next(t) is the next token inside it (carry-forward, as in verl and NeMo-RL). After the last token V is
    `bootstrap` (B,), the value of the state that a truncated row stopped in, or 0 for a row that ended.
    ValueError where shapes differ. No gradient: advantages are targets.
    """
    return scan(upcast(rewards), upcast(values), mask, gamma, lam, bootstrap)


@gae.normalize
def _(rewards, values, mask, gamma, lam, bootstrap):
    if rewards.dim() != 2 or not rewards.shape == values.shape == mask.shape:
        shapes = [list(x.shape) for x in (rewards, values, mask)]
        raise ValueError(f"gae: rewards, values and mask must have one shape (B, T), got {shapes}")
    if bootstrap is not None and bootstrap.shape != rewards.shape[:1]:
        raise ValueError(f"gae: bootstrap must have shape ({rewards.shape[0]},), got {list(bootstrap.shape)}")
    rewards, values, bootstrap = promote_to_float64(rewards.detach(), values.detach(), bootstrap)
    return rewards, values, mask.bool(), float(gamma), float(lam), bootstrap


def _dense(rewards, values, mask, bootstrap):
    """As a compiled kernel reads them, then its outputs."""
    if rewards.dtype == torch.float64:
        raise Unsupported("float64 has no compiled kernel")
    rewards, values, mask = rewards.float().contiguous(), values.float().contiguous(), mask.contiguous()
    bootstrap = bootstrap if bootstrap is None else bootstrap.float().contiguous()
    return rewards, values, mask, bootstrap, torch.empty_like(rewards), torch.empty_like(rewards)


@gae.compiled(devices=("cpu",))
def _(kernels, rewards, values, mask, gamma, lam, bootstrap):
    tensors = _dense(rewards, values, mask, bootstrap)
    kernels.gae(*data_ptrs(*tensors), *rewards.shape, gamma, lam, stream_or_threads(rewards))
    return tensors[-2:]


@gae.compiled(devices=("cuda",))
def _(kernels, rewards, values, mask, gamma, lam, bootstrap):
    tensors = _dense(rewards, values, mask, bootstrap)
    B, T = rewards.shape
    piece, folds = pieces(B, B * T, T, rewards)
    kernels.gae(*data_ptrs(*tensors, folds), piece, B, T, gamma, lam, stream_or_threads(rewards))
    return tensors[-2:]


@gae.inputs(
    small_sizes=[
        {"B": 1, "T": 1},
        {"B": 3, "T": 17},
        {"B": 17, "T": 33, "bootstrap": True},
        {"B": 9, "T": 5, "gaps": False},
        {"B": 2, "T": 600},
        {"B": 2, "T": 300, "gaps": False},
        {"B": 0, "T": 4},
        {"B": 4, "T": 0},
    ],
    large_sizes=[
        {"B": 64, "T": 128},
        {"B": 64, "T": 1024},
        {"B": 512, "T": 1024},
        {"B": 512, "T": 1001},
        {"B": 4, "T": 16384},
    ],
)
def _(B, T, device, dtype, gaps=True, bootstrap=False):
    rewards, values = torch.randn(2, B, T, device=device, dtype=dtype)
    lengths = torch.randint(0, T + 1, (B, 1), device=device)
    mask = torch.rand(B, T, device=device) > 0.2 if gaps else torch.arange(T, device=device) < lengths
    return rewards, values, mask, 0.99, 0.95, torch.randn(B, device=device, dtype=dtype) if bootstrap else None
