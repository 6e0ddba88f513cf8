"""A NaN reaches what depends on it, and nothing else: kernels/_op.py has the rule.

Every op, each floating-point input: dependence is measured on the reference in float64, by perturbing the input.
"""

import pytest
import torch
from test_ops import OF_EACH_KERNEL, cases, detached, gradients, leaves, reference, to

from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS

SHARED = {"weight", "bias", "ref_weight", "ref_bias"}  # by all rows; gradients of ignored rows may have theirs
COUNTS = {"clipped_low", "clipped_high", "clipped_dual", "importance_capped", "value_clipped", "correct"}
PERTURBATIONS = (0.3, -0.4, 3.0, -5.0, 40.0, -50.0, 1e200)
ELEMENTS = 4  # of each input; one in Triton's interpreter, which takes a second for some ops


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 0


def outputs_and_gradients(op, call, args):
    """Return all that the op computes: outputs, arguments written in place, and gradients, which are None where no
    input has one."""
    args = op.bind(*detached(args, True))
    out = leaves(call(*args))
    found = [x.detach() for x in out] + [args[i].detach() for i in op.mutates if args[i] is not None]
    if op.has_gradient and any(x.requires_grad for x in out):
        upstream = [torch.ones_like(x, dtype=torch.float64) for x in out if x.requires_grad]
        copies = detached(args, True)
        for copy, arg in zip(leaves(copies), leaves(args), strict=True):
            copy.requires_grad_(arg.requires_grad)
        found += gradients(call, copies, upstream)
    return found


def with_element(args, position, element, value):
    """Return args with one element of the input at `position` replaced."""
    changed = list(args)
    changed[position] = args[position].detach().clone()
    changed[position].view(-1)[element] = value
    changed[position].requires_grad_(args[position].requires_grad)
    return tuple(changed)


def single_elements(args, count=ELEMENTS):
    """Yield (position, element) of up to `count` numbers of each floating-point input; masked ones are NaN already."""
    for position, x in enumerate(args):
        if is_floating(x):
            numbers = (~x.detach().reshape(-1).isnan()).nonzero()[:, 0]
            for element in numbers[torch.randperm(len(numbers))[:count]].tolist():
                yield position, element


def nan_at(results):
    """Return where each result is NaN, or -1, which stands for it among tokens."""
    return [x.isnan() if x.is_floating_point() else x == -1 for x in results]


def comparable(op, args, found):
    """Return for each result the elements that the rule speaks of: not counts of comparisons, not whole numbers."""
    speaks = [torch.full(x.shape, x.is_floating_point(), device=x.device) for x in found]
    stats_op = OPS[op.name.removesuffix("_with_gradients").removesuffix("_with_statistics")]
    for x in speaks:
        if stats_op.stats and x.shape == (len(stats_op.stats),):
            x &= torch.tensor([name not in COUNTS for name in stats_op.stats], device=x.device)
            break
    return speaks


def is_masked(op, args, position, element):
    """Return True for a token outside an op's `mask`; the others that are not read are NaN in the inputs already."""
    mask = args[op.names.index("mask")] if "mask" in op.names else None
    return mask is not None and mask.shape == args[position].shape and not mask.reshape(-1)[element]


ALL = [c for c in cases(dtypes=[torch.float32]) if c.values[0].name in ops.__all__]


@pytest.mark.parametrize("op, size, device, dtype, backend", [c for c in ALL if c.values[4] == "reference"])
@pytest.mark.exhaustive(1, by=("op", "device"))
def test_a_nan_reaches_what_depends_on_it_and_nothing_else(op, size, device, dtype, backend):
    args = op.bind(*detached(to(op.make_inputs(device=device, dtype=dtype, **size), torch.float64), True))
    call = reference(op)
    before = outputs_and_gradients(op, call, args)
    speaks = comparable(op, args, before)
    for position, element in single_elements(args):
        depends = [torch.zeros(x.shape, dtype=torch.bool) for x in before]
        value = args[position].detach().reshape(-1)[element].item()
        for delta in PERTURBATIONS:
            try:
                after = outputs_and_gradients(op, call, with_element(args, position, element, value + delta))
            except ValueError:  # out of the argument's range
                continue
            for seen, x, y in zip(depends, before, after, strict=True):
                seen |= (x != y) & ~(x.isnan() & y.isnan())
        try:
            after = outputs_and_gradients(op, call, with_element(args, position, element, torch.nan))
        except ValueError:
            continue
        where = f"NaN in element {element} of {op.names[position]}"
        for i, (seen, x, y, rule) in enumerate(zip(depends, before, after, speaks, strict=True)):
            missing = seen & rule & ~y.isnan() & (op.names[position] != "noise")  # a NaN there bars the token
            assert not missing.any(), f"{where}: result {i} depends on it and is no NaN at {missing.nonzero().tolist()}"
            reached = ~seen & y.isnan() & ~x.isnan()
            if not is_masked(op, args, position, element):
                own_row = element // max(1, args[position][:1].numel()) if args[position].dim() else 0
                if not reached.dim() or not args[position].dim() or len(reached) != len(args[position]):
                    continue  # a sum over rows
                reached[own_row] = False
            assert not reached.any(), f"{where}: it reaches result {i} at {reached.nonzero().tolist()}"


@pytest.mark.parametrize("op, size, device, dtype, backend", [c for c in ALL if c.values[4] != "reference"])
@OF_EACH_KERNEL
def test_a_nan_reaches_the_same_on_every_backend(op, size, device, dtype, backend):
    args = op.bind(*detached(op.make_inputs(device=device, dtype=dtype, **size), True))
    for position, element in single_elements(args, 1 if backend == "triton" and device == "cpu" else ELEMENTS):
        changed = with_element(args, position, element, torch.nan)
        try:
            truth = nan_at(outputs_and_gradients(op, op.backend("reference"), to_float64(changed)))
        except ValueError:
            continue
        after = outputs_and_gradients(op, op.backend(backend), changed)
        where = f"NaN in element {element} of {op.names[position]}"
        for i, (found, wanted) in enumerate(zip(nan_at(after), truth, strict=True)):
            if op.names[position] in SHARED:
                found, wanted = found.any(), wanted.any()
            assert torch.equal(found, wanted), f"{where}: result {i}: NaN at {found}, should be at {wanted}"


def to_float64(args):
    converted = to(detached(args), torch.float64)
    for new, old in zip(leaves(converted), leaves(args), strict=True):
        new.requires_grad_(old.requires_grad)
    return converted
