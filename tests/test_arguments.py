"""Every op, every tensor, every transform: the result is right, or one sentence refuses it.

Derivatives in forward mode, functorch's transforms, and tensors whose memory is not what they are.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from test_ops import LINEAR, detached, leaves, to

from rlhf_fast import ops
from rlhf_fast.kernels import _arguments
from rlhf_fast.kernels._op import OPS

PUBLIC = [OPS[name] for name in ops.__all__]
DIFFERENTIABLE = [op for op in PUBLIC if op.has_gradient]
by_name = {"ids": lambda op: op.name}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*nested tensors")


def inputs(op, dtype=torch.float32, size=1):
    size = min(size, len(op.small_sizes) - 1)
    return op.bind(*detached(to(op.make_inputs(device="cpu", dtype=torch.float32, **op.small_sizes[size]), dtype)))


def tensors(args):
    return [(i, a) for i, a in enumerate(args) if isinstance(a, torch.Tensor)]


def replaced(args, i, x):
    return (*args[:i], x, *args[i + 1 :])


def direction_like(x):
    return torch.where(x.isnan(), 0, torch.randn_like(x))


def central_difference(op, args, i, direction):
    """Return the outputs' derivatives, by differences in float64."""
    h = 1e-6
    up, down = (leaves(op.reference(*op.normalized(*replaced(args, i, args[i] + s * direction)))) for s in (h, -h))
    return [(a.double() - b.double()) / (2 * h) for a, b in zip(up, down, strict=True)]


@pytest.mark.parametrize("op", PUBLIC, **by_name)
@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
def test_forward_mode_is_right_or_refused(op, way):
    """Also of an input without a gradient, where 0 would be silently wrong."""
    args = inputs(op, torch.float64, size=0)

    def tangents(i, direction):
        def call(x):
            return tuple(leaves(op(*replaced(args, i, x))))

        if way == "jvp":
            return torch.func.jvp(call, (args[i],), (direction,))[1]
        with forward_ad.dual_level():
            out = call(forward_ad.make_dual(args[i], direction))
            found = [forward_ad.unpack_dual(x).tangent for x in out]
            return [torch.zeros_like(x) if t is None else t for x, t in zip(out, found, strict=True)]

    for i, x in tensors(args):
        if not x.is_floating_point():
            continue
        direction = direction_like(x)
        if i not in op.gradient_inputs:
            with pytest.raises(NotImplementedError, match=f"{op.name}: there is no derivative by {op.names[i]}, in f"):
                tangents(i, direction)
            continue
        found, truth = tangents(i, direction), central_difference(op, args, i, direction)
        graded = [o for o in leaves(op(*replaced(args, i, x.clone().requires_grad_()))) if o.requires_grad]
        assert graded
        for output, (ours, exact) in zip(
            leaves(op(*replaced(args, i, x.clone().requires_grad_()))), zip(found, truth, strict=True), strict=True
        ):
            if output.requires_grad:  # statistics have no derivative
                torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_constant_within_a_dual_level_runs_the_kernel(monkeypatch):
    args = inputs(ops.gae)
    expected = ops.gae(*args)
    monkeypatch.setattr(ops.gae, "reference", None)
    with forward_ad.dual_level():
        torch.testing.assert_close(ops.gae(*args), expected)


def differentiable_outputs(op, args):
    with_grad = [a.clone().requires_grad_() if i in op.gradient_inputs and a is not None else a
                 for i, a in enumerate(args)]  # fmt: skip
    return [i for i, o in enumerate(leaves(op(*with_grad))) if o.requires_grad]


