"""Every op on its own inputs: each backend is as near the float64 truth as plain torch is.

The truth is the op's reference, run in float64, and autograd through it. A new op needs no line here.
"""

import contextlib
import copy
import inspect
import pickle
import pydoc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from summation import RandomSummationOrder
from torch.utils._pytree import tree_leaves, tree_map_only

from rlhf_fast import ops
from rlhf_fast.kernels import _op
from rlhf_fast.kernels._arguments import split_rows
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.kernels._op import OPS

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]
ORDERS = 16
SPREAD = 2


def cases(*, gradient=False, dtypes=DTYPES, every_backend=True):
    for o in OPS.values():
        if gradient and not o.has_gradient:
            continue
        for device in DEVICES:
            backends = [b for b in o.backends if o.can_run(b, device)]
            for backend in backends if every_backend else backends[-1:]:
                for dtype in dtypes:
                    for size in o.small_sizes:
                        if gradient and not o.has_gradient_at(size):
                            continue
                        label = "-".join(f"{k}{v}" for k, v in size.items())
                        name = f"{o.name}-{label}-{backend}-{str(dtype)[6:]}"
                        yield pytest.param(o, size, device, dtype, backend, id=name)


# The quick run takes one size and dtype of each op, device and backend, `pytest -m slow` one more, `-m ''` all.
OF_EACH_KERNEL = pytest.mark.exhaustive(1, by=("op", "device", "backend"))


def leaves(out):
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def to(args, dtype):
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args)


def detached(args, requires=False):
    def copy(t):
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach())
        return new.requires_grad_(requires and t.requires_grad)

    return tree_map_only(torch.Tensor, copy, args)


def assert_near(ours, plain, truth, what, *, slack_of_largest=False, spread=SPREAD):
    """Assert that no element is further from the truth than plain torch at its worst, plus rounding of the value.

    `plain()` computes in plain torch what `ours` is. Torch's order of summation may be a lucky one: where its error is
    smaller, `spread` times its worst over ORDERS random orders is allowed. `slack_of_largest` counts the rounding of
    the tensor's largest value for each element.
    """
    ours, theirs, truth = leaves(ours), leaves(plain()), leaves(truth)
    reordered = []
    for i, (o, p, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_alike(o, p, t, f"{what} {i}")
        finite = t.isfinite()
        if not o.is_floating_point() or not finite.any():
            continue

        def error(x, t=t, finite=finite):
            return (x.double() - t)[finite].abs()

        # Rounding of the value: bfloat16 keeps 8 bits, and rounds a gradient made in the forward pass twice.
        size = t[finite].abs()
        if o.dtype == torch.float32:
            slack = 2e-6 * (1 + (size.max() if slack_of_largest else size))
        else:
            slack = 1e-5 + 2**-7 * size
        worst, allowed = (error(o) - slack).max(), error(p).max()
        if worst > allowed:
            reordered = reordered or [leaves(shuffled(plain)) for _ in range(ORDERS)]
            allowed = spread * max(error(x[i]).max() for x in reordered)
        assert worst <= allowed, f"{what} {i}: {worst:.3g} from the truth, plain torch {allowed:.3g}"


def shuffled(plain):
    with RandomSummationOrder():
        return plain()


def assert_alike(ours, plain, truth, what):
    """Assert that shapes, dtypes, integers, and infinities and NaNs agree."""
    assert ours.shape == truth.shape == plain.shape, (
        f"{what}: shape {list(ours.shape)}, the reference has {list(truth.shape)}"
    )
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, the reference has {plain.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, truth), f"{what} differs"
        return
    infinite = ~truth.isfinite()
    assert torch.equal(ours.double().nan_to_num(0)[infinite], truth.nan_to_num(0)[infinite]), (
        f"{what}: not-finite values"
    )


def reference(op):
    """Return a call of the op's reference, with the op's checks and conversions of arguments."""
    return lambda *args: op.reference(*op.normalized(*args))


def is_linear(op):
    """Return whether no gradient depends on the inputs that have one, so that the second derivatives are 0."""
    size = next(size for size in op.small_sizes if op.has_gradient_at(size))
    args = op.make_inputs(device="cpu", dtype=torch.float32, **size)
    wrt = [a for a in leaves(args) if a.requires_grad]
    outs = [o for o in leaves(reference(op)(*args)) if o.requires_grad]
    if not wrt or not outs:
        return False
    grads = torch.autograd.grad([o.sum() for o in outs], wrt, create_graph=True, allow_unused=True)
    return not any(g is not None and g.requires_grad for g in grads)


# `linear` is so in each of its two inputs, not in both.
LINEAR = {"linear"} | {op.name for op in OPS.values() if op.has_gradient and is_linear(op)}


def results(op, call, args):
    """Return what `call` returns on a copy of the arguments, and the arguments that it wrote in place."""
    args = op.bind(*detached(args, True))
    return call(*args), [args[i] for i in op.mutates]


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases()))
@OF_EACH_KERNEL
def test_as_near_the_truth_as_torch(op, size, device, dtype, backend, poisoned):
    args = detached(op.make_inputs(device=device, dtype=dtype, **size))
    with torch.no_grad():
        truth = results(op, reference(op), to(args, torch.float64))
        ours, again = results(op, op.backend(backend), args), results(op, op.backend(backend), args)
        assert_near(ours, lambda: results(op, reference(op), args), truth, "output")
    for a, b in zip(leaves(ours), leaves(again), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "two calls differ"


def test_poisoned_memory_is_nan_and_no_function_is_refused(poisoned):
    """On a GPU the references call functions that torch's deterministic mode refuses, such as cumsum."""
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases()))
@OF_EACH_KERNEL
def test_arguments_are_written_where_the_op_says(op, size, device, dtype, backend):
    """Autograd is told: a write increments the version of a tensor."""
    args = op.bind(*detached(op.make_inputs(device=device, dtype=dtype, **size)))
    before, versions = detached(args), [a._version for a in leaves(args)]
    op.backend(backend)(*args)
    written = {id(args[i]) for i in op.mutates}
    for a, b, version in zip(leaves(args), leaves(before), versions, strict=True):
        assert (a._version > version) == (id(a) in written)
        assert id(a) in written or torch.equal(a.nan_to_num(), b.nan_to_num())


