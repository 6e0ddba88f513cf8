"""varlen_attention, forward and backward, beside torch's attention of the same sequences padded to the longest."""

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ops

RAGGED = tuple(80 + i * 7 % 51 for i in range(48))
SHAPES = {
    "heads 8 / 4 of 8, 48 x 104": ((104,) * 48, 8, 4, 8),
    "heads 8 / 4 of 8, 48 x 80..130": (RAGGED, 8, 4, 8),
    "heads 9 / 3 of 64, 6 x 200": ((200,) * 6, 9, 3, 64),
    "heads 9 / 3 of 64, 8 x 91..200": ((200, 137, 186, 91, 163, 120, 178, 125), 9, 3, 64),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_varlen_attention(compare, shape):
    lengths, H, Hkv, d = SHAPES[shape]
    longest = max(lengths)
    packed = torch.randn(sum(lengths), H + 2 * Hkv, d)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(len(lengths), longest, H + 2 * Hkv, d)
    padded[inside] = packed
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (x.requires_grad_() for x in packed.split([H, Hkv, Hkv], 1))
    qkv = [x.transpose(1, 2).requires_grad_() for x in padded.split([H, Hkv, Hkv], 2)]
    grad = torch.randn(q.shape)
    padded_grad = torch.zeros(len(lengths), longest, H, d)
    padded_grad[inside] = grad
    padded_grad = padded_grad.transpose(1, 2)

    def ours():
        out = ops.varlen_attention(q, k, v, offsets, d**-0.5)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    def sdpa():
        out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out, qkv, padded_grad)]

    def check():
        for a, b in zip(ours(), sdpa(), strict=True):
            torch.testing.assert_close(a, b.transpose(1, 2)[inside], atol=1e-4, rtol=1e-4)

    name = f"varlen_attention forward + backward, {shape}"
    target = 2.0 if d == 8 else 1.0
    compare(name, ours, {"scaled_dot_product_attention, padded": (sdpa, target)}, check=check)