def first_derivative(op):
    """Return the first output with a gradient as a function of the first input with one, this input, a direction."""
    args = inputs(op, torch.float64, size=0)
    i = op.gradient_inputs[0]
    k = differentiable_outputs(op, args)[0]
    return lambda x: leaves(op(*replaced(args, i, x)))[k], args[i], direction_like(args[i])


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_transforms_of_gradients_are_right(op):
    """torch.func.grad, its gradient, and vmap of it, beside autograd through the reference."""
    args = inputs(op, torch.float64, size=0)
    i = op.gradient_inputs[0]
    output = differentiable_outputs(op, args)[0]
    x, direction = args[i], direction_like(args[i])

    def loss(call, x):
        return leaves(call(*replaced(args, i, x)))[output].sum()

    def plain(x):
        return loss(lambda *a: op.reference(*op.normalized(*a)), x)

    def ours(x):
        return loss(op, x)

    y = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(plain(y), y, create_graph=True)
    second = torch.zeros_like(y)
    if op.name not in LINEAR:
        second = torch.autograd.grad((truth * direction).sum(), y, allow_unused=True, materialize_grads=True)[0]
    torch.testing.assert_close(torch.func.grad(ours)(x), truth.detach(), equal_nan=True)
    found = torch.func.grad(lambda x: (torch.func.grad(ours)(x) * direction).sum())(x)
    torch.testing.assert_close(found, second, equal_nan=True, rtol=1e-6, atol=1e-9)
    try:
        mapped = torch.vmap(torch.func.grad(ours))(torch.stack([x, x]))
    except NotImplementedError as error:
        assert f"{op.name}: torch.vmap hides the values that the op checks" in str(error)
    else:
        torch.testing.assert_close(mapped, torch.stack([truth, truth]).detach(), equal_nan=True)


def test_vmap_of_a_gradient_over_offsets_is_refused():
    """The offsets themselves are hidden then, whose values say which scores are of one prompt."""
    args = [torch.stack([x, x]) for x in inputs(ops.ranking_loss)[:4]]
    mapped = torch.vmap(torch.func.grad(lambda *args: ops.ranking_loss(*args)[0]))
    with pytest.raises(NotImplementedError, match=r"^ranking_loss: torch\.vmap hides the values that the op checks"):
        mapped(*args)


@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_what_is_no_tensor_is_refused_by_name(op):
    args = inputs(op)
    parameters = list(op.signature.parameters.values())
    tried = 0
    for i, parameter in enumerate(parameters):
        if parameter.annotation not in (torch.Tensor, torch.Tensor | None):
            continue
        others = [[1.0], "x", np.ones(3), 3]
        others += [None] if parameter.annotation is torch.Tensor else []
        for other in others:
            with pytest.raises(TypeError, match=f"^{op.name}: {parameter.name} must be a torch.Tensor, got"):
                op(*replaced(args, i, other))
            tried += 1
    assert tried >= 4


def kinds_of(parameter):
    return typing.get_args(parameter.annotation) or (parameter.annotation,)


@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_what_is_no_number_is_refused_by_name(op):
    """Also text that float() would read, and a flag that any object would set."""
    args = inputs(op)
    for i, (name, parameter) in enumerate(op.signature.parameters.items()):
        kinds = kinds_of(parameter)
        if not {float, int, bool} & set(kinds):
            continue
        rule = (
            "True or False" if bool in kinds else "a number or a torch.Tensor" if torch.Tensor in kinds else "a number"
        )
        for other in ("abc", ".9", b"1", [1.0]) if type(None) in kinds else ("abc", ".9", b"1", [1.0], None):
            given = f"the text {other!r}" if isinstance(other, (str, bytes)) else type(other).__name__
            with pytest.raises(TypeError) as error:
                op(*replaced(args, i, other))
            assert str(error.value) == f"{op.name}: {name} must be {rule}, got {given}"


def test_numbers_of_numpy_are_numbers():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(ops.linear(x, weight, None, np.bool_(False)), ops.linear(x, weight))
    with_python = ops.rms_norm(x, weight[0], 1e-5, offset=1.0)
    assert torch.equal(ops.rms_norm(x, weight[0], np.float64(1e-5), offset=np.bool_(True)), with_python)