def gradients(call, args, upstream):
    """Return the gradients of all inputs that require grad, given `upstream` for each differentiable output."""
    wrt = [a for a in leaves(args) if a.requires_grad]
    assert wrt, "an op with a gradient must have `inputs` that ask for it: requires_grad=True"
    outs = [o for o in leaves(call(*args)) if o.requires_grad]
    grads = [g.to(o.dtype) for o, g in zip(outs, upstream, strict=False)]
    return torch.autograd.grad(outs, wrt, grads, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(gradient=True)))
@OF_EACH_KERNEL
def test_gradient(op, size, device, dtype, backend, poisoned):
    made = op.make_inputs(device=device, dtype=dtype, **size)
    shapes = [o for o in leaves(op.backend(backend)(*detached(made, True))) if o.requires_grad]
    upstream = [torch.randn(o.shape, dtype=torch.float64, device=device) for o in shapes]
    if op.name == "linear":  # which rounds that of a float32 output to its weight's dtype
        upstream = [u.to(dtype).double() for u in upstream]
    in_float64 = detached(to(made, torch.float64))
    for t, original in zip(leaves(in_float64), leaves(made), strict=True):
        t.requires_grad_(original.requires_grad)
    truth = gradients(reference(op), in_float64, upstream)
    ours = gradients(op.backend(backend), detached(made, True), upstream)
    assert any(t.abs().max() > 0 for t in truth if t.numel()) or not all(t.numel() for t in truth), "a test of nothing"

    def plain():
        return gradients(reference(op), detached(made, True), upstream)

    # A GPU's products read the weights' gradients rounded to the inputs' dtype. Plain torch keeps them in float32.
    rounds = op.name == "varlen_attention" and backend == "triton" and dtype != torch.float32
    # A row's KL is rounded between the two passes, where the errors of autograd's two softmaxes cancel.
    is_kl = op.name.startswith("linear_kl")
    assert_near(ours, plain, truth, "gradient", slack_of_largest=is_kl, spread=2 * SPREAD if rounds else SPREAD)


