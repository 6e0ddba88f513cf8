"""The switch of a handle, which copies of a model share; references to modules that hold it; and their own forward."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import torch
from torch import nn


class Switch:
    """Say whether a handle is open, and whether a pass has reached it. Copies of a model have the same switch:
    `remove()` turns all of them off."""

    def __init__(self) -> None:
        self.on, self.reached = True, False

    def __deepcopy__(self, memo: dict) -> Switch:
        return self


def traces_or_transforms() -> bool:
    """Return whether torch traces or compiles this call, or a transform of torch.func runs it: each wants a module's
    own operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def compiles_backward() -> bool:
    """Return whether torch is to compile backward passes, in which no node may run twice."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo is not None and dynamo.config.compiled_autograd


def alive(reference: weakref.ref, name: str) -> Any:
    """Return what a weak reference is to. RuntimeError if it is gone."""
    found = reference()
    if found is None:
        raise RuntimeError(f"{name} of this forward was freed; call the model, not a forward that was taken from it")
    return found


class OwnForward:
    """Run the forward of a module's class. A saved or copied model has it where a forward of a handle was.

    Its reference to the module, which holds it, is weak: a circle would keep the weights until the garbage collector
    runs."""

    def __init__(self, module: nn.Module):
        self._reference = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module. RuntimeError if it is gone."""
        return alive(self._reference, "the module")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> OwnForward:
        return OwnForward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple:
        return OwnForward, (self.module,)

    def belongs_to(self, module: nn.Module) -> bool:
        """Return whether this is the forward of `module`, not of one that it is a shallow copy of."""
        return self._reference() is module


def is_own(module: nn.Module, forward: Any) -> bool:
    """Return whether a forward on the instance is the module's own: an OwnForward, or one whose handle is off."""
    if isinstance(forward, OwnForward):
        return forward.belongs_to(module)
    switch = getattr(forward, "switch", None)
    return isinstance(switch, Switch) and not switch.on