WEIGHTS_OR_OPTIONS = {"weights", "value_weights", "temperature", "top_p", "min_p", "advantage_shift", "advantage_scale"}


@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_integers_in_place_of_floats_are_refused_by_name(op):
    """But for weights, which may be 0 and 1, and for options, which take a number of either kind."""
    tried = 0
    for size, dtype in itertools.product(range(len(op.small_sizes)), (torch.int64, torch.uint8, torch.bool)):
        args = inputs(op, size=size)
        for i, x in tensors(args):
            if x.is_floating_point() and op.names[i] not in WEIGHTS_OR_OPTIONS:
                with pytest.raises(ValueError, match=f"^{op.name}.*{op.names[i]}.* must .*{str(dtype)[6:]}"):
                    op(*replaced(args, i, x.nan_to_num(0, 0, 0).clamp(0, 1).to(dtype)))
                tried += 1
    assert tried


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_refusal_can_be_read_under_torch_compile(fullgraph):
    x, mask = torch.randn(2, 5), torch.ones(2, 5, dtype=torch.bool)
    targets = torch.zeros(2, dtype=torch.int64)
    cases = {
        "gae: rewards, values and mask must have one shape (B, T), got [[2, 3], [2, 5], [2, 5]]": (
            lambda x: ops.gae(x[:, :3], x, mask)[0]
        ),
        "gae: mask must be bool or integers, got float32": lambda x: ops.gae(x, x, mask.float())[0],
        "gae: gamma must be a number or a torch.Tensor, got the text '.9'": (
            lambda x: ops.gae(x, x, mask, gamma=".9")[0]
        ),
        "gae: values must be floating point, got int64": lambda x: ops.gae(x, x.long(), mask)[0],
        "swiglu: gate and up must have one shape": lambda x: ops.swiglu(x, x[:, :2]),
        "token_logprobs has no argument 'temprature' (did you mean temperature?)": (
            lambda x: ops.token_logprobs(x, targets, temprature=1.0)[0]
        ),
    }
    for sentence, call in cases.items():
        torch._dynamo.reset()
        with pytest.raises(Exception) as error:  # the op's, or dynamo's around it
            torch.compile(call, fullgraph=fullgraph, backend="eager")(x)
        assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["linear_ppo_loss", "rms_norm"])
