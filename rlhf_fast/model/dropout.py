"""Residual dropout, and no other: InstructGPT drops what attention and MLP add to the residual stream.

Llama-like architectures have no such dropout of their own, so every architecture gets it by the same forward hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from rlhf_fast.errors import UserError
from rlhf_fast.model.modules import all_modules

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout probability to 0: in Dropout layers, and in attributes that attention functions read."""
    for part in module.modules():
        for name, value in vars(part).items():
            if _is_number(value) and (isinstance(part, nn.modules.dropout._DropoutNd) or "drop" in name):
                setattr(part, name, 0.0)


def modules_that_drop(root: nn.Module) -> list[nn.Module]:
    """Return the modules that drop something in training mode, outside of adapters."""
    parts = all_modules(root)
    adapters = [part._modules["lora_dropout"] for part in parts if "lora_dropout" in part._modules]
    of_adapters = {id(p) for dropout in adapters if dropout is not None for p in all_modules(dropout)}
    return [part for part in parts if id(part) not in of_adapters and _drops(part)]


def _drops(part: nn.Module) -> bool:
    of_torch = isinstance(part, nn.modules.dropout._DropoutNd)
    return any(value for key, value in vars(part).items() if _is_number(value) and (of_torch or "drop" in key))


def _is_number(value: Any) -> bool:
    """Return whether a value can be a probability: 1 and 0 may be written as int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def config_without_dropout(module: nn.Module) -> Iterator[None]:
    """Set every dropout probability of the configs to 0 within the block, for forwards that read them there. Outside
    of it they are the model's own, because they are saved with it."""
    configs = {
        id(config): config
        for part in all_modules(module)
        if isinstance(config := vars(part).get("config"), PreTrainedConfig)
    }
    changed = [
        (config, name, value)
        for config in configs.values()
        for name, value in vars(config).items()
        if "drop" in name and _is_number(value) and value
    ]
    for config, name, _ in changed:
        vars(config)[name] = 0.0
    try:
        yield
    finally:
        for config, name, value in changed:
            vars(config)[name] = value


class ResidualDropout:
    """Dropout hooks on the attention and MLP of every layer, registered at the first use."""

    def __init__(self):
        self.p = 0.0
        self._registered = False

    @contextmanager
    def enabled(self, decoder: nn.Module, p: float) -> Iterator[None]:
        """Drop with probability p within the block."""
        if p and not self._registered:
            for branch in residual_branches(decoder):
                branch.register_forward_hook(self._drop)
            self._registered = True
        previous, self.p = self.p, p
        try:
            yield
        finally:
            self.p = previous

    def _drop(self, _, __, output):
        if not self.p:
            return output
        if isinstance(output, tuple):
            return F.dropout(output[0], self.p), *output[1:]
        return F.dropout(output, self.p)


def residual_branches(decoder: Any) -> list[nn.Module]:
    """Return the attention and MLP modules of all layers. UserError if an architecture has none under known names."""
    num_layers = decoder.config.get_text_config().num_hidden_layers
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    branches: list[nn.Module] = []
    for layer in stacks[0] if stacks else ():
        found = [
            [getattr(layer, name) for name in names if hasattr(layer, name)] for names in (ATTENTION_NAMES, MLP_NAMES)
        ]
        if all(found):
            branches += [found[0][0], found[1][0]]
    if not branches or len(branches) != 2 * num_layers:
        raise UserError(
            f"{type(decoder).__name__}: where its attention and MLP join the residual stream is not known here; set"
            " residual_dropout=0"
        )
    return branches
