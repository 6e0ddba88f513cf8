"""Every op by its own inputs: each backend is no further from the float64 truth than plain torch is.

The oracle is the op's reference, run in float64, and autograd through it. A new op needs no line here.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]


def cases(*, gradient=False, dtypes=DTYPES, every_backend=True):
    for o in OPS.values():
        if gradient and not o.has_gradient:
            continue
        for device in DEVICES:
            backends = [b for b in o.backends if b.partition(":")[0] in (device, "reference")]
            for backend in backends if every_backend else backends[-1:]:
                for dtype in dtypes:
                    for size in o.small:
                        label = "-".join(f"{k}{v}" for k, v in size.items())
                        name = f"{o.name}-{label}-{backend}-{str(dtype)[6:]}"
                        yield pytest.param(o, size, device, dtype, backend, id=name)


def leaves(out):
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def to(args, dtype):
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args)


def detached(args, requires=False):
    def copy(t):
        new = t.detach().clone(memory_format=torch.preserve_format)
        return new.requires_grad_(requires and t.requires_grad)

    return tree_map_only(torch.Tensor, copy, args)


def assert_near(ours, plain, truth, what):
    """No element further from the truth than plain torch is at its worst, plus float32 rounding of the value itself."""
    for i, (o, p, t) in enumerate(zip(leaves(ours), leaves(plain), leaves(truth), strict=True)):
        assert o.shape == t.shape == p.shape, f"{what} {i}: shape {list(o.shape)}, the reference has {list(t.shape)}"
        assert o.dtype == p.dtype, f"{what} {i}: dtype {o.dtype}, the reference has {p.dtype}"
        if not o.is_floating_point():
            assert torch.equal(o, t), f"{what} {i} differs"
            continue
        if not o.numel():
            continue
        finite = t.isfinite()
        assert torch.equal(o.double().nan_to_num(0)[~finite], t.nan_to_num(0)[~finite]), (
            f"{what} {i}: not-finite values"
        )
        error, allowed = (o.double() - t)[finite].abs(), (p.double() - t)[finite].abs().max() if finite.any() else 0
        # Rounding of the value itself: bfloat16 keeps 8 bits, and rounds a gradient made in the forward pass twice.
        slack = 2e-6 * (1 + t[finite].abs()) if o.dtype == torch.float32 else 1e-5 + 2**-7 * t[finite].abs()
        worst = (error - slack).max().item() if finite.any() else 0
        assert worst <= allowed, f"{what} {i}: {worst:.3g} from the truth, plain torch {allowed:.3g}"


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases()))
def test_as_near_the_truth_as_torch(op, size, device, dtype, backend, poisoned):
    args = detached(op.make(device=device, dtype=dtype, **size))
    with torch.no_grad():
        truth, plain = op.reference(*prepared(op, to(args, torch.float64))), op.reference(*prepared(op, args))
        ours = op.backend(backend)(*args)
        again = op.backend(backend)(*args)
    assert_near(ours, plain, truth, "output")
    for a, b in zip(leaves(ours), leaves(again), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "two calls differ"


def prepared(op, args):
    return op.prepare(*op._bind(tuple(args), {})) if op.prepare else args


def gradients(call, args, upstream):
    """Gradients of every input that asks for one, by `upstream` for every differentiable output."""
    wrt = [a for a in leaves(args) if a.requires_grad]
    outs = [o for o in leaves(call(*args)) if o.requires_grad]
    grads = [g.to(o.dtype) for o, g in zip(outs, upstream, strict=False)]
    return torch.autograd.grad(outs, wrt, grads, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(gradient=True)))
def test_gradient(op, size, device, dtype, backend, poisoned):
    made = op.make(device=device, dtype=dtype, **size)
    shapes = [o for o in leaves(op.backend(backend)(*detached(made, True))) if o.requires_grad]
    upstream = [torch.randn(o.shape, dtype=torch.float64, device=device) for o in shapes]

    def reference(*args):
        return op.reference(*prepared(op, args))

    wide = detached(to(made, torch.float64))
    flags = [t.requires_grad for t in leaves(made)]
    for t, flag in zip(leaves(wide), flags, strict=True):
        t.requires_grad_(flag and t.is_floating_point())
    truth = gradients(reference, wide, upstream)
    plain = gradients(reference, detached(made, True), upstream)
    ours = gradients(op.backend(backend), detached(made, True), upstream)
    assert any(t.abs().max() > 0 for t in truth if t.numel()) or not all(t.numel() for t in truth), "a test of nothing"
    assert_near(ours, plain, truth, "gradient")


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32], every_backend=False)))
def test_contract(op, size, device, dtype, backend):
    args = prepared(op, detached(op.make(device=device, dtype=dtype, **size)))
    torch.library.opcheck(op.torch_op, tuple(args))


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32], every_backend=False)))
def test_compiles_whole(op, size, device, dtype, backend):
    torch._dynamo.reset()
    args = detached(op.make(device=device, dtype=dtype, **size))
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), op(*args), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32])))
def test_strided_inputs_give_the_same_bits(op, size, device, dtype, backend):
    args = detached(op.make(device=device, dtype=dtype, **size))

    def stride(t):
        if not t.dim():
            return t
        padded = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype, device=device)
        view = padded[..., 1 : 1 + 2 * t.shape[-1] : 2]
        return view.copy_(t)

    with torch.no_grad():
        plain, strided = op.backend(backend)(*args), op.backend(backend)(*tree_map_only(torch.Tensor, stride, args))
    for a, b in zip(leaves(plain), leaves(strided), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_every_op_is_public():
    hidden = {name for name in OPS if name.endswith(("_backward", "_with_gradients", "_with_statistics"))}
    assert set(OPS) - hidden == set(ops.__all__)


def test_an_unknown_backend_or_argument_is_refused():
    args = ops.gae.make(B=2, T=3, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="gae: no backend 'tpu' here; there are: reference"):
        ops.gae.backend("tpu")
    with pytest.raises(TypeError, match="gae has no argument 'lambda_'"):
        ops.gae(*args[:3], lambda_=0.9)
    with pytest.raises(TypeError, match="gae misses the argument 'mask'"):
        ops.gae(*args[:2])
