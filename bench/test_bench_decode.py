"""The ops of a decode step beside plain torch: norms, activations, rotary embedding, attention over a cache."""

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ops

ROWS = [32, 2048]  # a decode step of 32 sequences; a prefill
D, MLP = 576, 1536


def near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("N", ROWS)
def test_rms_norm(compare, N):
    x, residual, weight = 1e-3 * torch.randn(N, D), torch.randn(N, D), torch.randn(D)

    def ours():
        return ops.rms_norm(x, weight, 1e-6, residual)

    def torch_ops():
        return F.rms_norm(residual.add_(x), (D,), weight, 1e-6)

    def llama():  # as transformers' LlamaRMSNorm writes it
        h = residual.add_(x)
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    def check():
        plain = F.rms_norm(residual + x, (D,), weight, 1e-6)
        near([ours()], [plain])

    baselines = {"add_ + F.rms_norm": torch_ops, "transformers' RMSNorm": llama}
    compare(f"residual + rms_norm [{N}, {D}]", ours, baselines, check=check, bytes=16 * N * D)


@pytest.mark.parametrize("N", ROWS)
def test_layer_norm(compare, N):
    x, residual, weight, bias = 1e-3 * torch.randn(N, D), torch.randn(N, D), torch.randn(D), torch.randn(D)

    def ours():
        return ops.layer_norm(x, weight, bias, 1e-5, residual)

    def check():
        plain = F.layer_norm(residual + x, (D,), weight, bias, 1e-5)
        near([ours()], [plain])

    compare(
        f"residual + layer_norm [{N}, {D}]",
        ours,
        {"add_ + F.layer_norm": lambda: F.layer_norm(residual.add_(x), (D,), weight, bias, 1e-5)},
        check=check,
        bytes=16 * N * D,
    )


@pytest.mark.parametrize("N", ROWS)
def test_swiglu(compare, N):
    gate, up = torch.randn(2, N, MLP)
    compare(
        f"swiglu [{N}, {MLP}]",
        lambda: ops.swiglu(gate, up),
        {"F.silu(gate) * up": lambda: F.silu(gate) * up},
        check=lambda: near([ops.swiglu(gate, up)], [F.silu(gate) * up]),
        bytes=12 * N * MLP,
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("N", ROWS)
def test_gelu(compare, N, approximate):
    x = torch.randn(N, 2 * MLP)
    compare(
        f"gelu {approximate} [{N}, {2 * MLP}]",
        lambda: ops.gelu(x, approximate),
        {"F.gelu": lambda: F.gelu(x, approximate=approximate)},
        check=lambda: near([ops.gelu(x, approximate)], [F.gelu(x, approximate=approximate)]),
        bytes=8 * x.numel(),
    )


@pytest.mark.parametrize("N", ROWS)
def test_rope_store(compare, N):
    q, k, v, cos, sin, k_cache, v_cache, slot_mapping = ops.rope_store.make_inputs(
        N=N, H=9, Hkv=3, d=64, P=64, device="cpu", dtype=torch.float32
    )
    page, offset = slot_mapping // 64, slot_mapping % 64
    cos2, sin2 = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]

    def ours():
        return ops.rope_store(q, k, v, cos, sin, k_cache, v_cache, slot_mapping), k_cache, v_cache

    def rotated(x):
        a, b = x.chunk(2, -1)
        return x * cos2 + torch.cat([-b, a], -1) * sin2

    def torch_ops():
        k_cache[page, :, offset] = rotated(k)
        v_cache[page, :, offset] = v
        return rotated(q), k_cache, v_cache

    def check():
        mine = [x.clone() for x in ours()]
        near(mine, torch_ops())

    baselines = {"rotate_half + index_put": torch_ops}
    compare(f"rope_store [{N}, 9 + 3, 64]", ours, baselines, check=check, bytes=4 * N * 64 * (18 + 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("context", [128, 1024])
def test_decode_attention(compare, context, dtype):
    B, H, heads, d = 32, 9, 3, 64
    args = ops.decode_attention.make_inputs(
        lengths=(context,) * B, H=H, Hkv=heads, d=d, P=64, device="cpu", dtype=dtype, cache=dtype
    )
    q, k_cache, v_cache, table, _, rows, scale, *_ = args
    pages = table[rows.long()][:, : context // 64].long()
    # The baselines get each sequence's keys contiguous, without pages.
    k, v = (x[pages].transpose(1, 2).reshape(B, heads, context, d) for x in (k_cache, v_cache))
    grouped = q.view(B, heads, H // heads, d)

    def ours():
        return ops.decode_attention(*args)

    def sdpa():
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)

    def sdpa_grouped():  # query heads that share a key head as rows of one query
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale)

    def check():
        for baseline in (sdpa, sdpa_grouped):
            tolerance = 3e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(ours(), baseline().view(B, H, d), atol=tolerance, rtol=tolerance)

    compare(
        f"decode_attention [{B}, {H} / {heads}, {d}] context {context} {str(dtype)[6:]}",
        ours,
        {"SDPA, enable_gqa": sdpa, "SDPA, groups as rows": sdpa_grouped},
        check=check,
        bytes=2 * k.nbytes,
        flops=4 * B * H * context * d,
    )
