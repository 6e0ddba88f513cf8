"""A model reduced to its first layers, in float32, for checks whose faults half precision would hide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rlhf_fast.model.model import Model

IMPLEMENTATION = "_attn_implementation_internal"
"""Field of transformers' configs. Its setter would also change the configs of the parts, which are set one by one."""
SMALL = 4
"""Layers of which a trial leaves none out."""


@contextmanager
def first_layers(model: Model, few: bool) -> Iterator[None]:
    """With `few`, leave out all but the first layers within the block: as many as show each kind of layer."""
    config = model.text_config
    count = getattr(config, "num_hidden_layers", None)
    stacks = [
        (parent, name, stack)
        for parent in model.decoder.modules()
        for name, stack in parent.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) == count
    ]
    if not few or not count or count <= SMALL or len(stacks) != 1:
        yield
        return
    parent, name, stack = stacks[0]
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kinds = [_kind(layer, [str(value[i]) for value in lists.values()]) for i, layer in enumerate(stack)]
    keep = max(kinds.index(kind) for kind in kinds) + 1
    settings = dict(vars(config))
    try:
        parent._modules[name] = nn.ModuleList(list(stack)[:keep])
        for key, value in lists.items():
            setattr(config, key, value[:keep])
        config.num_hidden_layers = keep
        yield
    finally:
        parent._modules[name] = stack
        vars(config).clear()
        vars(config).update(settings)


@contextmanager
def float32(model: Model) -> Iterator[None]:
    """Give the module float32 copies of its weights within the block, and an attention that takes them:
    FlashAttention does not."""
    tensors = [x for x in (*model.module.parameters(), *model.module.buffers()) if x.is_floating_point()]
    kept = [(x, x.data) for x in tensors if x.dtype != torch.float32]
    configs = {id(x.config): x.config for x in model.module.modules() if hasattr(x, "config")}.values()
    half_only = [
        config for config in configs if kept and getattr(config, IMPLEMENTATION, None) not in (None, "eager", "sdpa")
    ]
    implementations = [getattr(config, IMPLEMENTATION) for config in half_only]
    try:
        for x, data in kept:
            x.data = data.float()
        for config in half_only:
            setattr(config, IMPLEMENTATION, "sdpa" if getattr(model.base, "_supports_sdpa", True) else "eager")
        yield
    finally:
        for config, implementation in zip(half_only, implementations, strict=True):
            setattr(config, IMPLEMENTATION, implementation)
        for x, data in kept:
            x.data = data


def _kind(layer: nn.Module, settings: list[str]) -> tuple:
    return (type(layer), *settings, *((name, tuple(p.shape)) for name, p in layer.named_parameters()))


def is_memory_error(error: BaseException) -> bool:
    """Return whether memory ran out, of the CPU or a GPU."""
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))
