"""Dropout under our control: off everywhere, and on where the InstructGPT paper has it: on what attention and MLP add
to the residual stream. Llama-like architectures have no such dropout of their own, so all get it by the same hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn

from rlhf_fast.errors import UserError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")


def switch_off(module: nn.Module) -> None:
    """Sets every dropout probability inside to 0: layers, and the numbers that attention functions are called with."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and (isinstance(part, nn.Dropout) or "drop" in name):
                setattr(part, name, 0.0)


class ResidualDropout:
    """Hooks on the attention and MLP of every layer, placed at the first use."""

    def __init__(self):
        self.p, self._placed = 0.0, False

    @contextmanager
    def on(self, decoder: nn.Module, p: float) -> Iterator[None]:
        """Drops with probability p within the block, where the layers are in training mode."""
        if p and not self._placed:
            for branch in residual_branches(decoder):
                branch.register_forward_hook(self._drop)
            self._placed = True
        before, self.p = self.p, p
        try:
            yield
        finally:
            self.p = before

    def _drop(self, branch: nn.Module, _, output):
        if not (self.p and branch.training):
            return output
        if isinstance(output, tuple):
            return F.dropout(output[0], self.p), *output[1:]
        return F.dropout(output, self.p)


def residual_branches(decoder: nn.Module) -> list[nn.Module]:
    """The attention and MLP modules of all layers; UserError where an architecture does not show them."""
    count = decoder.config.get_text_config().num_hidden_layers
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    branches = []
    for layer in stacks[0] if stacks else ():
        found = [[getattr(layer, name) for name in names if hasattr(layer, name)] for names in (ATTENTION, MLP)]
        if all(found):
            branches += [found[0][0], found[1][0]]
    if not branches or len(branches) != 2 * count:
        raise UserError(
            f"{type(decoder).__name__}: where its attention and MLP join the residual stream is not known here; set"
            " residual_dropout=0"
        )
    return branches
