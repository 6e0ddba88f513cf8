"""A model's loss or logits read twice: as they are, and under lazy_head."""

import contextlib
import gc
import weakref

import torch

from rlhf_fast.integrations import lazy_head, status


def grads_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance: float, name: str = "", floor: float = 1e-9) -> None:
    """Compare by the norm of the difference, relative to theirs."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (name, ours.dtype, theirs.dtype)
    ours, theirs = ours.double(), theirs.double()
    assert (ours - theirs).norm() <= tolerance * theirs.norm() + floor, (name, ours, theirs)


def is_freed_with_its_model(make, open_handle, use, handle_is: str) -> bool:
    """Return whether `del model` frees all weights without the garbage collector, after `use(model)` under a handle
    that is removed, or open and forgotten, or open and held."""
    gc.collect()
    gc.disable()
    try:
        model = make()
        weights = [weakref.ref(p) for p in model.parameters()]
        handle = open_handle(model)
        use(model)
        if handle_is == "removed":
            handle.remove()
        elif handle_is == "forgotten":
            del handle
        del model
        return all(weight() is None for weight in weights)
    finally:
        gc.enable()


def read(model, reader, seed: int = 0):
    """Return a reader's output and the gradients of the sum of its elements, each times a random number."""
    model.zero_grad()
    out = reader(model)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    if out.requires_grad:
        (out * factors).sum().backward()
    return out.detach(), grads_of(model)


def compare(model, reader, patched=None, out_tolerance: float = 1e-5, grad_tolerance: float = 2e-5, context=None):
    """Compare a reader of a model with itself under lazy_head of `patched` (the model itself); return the status."""
    patched = model if patched is None else patched
    with context() if context else contextlib.nullcontext():
        theirs, their_grads = read(model, reader)
        with lazy_head(patched):
            ours, our_grads = read(model, reader)
    assert_close(ours, theirs, out_tolerance, "output")
    assert our_grads.keys() == their_grads.keys()
    # The gradient of a key's bias is 0 but for rounding.
    floor = 0.01 * grad_tolerance * float(sum(grad.double().norm() for grad in their_grads.values()))
    for name, grad in their_grads.items():
        assert_close(our_grads[name], grad, grad_tolerance, name, floor)
    return status(patched)