def test_accuracy_is_no_matter_of_one_draw_and_a_less_accurate_kernel_is_found():
    """Plain torch in any order of summation passes. Eight times its error does not, nor do products in TF32."""
    x, w = 1000 * torch.randn(64, 512), torch.randn(512, 16)
    order = torch.randperm(1024)
    a = torch.cat([x, x], 1)[:, order]
    b = torch.cat([w, 1e-3 * torch.randn(512, 16) - w])[order]  # terms nearly cancel, so that errors are large

    def plain():
        return a @ b

    truth = a.double() @ b.double()
    for _ in range(20):
        other = shuffled(plain)
        assert not torch.equal(other, plain()), "a test of nothing"
        assert_near(other, plain, truth, "product")
    rounded_to_tf32 = b.view(torch.int32).add(1 << 12).bitwise_and(-(1 << 13)).view(torch.float32)
    for worse in ((truth + 8 * (plain() - truth)).float(), a @ rounded_to_tf32):
        with pytest.raises(AssertionError, match="from the truth, plain torch"):
            assert_near(worse, plain, truth, "product")


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32], every_backend=False)))
@OF_EACH_KERNEL
def test_contract(op, size, device, dtype, backend):
    args = op.normalized(*detached(op.make_inputs(device=device, dtype=dtype, **size)))
    torch.library.opcheck(op.torch_op, split_rows(args, op.rows))


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32], every_backend=False)))
@OF_EACH_KERNEL
def test_compiles_whole(op, size, device, dtype, backend):
    torch._dynamo.reset()
    args = detached(op.make_inputs(device=device, dtype=dtype, **size))
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    ours, eager = results(op, compiled, args), results(op, op, args)
    torch.testing.assert_close(ours, eager, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "op, size, device, dtype, backend", list(cases(gradient=True, dtypes=[torch.float32], every_backend=False))
)
@OF_EACH_KERNEL
def test_compiles_whole_with_its_gradient(op, size, device, dtype, backend):
    torch._dynamo.reset()
    args = op.make_inputs(device=device, dtype=dtype, **size)
    upstream = [torch.randn_like(o) for o in leaves(op(*detached(args, True))) if o.requires_grad]
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, detached(args, True), upstream)
    for a, b in zip(ours, gradients(op, detached(args, True), upstream), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "op, size, device, dtype, backend", [c for c in cases(dtypes=[torch.float32]) if c.values[4] != "reference"]
)
@pytest.mark.exhaustive(1, by=("op", "device"))
def test_torchs_default_dtype_and_device_change_nothing(op, size, device, dtype, backend):
    """Results do not depend on torch.set_default_dtype or on a `with torch.device(...)` around the call."""
    args = op.make_inputs(device=device, dtype=dtype, **size)
    expected = op.backend(backend)(*detached(args, True))
    upstream = [torch.randn_like(o) for o in leaves(expected) if o.requires_grad]
    grads = gradients(op.backend(backend), detached(args, True), upstream) if upstream else ()
    for default in (default_dtype(torch.float64), default_dtype(torch.bfloat16), torch.device("meta")):
        copies = detached(args, True)
        with default:
            out = leaves(op.backend(backend)(*copies))
            if upstream:
                differentiable = [o for o in out if o.requires_grad]
                wrt = [a for a in leaves(copies) if a.requires_grad]
                options = {"allow_unused": True, "materialize_grads": True}
                out += torch.autograd.grad(differentiable, wrt, upstream, **options)
        for a, b in zip(out, [*leaves(expected), *grads], strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "op", [o for o in OPS.values() if o.has_gradient and o.name not in LINEAR], ids=lambda o: o.name
)
def test_a_second_derivative_raises(op):
    args = op.make_inputs(device="cpu", dtype=torch.float32, **op.small_sizes[0])
    wrt = [a for a in leaves(args) if a.requires_grad]
    assert wrt, "an op with a gradient must have `inputs` that ask for it: requires_grad=True"
    first = next(o for o in leaves(op(*args)) if o.requires_grad)
    grads = torch.autograd.grad(first.sum(), wrt, create_graph=True, allow_unused=True)
    loss = sum(g.square().sum() for g in grads if g is not None) + sum(w.sum() for w in wrt)
    with pytest.raises(RuntimeError, match=f"{op.name}: the gradient cannot be differentiated again"):
        loss.backward()


def test_tensors_of_two_devices_are_refused():
    rewards, values, mask, *_ = ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="gae: all tensors must be on one device, got cpu, meta, cpu"):
        ops.gae(rewards, values.to("meta"), mask)
    with pytest.raises(ValueError, match="gae: all tensors must be on one device, got cpu, meta, cpu"):
        ops.gae._run_dispatched("cpu", rewards, values.to("meta"), mask)


def test_a_cuda_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def guard(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setitem(ops.gae.implementations, "cuda", lambda *args: entered.append("launch"))
    monkeypatch.setitem(ops.gae.preference, "cuda", ["cuda", "reference"])
    args = ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32)
    ops.gae._run_kernel("cuda", *args)  # what the dispatcher calls; no machine of the tests has two GPUs
    assert entered == [args[0].device, "launch"]


def test_forcing_affects_only_the_calling_thread():
    seen = []
    args = ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32)
    with forcing("no such backend"):
        with pytest.raises(ValueError, match="no backend 'no such backend'"):
            ops.gae(*args)
        thread = threading.Thread(target=lambda: seen.append(ops.gae(*args)))
        thread.start()
        thread.join()
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["gae", "gae_packed", "ppo_advantages", "ppo_loss"])
def test_one_float64_tensor_makes_all_float64(name):
    """Whichever tensor is float64, the result is float64 and no kernel's float32."""
    op = OPS[name]
    args = detached(op.make_inputs(device="cpu", dtype=torch.float32, **op.small_sizes[:2][-1]))
    truth = op.reference(*op.normalized(*to(args, torch.float64)))
    floating = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim()]
    for i in floating:
        mixed = [a.double() if i == j else a for j, a in enumerate(args)]
        for ours, exact in zip(leaves(op(*mixed)), leaves(truth), strict=True):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op, size, device, dtype, backend", list(cases(dtypes=[torch.float32])))
