"""gae_packed on a GPU: gae's split form, a program a tile of a segment; _scan.py says how.

Where the segments lie only the device knows, so the launch is for as many tiles as there can be, and a program finds
its own by a search among the offsets: the tiles of a long segment run side by side. Per token 9 bytes in and 8 out; all
tiles of a segment but its first are read twice.
"""

from rlhf_fast.kernels._tensors import check_offsets
from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton.gae import split


def gae_packed(rewards, values, mask, cu_seqlens, gamma, lam, bootstrap):
    launch.serves(rewards, values, bootstrap)
    N, S = rewards.shape[0], cu_seqlens.shape[0] - 1
    check_offsets("gae_packed", "cu_seqlens", cu_seqlens, N)
    rewards, values, mask, offsets = (x.contiguous() for x in (rewards, values, mask, cu_seqlens))
    bootstrap = bootstrap if bootstrap is None else bootstrap.contiguous()
    tokens = launch.block(N, scan.TILE)
    size = N // tokens + S if N else 0
    return split(rewards, values, mask, offsets, S, N, gamma, lam, bootstrap, tokens // 4, size, N > tokens)