def test_a_module_in_place_of_its_weight_gets_the_way_to_it(name):
    op = OPS[name]
    args, i = inputs(op), op.names.index("weight")
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got Linear; give its \.weight$"):
        op(*replaced(args, i, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("around", [contextlib.nullcontext, forward_ad.dual_level], ids=["", "dual_level"])
@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_vmap_is_right_or_refused(op, around):
    """Also within a dual level in which nothing has a tangent."""
    args = inputs(op)
    for i, x in tensors(args):
        stacked = torch.stack([x, x])
        copies = detached(args)  # vmap does not let one require a gradient
        expected = leaves(op(*detached(args)))
        try:
            with torch.no_grad(), around():
                found = torch.vmap(lambda x, i=i, a=copies: tuple(leaves(op(*replaced(a, i, x)))))(stacked)
        except NotImplementedError as error:
            assert op.mutates and f"{op.name}: torch.vmap cannot split an op that writes its arguments" in str(error)
            continue
        assert not op.mutates
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, torch.stack([b, b]), equal_nan=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_forward_mode_around_vmap_is_right(op):
    call, x, direction = first_derivative(op)
    stacked, directions = torch.stack([x, x]), torch.stack([direction, 2 * direction])
    found = torch.func.jvp(torch.vmap(call), (stacked,), (directions,))[1]
    one = torch.func.jvp(call, (x,), (direction,))[1]
    torch.testing.assert_close(found, torch.stack([one, 2 * one]), equal_nan=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_linearize_is_right_or_refused(op):
    call, x, direction = first_derivative(op)
    try:
        found = torch.func.linearize(call, x)[1](direction)
    except NotImplementedError as error:
        assert f"{op.name}: torch.func.linearize" in str(error)
    else:
        torch.testing.assert_close(found, torch.func.jvp(call, (x,), (direction,))[1], equal_nan=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_batched_gradients_are_right(op):
    """`is_grads_batched` gives the backward pass tensors without memory."""
    args = op.bind(*op.make_inputs(device="cpu", dtype=torch.float32, **op.small_sizes[:2][-1]))
    wrt = [args[i] for i in op.gradient_inputs if args[i] is not None]
    out = next(o for o in leaves(op(*args)) if o.requires_grad)
    upstream = torch.randn(3, *out.shape)
    options = {"retain_graph": True, "allow_unused": True}
    try:
        batched = torch.autograd.grad(out, wrt, upstream, is_grads_batched=True, **options)
    except RuntimeError as error:
        assert "Batching rule not implemented" in str(error)
        return
    for k, factor in enumerate(upstream):
        for a, b in zip(batched, torch.autograd.grad(out, wrt, factor, **options), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a[k], b, equal_nan=True)


def lazily_negative(x):
    return torch._neg_view(-x)


def imaginary_part_of_a_conjugate(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def lazy_zeros(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


class Subclass(torch.Tensor):
    pass


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


SERVED = {
    "lazily negative": (lambda x: None if x.dtype == torch.bool else lazily_negative(x), None),
    "part of a conjugate": (lambda x: imaginary_part_of_a_conjugate(x) if x.dtype == torch.float32 else None, None),
    "lazy zeros": (lazy_zeros, torch.zeros_like),
    "a subclass": (lambda x: x.clone().as_subclass(Subclass), None),
    "a parameter": (lambda x: torch.nn.Parameter(x, requires_grad=False), None),
    "expanded": (lambda x: x.reshape(-1)[:1].expand(x.numel()).view(x.shape) if x.numel() else None, None),
    "an inference tensor": (made_in_inference_mode, None),
}


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_a_tensor_is_read_as_what_it_stands_for(op, kind):
    """Also where it requires a gradient, and where an op writes it in place."""
    make, stands_for = SERVED[kind]
    args = inputs(op)
    for (i, x), grad in itertools.product(tensors(args), (False, True) if op.has_gradient else (False,)):
        special = make(x)
        if special is None or (grad and kind == "an inference tensor"):
            continue
        plain = (stands_for(x) if stands_for else special.clone()).as_subclass(torch.Tensor)

        def call(given, i=i, grad=grad):
            copies = list(detached(args))
            for j in op.gradient_inputs:
                if grad and j != i and copies[j] is not None:
                    copies[j].requires_grad_()
            copies[i] = given
            out = leaves(op(*copies))
            wrt = [copies[j] for j in op.gradient_inputs if grad and j != i and copies[j] is not None]
            graded = [o for o in out if o.requires_grad]
            if wrt and graded:
                options = {"allow_unused": True, "materialize_grads": True}
                out += torch.autograd.grad(graded, wrt, [torch.ones_like(o) for o in graded], **options)
            return [o.detach().as_subclass(torch.Tensor) for o in out] + [copies[j] for j in op.mutates if j == i]

        try:
            expected = call(plain)
        except (ValueError, RuntimeError):  # zeros are out of an argument's range
            continue
        try:
            found = call(special)
        except RuntimeError as error:
            assert i in op.mutates and str(error), (op.names[i], error)
            continue
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, msg=f"{op.name}: {kind} {op.names[i]}, grad {grad}")


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def is_float32(x):
    return x.dtype == torch.float32 and x.dim() > 0


REFUSED = {
    "complex": lambda x: torch.complex(x, x) if is_float32(x) else None,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8) if is_float32(x) else None,
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr() if x.dim() == 2 else None,
    "mkldnn": lambda x: x.to_mkldnn() if is_float32(x) else None,
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 else None,
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 else None,
    "freed": freed,
    "functionalized": torch._to_functional_tensor,
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_a_tensor_that_cannot_be_read_is_refused(op, kind):
    """By a sentence, not by a crash or by another number, with a gradient and without."""
    args = inputs(op)
    several = len(tensors(args)) > 1
    for (i, x), grad in itertools.product(tensors(args), (False, True) if op.has_gradient else (False,)):
        special = REFUSED[kind](x)
        if special is None or (kind == "meta" and not several):
            continue
        copies = list(detached(args))
        for j in op.gradient_inputs:
            if grad and copies[j] is not None:
                copies[j].requires_grad_()
        copies[i] = special
        try:
            found = leaves(op(*copies))
        except (ValueError, TypeError, RuntimeError) as error:
            text = str(error)
        else:  # torch's dispatcher has unwrapped it
            assert kind == "functionalized", op.names[i]
            torch.testing.assert_close(found, leaves(op(*replaced(tuple(copies), i, x))), equal_nan=True)
            continue
        assert text and "INTERNAL ASSERT" not in text and "file an issue" not in text, (op.names[i], text)


def test_reasons_name_the_argument_and_the_remedy():
    x = torch.randn(3, 4)
    for made, reason in (
        (x.to_sparse(), "layout sparse_coo; pass a dense tensor, by x.to_dense()"),
        (torch.complex(x, x), "is complex; pass its real part"),
        (freed(x), "has no memory: its storage was freed"),
    ):
        with pytest.raises(ValueError, match=f"gae: rewards {'has' if 'layout' in reason else ''}.*{reason}"):
            _arguments.check_readable("gae", ops.gae.names, (made,))
    assert _arguments.why_unreadable(lazily_negative(x)) == ""


FORK = """
import os, signal, sys, torch
from rlhf_fast import ops
torch.set_num_threads(2)
logits, targets = torch.randn(512, 5000), torch.randint(5000, (512,))
hidden, weight = torch.randn(512, 64), torch.randn(5000, 64)
calls = {
    "token_logprobs": lambda: ops.token_logprobs(logits, targets)[0],
    "linear_logprobs": lambda: ops.linear_logprobs(hidden, weight, targets)[0],
    "swiglu": lambda: ops.swiglu(logits, logits),
}
expected = {name: call() for name, call in calls.items()}
if "torch" in sys.argv:
    logits.log_softmax(-1)
if not os.fork():
    signal.alarm(20)
    for name, call in calls.items():
        assert torch.allclose(call(), expected[name], atol=1e-5), name
    os._exit(0)
status = os.wait()[1]
sys.exit(f"child status {status}" if status else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.slow
@pytest.mark.parametrize("also", ["", "torch"])
def test_a_forked_child_computes(also):
    """OpenMP's threads do not survive a fork; waiting for them would never end."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", FORK, also], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "forked from one with threads" in done.stderr


@pytest.mark.parametrize("op", PUBLIC, **by_name)
def test_the_same_inputs_have_gradients_on_every_backend(op):
    """The op declares them once. All floating-point inputs require one here."""
    made = inputs(op)
    declared = {op.names[i] for i in op.gradient_inputs if made[i] is not None}
    for backend in (b for b in op.backends if op.can_run(b, "cpu")):
        args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                and i not in op.mutates else a for i, a in enumerate(detached(made))]  # fmt: skip
        out = [o for o in leaves(op.backend(backend)(*args)) if o.requires_grad]
        if not declared:
            assert not out, backend
            continue
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        found = {op.names[i] for i, a in tensors(args) if a.grad is not None}
        assert found == declared, backend
        for name in set(op.names) - declared:  # alone it makes nothing differentiable
            i = op.names.index(name)
            if isinstance(made[i], torch.Tensor) and made[i].is_floating_point():
                alone = replaced(detached(made), i, made[i].clone().requires_grad_())
                assert not any(o.requires_grad for o in leaves(op.backend(backend)(*alone))), (backend, name)
