"""The modules of a model, looked at in every pass: torch's own walk costs a small model as much as some layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

PLAIN = (nn.Module.train, PreTrainedModel.train)
"""Methods that set the switch and no more; transformers' does more for kernels of its hub."""


def all_modules(root: nn.Module) -> list[nn.Module]:
    """Return what root.modules() yields, in its order."""
    found: dict[nn.Module, None] = {}
    _add(root, found)
    return list(found)


def training_modes(root: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return all modules with their switches `training`."""
    return [(module, module.training) for module in all_modules(root)]


def set_training_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Set the switches of modules, parents first, around nn.Module's slow assignment. A class with a `train` of its own
    sets them itself."""
    for module, training in modes:
        if type(module).train in PLAIN:
            vars(module)["training"] = training
        elif module.training != training:
            module.train(training)


def _add(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            _add(child, found)
