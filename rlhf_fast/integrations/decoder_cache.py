"""The parts of a decoder, read once for many passes."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from rlhf_fast.model.architectures import Decoder, read_decoder
from rlhf_fast.model.dropout import modules_that_drop
from rlhf_fast.model.packed_decoder import Inspection

NUMBERS = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
"""Types that modules compute with besides weights: numbers, and functions as an activation's."""
SWITCHES = (
    "training", "gradient_checkpointing", "_gradient_checkpointing_func", "_active_adapter", "_disable_adapters",
)  # fmt: skip
"""Attributes that are looked at in every pass, in other ways, or change no result."""


class DecoderCache:
    """Hold a decoder's `parts`, and its modules that drop something, as long as `is_valid`.

    It has no reference to the decoder itself, whose forward holds it: weights are freed with the model."""

    def __init__(self, decoder: Any, found: Inspection):
        self._parts: Decoder | None = None
        self._modules, self._parameters = found.modules[1:], found.parameters
        self._numbers = [(vars(m), name, value) for m in self._modules for name, value in _numbers(m).items()]
        self._of_decoder, config = _numbers(decoder), vars(decoder.config)
        # Lists and dictionaries can be changed in place.
        self._config = {k: copy.deepcopy(x) if isinstance(x, (list, dict)) else x for k, x in config.items()}
        of_modules = tuple((i, *item) for i, m in enumerate(self._modules) for item in _numbers(m).items())
        of_config = tuple((k, x if isinstance(x, NUMBERS) else repr(x)) for k, x in config.items())
        self.key: Hashable = of_modules, tuple(self._of_decoder.items()), of_config
        """The numbers of modules and config, on which a comparison with the decoder's own forward depends."""
        dropping = modules_that_drop(decoder)
        self._drops_itself = decoder in dropping
        self._dropping = [m for m in dropping if m is not decoder]

    def parts(self, decoder: Any) -> Decoder:
        """Return the decoder's parts. Unsupported if the architecture is not known."""
        if self._parts is None:
            self._parts = read_decoder(decoder)
        return self._parts

    def is_valid(self, decoder: Any, found: Inspection) -> bool:
        """Return whether modules and weights are the same objects, and the numbers that modules and the config have,
        such as a norm's epsilon or a probability of dropout, the same."""
        return (
            _are_same(self._modules, found.modules[1:])
            and _are_same(self._parameters, found.parameters)
            and all(attributes.get(name, self) is value for attributes, name, value in self._numbers)
            and self._of_decoder == _numbers(decoder)
            and self._config == vars(decoder.config)
        )

    def drops(self, decoder: Any) -> bool:
        """Return whether a pass drops something now, outside of adapters."""
        return (self._drops_itself and decoder.training) or any(m.training for m in self._dropping)


def _are_same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: x for name, x in vars(module).items() if isinstance(x, NUMBERS) and name not in SWITCHES}
