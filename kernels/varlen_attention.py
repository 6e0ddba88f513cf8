"""Causal attention over packed sequences, without padding, and its gradient. Sequences may share a parent's tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported, data_ptrs, refuse_float64, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_flag, as_float, contiguous, empty_contiguous, empty_float32, upcast
from rlhf_fast.kernels._varlen_plan import check_sequences, plan_of

REFERENCE_ELEMENTS = 1 << 22  # of the keys that the reference copies at once
MIN_ITEMS = 16  # that the CPU kernel's threads share; fewer trees and key heads are split
MIN_PART = 128  # tokens


def _fake(q, *_rest):
    return empty_contiguous(q)


@op(fake=_fake)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    parents: Tensor | None = None,
    decode_order: bool = False,
) -> Tensor:
    """Return softmax(cap(scale q k)) v of N tokens of S packed sequences, (N, H, d) in q's dtype.

        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

        q (N, H, d), k, v (N, Hkv, d), of one dtype: query head h reads key head h Hkv // H; the first two dimensions
            may have any strides, as slices of one product have
        offsets (S + 1,) int64 or int32, on q's device: sequence s is tokens offsets[s] to offsets[s + 1]; it may be
            empty
        window: the number of positions that a token sees, its own included; 0 means all before it
        parents (S,) int64 or int32, on q's device: the sequence p < s, itself without a parent, whose tokens stand
            before those of s, or -1; a prompt is computed once for all of its responses
        decode_order: sum in the order of `decode_attention`: on the CPU the outputs equal to the bit those that it
            gives for the same queries over a cache of the same keys and values; elsewhere it changes nothing

    A token sees its own sequence up to itself, and its parent's tokens. Its position is its index in its sequence, plus
    the length of the parent. It is computed in float32 and rounded once. Gradients: q, k and v; those of a parent's k
    and v are sums over itself and its children, in a fixed order. All three are parts of one tensor (N, H + 2 Hkv, d).

    Raises ValueError where shapes or dtypes differ, or offsets or parents are out of range (the last two only on the
    CPU).
    """
    return _attend(q, k, v, offsets, scale, window, softcap, parents)[0]


class _Chunk(NamedTuple):
    """Consecutive tokens of a sequence, the tokens that one of them sees, and which sees which."""

    first: int
    last: int
    keys: Tensor  # (K,)
    visible: Tensor  # (last - first, K)


def _chunks(k: Tensor, offsets: Tensor, window: int, parents: Tensor | None) -> Iterator[_Chunk]:
    """Yield chunks of tokens, so small that a copy of the keys for each token is not too large."""
    check_sequences(offsets, parents, k.shape[0])
    ends = offsets.tolist()
    parent_of = [-1] * (len(ends) - 1) if parents is None else parents.tolist()
    for s, parent in enumerate(parent_of):
        begin, end = ends[s], ends[s + 1]
        prompt = range(ends[parent], ends[parent + 1]) if parent >= 0 else range(0)
        rows = max(1, REFERENCE_ELEMENTS // max(1, (len(prompt) + end - begin) * k.shape[1] * k.shape[2]))
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            keys = torch.tensor([*prompt, *range(begin, last)], dtype=torch.int64, device=k.device)
            position = len(prompt) + torch.arange(first - begin, last - begin, device=k.device)[:, None]
            key_position = torch.arange(len(keys), device=k.device)
            visible = key_position <= position
            if window:
                visible &= key_position > position - window
            yield _Chunk(first, last, keys, visible)


class _Weights(NamedTuple):
    """Softmax weights of a chunk (T, Hkv, G, K) and what their gradient needs."""

    query: Tensor  # (T, Hkv, G, d)
    keys: Tensor  # (T, Hkv, K, d): a copy for each token, 0 where it does not see the key
    values: Tensor
    capped: Tensor  # scores, (T, Hkv, G, K)
    weights: Tensor
    lse: Tensor  # (T, H)


def _weights(q: Tensor, k: Tensor, v: Tensor, chunk: _Chunk, scale: float, softcap: float) -> _Weights:
    """Return a chunk's weights. A key or value that a token does not see may be NaN: 0 stands in its place."""
    H, Hkv = q.shape[1], k.shape[1]
    query = upcast(q[chunk.first : chunk.last]).unflatten(1, (Hkv, H // Hkv))
    keys, values = (
        torch.where(chunk.visible[:, :, None, None], upcast(x[chunk.keys]), 0).transpose(1, 2) for x in (k, v)
    )
    scores = query @ keys.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    masked = scores.masked_fill(~chunk.visible[:, None, None], -torch.inf)
    return _Weights(query, keys, values, scores, masked.softmax(-1), masked.logsumexp(-1).flatten(1))


def _attend(q, k, v, offsets, scale, window, softcap, parents) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp (H, N)."""
    empty = upcast(q[:0]) + (k[:0].sum() + v[:0].sum())  # in which q, k and v are, also where there is no token
    outs, lses = [empty], [empty.sum(-1)]
    for chunk in _chunks(k, offsets, window, parents):
        w = _weights(q, k, v, chunk, scale, softcap)
        outs.append((w.weights @ w.values).flatten(1, 2))
        lses.append(w.lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses).T.contiguous()


@varlen_attention.normalize
def _(q, k, v, offsets, scale, window, softcap, parents, decode_order):
    shapes_fit = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[2] > 0
    if not shapes_fit or not k.shape[1] or q.shape[1] % k.shape[1]:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(
            "varlen_attention: q must be (N, H, d), k and v (N, Hkv, d), H a multiple of Hkv and d at least 1, got "
            f"{shapes}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        given = [str(x.dtype)[6:] for x in (q, k, v)]
        raise ValueError(f"varlen_attention: q, k and v must have one floating dtype, got {given}")
    if offsets.dim() != 1 or not offsets.shape[0] or offsets.dtype not in (torch.int32, torch.int64):
        given = f"{list(offsets.shape)} {offsets.dtype}"
        raise ValueError(f"varlen_attention: offsets must be int32 or int64 of shape (S + 1,), got {given}")
    S = offsets.shape[0] - 1
    if parents is not None and (parents.shape != (S,) or parents.dtype not in (torch.int32, torch.int64)):
        given = f"{list(parents.shape)} {parents.dtype}"
        raise ValueError(f"varlen_attention: parents must be int32 or int64 of shape ({S},), got {given}")
    if window < 0 or not 0 <= softcap < float("inf"):
        given = f"{window} and {softcap}"
        raise ValueError(f"varlen_attention: window and softcap must be 0 (off) or more, and finite, got {given}")
    offsets, parents = offsets.long(), None if parents is None else parents.long()
    return q, k, v, offsets, as_float(scale), int(window), float(softcap), parents, as_flag(decode_order)


def _fake_with_statistics(q, *_rest):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _fake(q), torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)


@varlen_attention.variant(outputs=2, fake=_fake_with_statistics)
def varlen_attention_with_statistics(q, k, v, offsets, scale, window, softcap, parents, _decode_order):
    """Return `varlen_attention`'s output and the log-sum-exp of each token's scores, (H, N) float32."""
    return _attend(q, k, v, offsets, scale, window, softcap, parents)


def _fake_backward(_grad_out, _out, _lse, q, k, *_rest):
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])


@varlen_attention.variant(outputs=1, tensors=("grad_out", "out", "lse"), fake=_fake_backward)
def varlen_attention_backward(grad_out, _out, _lse, q, k, v, offsets, scale, window, softcap, parents, _decode_order):
    """Return the gradients of q, k and v, (N, H + 2 Hkv, d) in their dtype: by heads side by side, as one product has
    made them in most layers. They are rounded once."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=upcast(x[:0]).dtype, device=x.device) for x in (q, k, v))
    for chunk in _chunks(k, offsets, window, parents):
        w = _weights(q, k, v, chunk, scale, softcap)
        grad = upcast(grad_out[chunk.first : chunk.last]).view(w.query.shape)
        d_weights = grad @ w.values.mT
        d_scores = w.weights * (d_weights - (w.weights * d_weights).sum(-1, keepdim=True))
        if softcap:
            d_scores = d_scores * (1 - (w.capped / softcap).square())
        d_scores = d_scores.masked_fill(~chunk.visible[:, None, None], 0) * scale
        dq[chunk.first : chunk.last] = (d_scores @ w.keys).flatten(1, 2)
        for total, by_token in (dk, d_scores.mT @ w.query), (dv, w.weights.mT @ grad):
            seen = torch.where(chunk.visible[:, None, :, None], by_token, 0)  # (T, Hkv, K, d)
            total.index_add_(0, chunk.keys, seen.sum(0).transpose(0, 1))
    return torch.cat([dq, dk, dv], 1).to(q.dtype)


def _forward(ctx, *args):
    q, k, v, offsets, ctx.scale, ctx.window, ctx.softcap, parents, ctx.decode_order = args
    out, lse = varlen_attention_with_statistics.run(*args)
    ctx.save_for_backward(q, k, v, offsets, parents, out, lse)
    return out


def _backward(ctx, grad_out):
    q, k, v, offsets, parents, out, lse = ctx.saved_tensors
    options = ctx.scale, ctx.window, ctx.softcap, parents, ctx.decode_order
    grads = varlen_attention_backward.run(grad_out, out, lse, q, k, v, offsets, *options)
    return *grads.split([q.shape[1], k.shape[1], k.shape[1]], 1), None, None, None, None, None, None


varlen_attention.gradient(_backward, wrt=("q", "k", "v"), forward=_forward)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _launch(kernels, tensors, offsets, scale, window, softcap, parents, *, lse, out=None, outputs=()) -> tuple:
    """Run the forward pass, or with `outputs` (grad_out, grads) the backward pass. Return the tensors whose
    addresses the kernel has: torch.compile would free one that is not read any more when it is called."""
    q = tensors[0]
    N, H, d = q.shape
    Hkv = tensors[1].shape[1]
    order, tree_starts, max_tokens = plan_of(offsets, parents, N)
    if not N:
        return ()
    offsets = offsets.contiguous()
    num_trees, threads = len(tree_starts) - 1, stream_or_threads(q)
    parts = max(1, min(-(-MIN_ITEMS // (num_trees * Hkv)), max_tokens // MIN_PART))
    lanes, rows = kernels.vector_lanes, kernels.varlen_attention_rows
    narrow, padded = _round_up(d, rows), _round_up(d, max(rows, lanes))
    block = lanes * kernels.varlen_attention_heads
    size = 2 * (max_tokens + rows) * narrow + block * (2 * narrow + kernels.varlen_attention_tile)
    if outputs:
        keys = max_tokens + 2 * rows
        size = 2 * (max_tokens + rows) * (narrow + padded) + block * (3 * narrow + 2 * padded + 3 * keys)
    scratch = empty_float32(q, threads, _round_up(size, 32))
    partial = empty_float32(q, parts, 2, Hkv, N, padded) if outputs and parts > 1 else None
    strided = [number for x in tensors for number in (x.data_ptr(), *x.stride()[:2])]
    kernel, addresses = kernels.varlen_attention, data_ptrs(out)
    if outputs:
        kernel, addresses = kernels.varlen_attention_backward, data_ptrs(*outputs, partial)
    kernel(
        *addresses, *strided, q.dtype == torch.bfloat16, *data_ptrs(lse, offsets, order, tree_starts, scratch),
        scratch.shape[1], num_trees, parts, N, H, Hkv, d, scale, window, softcap, threads,
    )  # fmt: skip
    return *tensors, out, lse, *outputs, offsets, order, tree_starts, scratch, partial


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Return tensors (N, heads, d) in float32 or bfloat16, and with a contiguous last dimension."""
    refuse_float64(*tensors)
    if tensors[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"no compiled kernel for {str(tensors[0].dtype)[6:]}")
    tensors = tuple(x.detach().float() if x.dtype == torch.float16 else x.detach() for x in tensors)
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def _attend_on_cpu(kernels, q, k, v, *options, lse: Tensor | None) -> Tensor:
    *rest, decode_order = options
    tensors = _readable(q, k, v)
    if decode_order:
        tensors = [x.float() for x in tensors]
        return _attend_in_decode_order(kernels, *tensors, *rest, lse=lse).to(q.dtype)
    out = empty_contiguous(tensors[0])
    _launch(kernels, tensors, *rest, out=out, lse=lse)
    return out.to(q.dtype)


def _attend_in_decode_order(kernels, q, k, v, offsets, scale, window, softcap, parents, *, lse) -> Tensor:
    """Return the output in float32; q, k and v are float32, with a contiguous last dimension."""
    N, H, d = q.shape
    if k.stride() != v.stride() or k.stride(0) % d:  # the kernel finds both by one number of rows of d
        k, v = contiguous(k, v)
    Hkv, S, threads = k.shape[1], offsets.shape[0] - 1, stream_or_threads(q)
    check_sequences(offsets, parents, N)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    offsets, parents = offsets.contiguous(), None if parents is None else parents.contiguous()
    first_blocks = torch.empty_like(offsets)
    of_block = kernels.decode_order_vectors * (3 * d + kernels.decode_attention_split)
    of_token = H // Hkv * (kernels.decode_attention_state_floats + d)
    scratch = empty_float32(q, threads, _round_up(max(of_block, of_token), 32))
    kernels.varlen_attention_decode_order(
        *data_ptrs(out, q), *q.stride()[:2], *data_ptrs(k, v), *k.stride()[:2],
        *data_ptrs(lse, offsets, parents, first_blocks, scratch), scratch.shape[1], N, S, H, Hkv, d, scale, window,
        softcap, threads,
    )  # fmt: skip
    return out


@varlen_attention.compiled(devices=("cpu",))
def _(kernels, *args):
    return _attend_on_cpu(kernels, *args, lse=None)


@varlen_attention_with_statistics.compiled(required_symbols=("varlen_attention",), devices=("cpu",))
def _(kernels, q, *rest):
    lse = empty_float32(q, q.shape[1], q.shape[0])
    return _attend_on_cpu(kernels, q, *rest, lse=lse), lse


@varlen_attention_backward.compiled(devices=("cpu",))
def _(kernels, grad_out, _out, lse, q, k, v, *options):
    *rest, _decode_order = options
    tensors = _readable(q, k, v)
    grad_out, lse = grad_out.detach().to(tensors[0].dtype).contiguous(), lse.contiguous()
    grads = _fake_backward(grad_out, _out, lse, *tensors)
    _launch(kernels, tensors, *rest, lse=lse, outputs=(grad_out, grads))
    return grads.to(q.dtype)


@varlen_attention.cost
def _(gradient, q, k, v, offsets, _scale, window, _softcap, parents, _decode_order):
    """Count the pairs of a query and a key that it sees: two products of d, and four more with the gradients."""
    H, d = q.shape[1:]
    lengths = offsets.diff().tolist()
    parent_of = [-1] * len(lengths) if parents is None else parents.tolist()
    pairs = 0
    for n, p in zip(lengths, parent_of, strict=True):
        before = lengths[p] if p >= 0 else 0
        pairs += sum(min(before + i, window or before + i) for i in range(1, n + 1))
    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    flops = 4.0 * pairs * H * d
    return (2 * moved, 3 * flops) if gradient else (moved, flops)


SMALL = [
    {"lengths": (5,), "H": 1, "Hkv": 1, "d": 3},
    {"lengths": (4, 0, 17, 1), "H": 6, "Hkv": 2, "d": 10, "window": 7},
    {"lengths": (5, 9, 3, 18), "H": 4, "Hkv": 2, "d": 8, "parents": (-1, 0, 0, -1)},
    {"lengths": (33, 20), "H": 3, "Hkv": 1, "d": 64, "softcap": 2.0, "packed": True},
    {"lengths": (21, 4, 35), "H": 5, "Hkv": 1, "d": 20, "window": 16, "parents": (-1, 0, 0), "softcap": 5.0},
    {"lengths": (70,), "H": 2, "Hkv": 2, "d": 16, "spread": 3.0, "packed": True},
    {"lengths": (12, 17, 5), "H": 4, "Hkv": 2, "d": 10, "parents": (-1, 0, -1), "window": 20, "decode_order": True},
    {"lengths": (), "H": 2, "Hkv": 1, "d": 8},
]
LARGE = [
    {"lengths": (200, 137, 186, 91, 163, 120, 178, 125), "H": 9, "Hkv": 3, "d": 64, "packed": True},
    {"lengths": (64, *(48,) * 8), "H": 9, "Hkv": 3, "d": 64, "packed": True, "parents": (-1, *(0,) * 8)},
]


def _make(
    lengths, H, Hkv, d, device, dtype, window=0, softcap=0.0, parents=None, decode_order=False, packed=False,
    spread=1.0, grad=True,
):  # fmt: skip
    """With `packed`, q, k and v are slices of one product, as an attention layer has them."""
    N = sum(lengths)
    x = torch.randn(N, H + 2 * Hkv, d, device=device, dtype=dtype)
    x[:, :H] *= spread
    q, k, v = x.split([H, Hkv, Hkv], dim=1)
    if not packed:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    offsets = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)
    parents = None if parents is None else torch.tensor(parents, dtype=torch.int64, device=device)
    return *(t.requires_grad_(grad) for t in (q, k, v)), offsets, d**-0.5, window, softcap, parents, decode_order


varlen_attention.inputs(small_sizes=SMALL, large_sizes=LARGE)(_make)
varlen_attention_with_statistics.inputs(small_sizes=[{**s, "grad": False} for s in SMALL], large_sizes=[])(_make)


@varlen_attention_backward.inputs(small_sizes=SMALL, large_sizes=LARGE)
def _(**size):
    args = varlen_attention.normalized(*_make(**size, grad=False))
    out, lse = varlen_attention_with_statistics.reference(*args)
    return torch.randn_like(out), out, lse, *args