@OF_EACH_KERNEL
def test_strided_inputs_give_the_same_bits(op, size, device, dtype, backend):
    args = detached(op.make_inputs(device=device, dtype=dtype, **size))

    def stride(t):
        if not t.dim():
            return t
        padded = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype, device=device)
        view = padded[..., 1 : 1 + 2 * t.shape[-1] : 2].copy_(t)
        assert detached(view).stride() == view.stride(), "a test of nothing"
        return view

    with torch.no_grad():
        plain = results(op, op.backend(backend), args)
        strided = results(op, op.backend(backend), tree_map_only(torch.Tensor, stride, args))
    # A kernel sums in one order. Torch's matrix product may choose another order for other strides.
    bound = {"rtol": 1e-5, "atol": 1e-5} if backend == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(strided, plain, equal_nan=True, **bound)


def test_every_op_is_public():
    endings = ("_backward", "_with_gradients", "_with_statistics", "_with_rounded_input")
    hidden = {name for name in OPS if name.endswith(endings)}
    assert set(OPS) - hidden == set(ops.__all__)


@pytest.mark.parametrize("name", ops.__all__)
def test_help_shows_the_arguments_and_errors(name):
    op = getattr(ops, name)
    text = pydoc.render_doc(op, renderer=pydoc.plaintext)
    assert f"\n{name}{inspect.signature(op)}\n" in text and inspect.signature(op) == op.signature
    assert "Raises ValueError" in " ".join(text.split()) and str(op) == f"<op {name}{op.signature}>"

    class Holder:
        member = op

    assert Holder().member is Holder.member is op  # it does not bind to an instance, as functions do


@pytest.mark.parametrize("name", sorted(OPS))
def test_pickle_and_copy_give_the_op_itself(name):
    """A trainer that is sent to another process, or copied, may hold an op."""
    op = OPS[name]
    assert pickle.loads(pickle.dumps(op)) is op
    assert copy.deepcopy({"loss": op})["loss"] is op


def test_a_source_tree_without_kernels_is_reported():
    """In the working directory it hides an installed package."""
    code = (
        "import sys; sys.modules['rlhf_fast._cpu'] = None\n"
        "from rlhf_fast.kernels._backends import WHY_MISSING; print(WHY_MISSING['cpu'])"
    )
    root = Path(_op.__file__).parent.parent
    if not (root / "csrc").is_dir():
        pytest.skip("not a source checkout")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert (
        output.startswith(f"the source tree {root} is imported, not an installed package")
        and "leave that folder" in output
    )


def test_an_unknown_backend_or_argument_is_refused():
    args = ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="gae: no backend 'tpu' here; there are: reference"):
        ops.gae.backend("tpu")
    with pytest.raises(TypeError, match="gae has no argument 'lambda_'"):
        ops.gae(*args[:3], lambda_=0.9)
    typo = (
        r"^gae has no argument 'gama' \(did you mean gamma\?\); it takes rewards, values, mask, gamma, lam, bootstrap$"
    )
    with pytest.raises(TypeError, match=typo):
        ops.gae(*args[:3], gama=0.9)
    with pytest.raises(TypeError, match=r"^gae has no argument 'xyz'; it takes rewards"):
        ops.gae(*args[:3], xyz=0.9)
    with pytest.raises(TypeError, match=r"^gae: mask was given twice, by its position and by its name$"):
        ops.gae(*args[:3], mask=args[2])
    with pytest.raises(TypeError, match=r"^gae misses the argument 'mask'"):
        ops.gae(*args[:2])


def test_shapes_and_numbers_out_of_bounds_are_refused():
    for name in ("linear_logprobs", "linear_cross_entropy", "linear_kl", "linear_ppo_loss"):
        op = OPS[name]
        args = detached(op.make_inputs(device="cpu", dtype=torch.float32, **op.small_sizes[:2][-1]))
        given = dict(zip(op.names, args, strict=True))
        hidden, weight = given["hidden"], given["weight"]
        with pytest.raises(ValueError, match=f"{name}: .* D and V be at least 1"):
            op(**given | {"hidden": hidden[:, :0], "weight": weight[:, :0]})
        for key, rule in ("temperature", "positive and finite"), ("softcap", "positive and finite, or 0"):
            for bad in (float("nan"), float("inf"), -1.0):
                if key in given:
                    with pytest.raises(ValueError, match=f"{name}: {key} must be {rule}.*, got {bad}"):
                        op(**given | {key: bad})
    rewards, values, mask, offsets, *_ = ops.gae_packed.make_inputs((2, 3), device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"gae_packed: bootstrap must have shape \(2,\), got \[2, 5\]"):
        ops.gae_packed(rewards, values, mask, offsets, bootstrap=torch.randn(2, 5))
