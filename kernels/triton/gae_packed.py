"""gae_packed on a GPU: the split form of gae, one program per tile of a segment. _scan.py has the scan.

Only the device knows the lengths of the segments. So the launch is for as many tiles as there can be, and each program
finds its own by a search among the offsets; the tiles of a long segment run in parallel:

    programs    | tiles of segment 0 | (idle) | tiles of segment 1 | (idle) | ...

Floor: 9 bytes read and 8 written per token; all tiles of a segment but its first are read twice. A segment's result
depends on its own tokens alone.
"""

from rlhf_fast.kernels._tensors import check_offsets, contiguous
from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton.gae import Tokens, gae_by_tile


def gae_packed(rewards, values, mask, cu_seqlens, gamma, lam, bootstrap):
    launch.require_dtypes(rewards, values, bootstrap)
    N = rewards.shape[0]
    S = cu_seqlens.shape[0] - 1
    check_offsets("gae_packed", "cu_seqlens", cu_seqlens, N)
    rewards, values, mask, offsets, bootstrap = contiguous(rewards, values, mask, cu_seqlens, bootstrap)
    tile = launch.block_size(N, scan.TILE)
    num_programs = N // tile + S if N else 0
    tokens, discount = Tokens(rewards, values, mask), scan.discount_of("gae_packed", gamma, lam)
    groups = tile // scan.GROUP_SIZE
    return gae_by_tile(tokens, offsets, S, N, discount, bootstrap, groups, num_programs, needs_maps=tile < N)
