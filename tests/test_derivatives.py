"""Derivatives that no kernel computes: a second one, and those of torch.compile'd transforms. Each is right or refused.

A silent 0 would train another model than the one that was written down.
"""

import re

import pytest
import torch
from test_arguments import DIFFERENTIABLE, by_name, inputs
from test_ops import LINEAR, leaves, reference
from torch.autograd import functional

REFUSED = "the gradient cannot be differentiated again"


def of_one_input(op, args, i):
    """Return the sum of the outputs that have a gradient as a function of argument i, which is no leaf in it."""

    def call(x):
        return sum(o.sum() for o in leaves(op(*args[:i], x * 1.0, *args[i + 1 :])) if o.requires_grad)

    return call


def grad_of_penalty(f, x, _v):
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(y), y, create_graph=True)
    return torch.autograd.grad(g.square().sum() + y.square().sum(), y)


def penalty_on_another_input(f, x, _v):
    """The input is reached through another one alone, which the gradient is not by."""
    y, factor = x.clone().requires_grad_(), torch.ones((), requires_grad=True)
    (g,) = torch.autograd.grad(f(y * factor), y, create_graph=True)
    return torch.autograd.grad(g.square().sum() + factor, factor)


def backward_of_penalty(f, x, _v):
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(y), y, create_graph=True)
    g.square().sum().backward(inputs=[y])


SECOND = {
    "functional.jvp": functional.jvp,
    "functional.hvp": functional.hvp,
    "functional.vhp": functional.vhp,
    "functional.hessian": lambda f, x, _v: functional.hessian(f, x),
    "grad of a penalty": grad_of_penalty,
    "a penalty on another input": penalty_on_another_input,
    "backward(inputs=...)": backward_of_penalty,
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_a_second_derivative_by_any_way_raises(op, way):
    """Also one that autograd takes by a few inputs alone, and so by way of only some nodes of the graph."""
    args = inputs(op, size=0)
    for i in op.gradient_inputs:
        if args[i] is not None:
            given = SECOND[way], args[i], torch.randn_like(args[i])
            if op.name in LINEAR - {"linear"}:  # which saves its inputs, for one another's gradients, and so refuses
                assert_as_plain(of_one_input(op, args, i), of_one_input(reference(op), args, i), *given)
                continue
            with pytest.raises(RuntimeError, match=f"{op.name}: {REFUSED}"):
                given[0](of_one_input(op, args, i), *given[1:])


def assert_as_plain(ours, plain, second, x, v):
    """Assert that the second derivative is plain torch's, or refused, or that torch has none."""
    try:
        truth = second(plain, x, v)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            second(ours, x, v)
        return
    try:
        found = second(ours, x, v)
    except RuntimeError as error:
        assert REFUSED in str(error)
    else:
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_a_first_derivative_that_records_a_graph_is_the_same(op):
    args = inputs(op, size=0)
    for i in op.gradient_inputs:
        if args[i] is not None:
            x = args[i].clone().requires_grad_()
            (plain,) = torch.autograd.grad(of_one_input(op, args, i)(x), x)
            (recorded,) = torch.autograd.grad(of_one_input(op, args, i)(x), x, create_graph=True)
            torch.testing.assert_close(recorded.detach(), plain, rtol=0, atol=0, equal_nan=True)


TRACED = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": torch.func.jacrev,
    "grad_and_value": lambda f: lambda x: torch.func.grad_and_value(f)(x)[0],
}


@pytest.mark.exhaustive(0, by=("op",), slow=2)
@pytest.mark.parametrize("way", TRACED)
@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_torch_compile_of_a_transform_is_right(op, way):
    """Within it no tensor says that it requires a gradient."""
    args = inputs(op, size=0)
    i = op.gradient_inputs[0]
    x = args[i].clone().requires_grad_()
    graded = [j for j, o in enumerate(leaves(op(*args[:i], x, *args[i + 1 :]))) if o.requires_grad]

    def call(x):
        out = leaves(op(*args[:i], x, *args[i + 1 :]))
        return sum(out[j].sum() for j in graded)

    (truth,) = torch.autograd.grad(call(x), x)
    torch._dynamo.reset()
    found = torch.compile(TRACED[way](call), backend="eager")(x.detach())
    torch.testing.assert_close(found, truth, equal_nan=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, **by_name)
def test_a_gradient_through_torchs_registry_is_refused(op):
    """torch.ops.rlhf_fast.<name> is what graphs and dispatch modes call: without a gradient."""
    args = op.normalized(*inputs(op, size=0))
    for i in op.gradient_inputs:
        if args[i] is None:
            continue
        x = args[i].clone().requires_grad_()

        def total(i=i, x=x):
            return next(o for o in leaves(op.torch_op(*args[:i], x, *args[i + 1 :])) if o.requires_grad).sum()

        for refused in (
            lambda total=total: total().backward(),
            lambda total=total, x=x: torch.autograd.grad(total(), x),
        ):
            with pytest.raises(NotImplementedError, match=f"{op.name}: torch.ops.rlhf_fast.{op.name} has no gradient"):
                refused()
