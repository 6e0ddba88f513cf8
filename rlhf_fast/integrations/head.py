"""A language model's linear head for the ops, with the scales and the soft cap that its logits get."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_fast import ops
from rlhf_fast.errors import UserError

IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LinearHead:
    """Hold z = scale x, or z = scale tanh(inner x) with a soft cap, of the raw logits x = hidden . weight' + bias.

    The ops' form z = c tanh(x / c) / T is the same with c = 1 / inner and T = 1 / (inner scale), so that any chain of
    scales around one tanh is a softcap and a temperature.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    inner: float = 1.0
    capped: bool = False

    @classmethod
    def of(cls, model: Any) -> LinearHead:
        """Return the head of a model, which may be wrapped by peft, DDP, accelerate or torch.compile."""
        layer = output_layer(model)
        return cls(layer.weight, layer.bias)

    def scaled(self, by: float) -> LinearHead:
        """Return the head whose logits are `by` times these."""
        return replace(self, scale=self.scale * by)

    def tanh(self) -> LinearHead | None:
        """Return the head whose logits are tanh of these; None if they are capped already."""
        return None if self.capped else replace(self, scale=1.0, inner=self.scale, capped=True)

    def soft_capped(self, softcap: float) -> LinearHead | None:
        """Return the head whose logits are softcap tanh(z / softcap) of these; None if they are capped already."""
        capped = self.scaled(1 / softcap).tanh()
        return None if capped is None else capped.scaled(softcap)

    def detach(self) -> LinearHead:
        """Return the head without gradients of its weight and bias."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def to(self, dtype: torch.dtype) -> LinearHead:
        """Return the head with weight and bias in a dtype, through which gradients flow."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    @property
    def softcap(self) -> float:
        """The ops' softcap, 0 for none."""
        return 1 / abs(self.inner) if self.capped else 0.0

    @property
    def temperature(self) -> float:
        """The ops' temperature."""
        return 1 / (self.inner * self.scale) if self.inner * self.scale else math.inf

    @property
    def fits_ops(self) -> bool:
        """Say whether the ops take this head: their temperature is positive and finite."""
        return 0 < self.temperature < math.inf and self.softcap < math.inf

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits themselves (..., V)."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        head = self if dtype == self.weight.dtype else self.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            z = F.linear(hidden.to(dtype), head.weight, head.bias)
        if self.capped:
            z = torch.tanh(z if self.inner == 1 else z * self.inner)
        # tanh keeps its output for the gradient, which a write into that output would spoil.
        return z if self.scale == 1 and not self.capped else z * self.scale

    def mean_logit(self, hidden: Tensor) -> Tensor:
        """Return the mean of each row's logits (N,), of hidden (N, D), where no soft cap bends them."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            z = hidden.to(dtype) @ self.weight.mean(0, dtype=dtype)
        return (z if self.bias is None else z + self.bias.mean(dtype=dtype)) * self.scale

    def chosen(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (N, K) of the tokens (N, K), of hidden (N, D): a row of the weight for each."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = (hidden[:, None].to(dtype) * F.embedding(tokens, self.weight).to(dtype)).sum(-1)
        z = z if self.bias is None else z + self.bias.to(dtype)[tokens]
        z = torch.tanh(z * self.inner) if self.capped else z
        return z * self.scale

    def logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p, entropy and log_z of each row, and whether its target's logit is the largest, by the op."""
        return ops.linear_logprobs(hidden, self.weight, targets, self.bias, self.temperature, self.softcap)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor | float | None = None) -> Tensor:
        """Return -sum weights log p by the op; None stands for the mean over the targets that are not ignored."""
        given = weights, self.bias, self.softcap, self.temperature
        return ops.linear_cross_entropy(hidden, self.weight, targets, *given)[0]


def multiplied_in(hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Return both in autocast's dtype, if it is on, as a linear layer multiplies them; float64 stays."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head.to(dtype)


def find_model(model: Any) -> Any:
    """Return the model of transformers, or of peft around it, within DDP, accelerate or torch.compile."""
    name = type(model).__name__
    if isinstance(model, type):
        raise UserError(f"{model.__name__} is a class: pass a model, as its from_pretrained gives it")
    while not hasattr(model, "get_output_embeddings"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise UserError(
                f"{name}: has no get_output_embeddings; pass a model of transformers (of a trainer, trainer.model; of"
                " TRL's with a value head, its pretrained_model)"
            )
        model = inner
    return model


def find_output_layer(model: Any) -> Any:
    """Return the output layer of a model, which may be wrapped as in `find_model`."""
    return find_model(model).get_output_embeddings()


def output_layer(model: Any) -> nn.Linear:
    """Return the output layer of a model, which must be a plain linear one whose weight is there."""
    name, layer = type(model).__name__, find_output_layer(model)
    if layer is None:
        raise UserError(f"{name}: has no output embedding; pass a model with a language model's head")
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise UserError(
            f"{name}: has an adapter on its output layer, which the ops would pass by; leave the layer out of the"
            " adapter's target_modules and modules_to_save"
        )
    if type(layer) is not nn.Linear:
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise UserError(f"{name}: its output layer is a {kind}; the ops take a plain torch.nn.Linear")
    weight = layer.weight
    if hasattr(weight, "ds_id"):
        raise UserError(f"{name}: ZeRO-3 has split its output layer's weight, which the ops read whole; use stage 2")
    if weight.is_meta:
        raise UserError(f"{name}: its output layer is on the meta device; load the weights first")
    if weight.dtype not in DTYPES or not (is_dtensor(weight) or type(weight) in (Tensor, nn.Parameter)):
        kind = type(weight.data).__name__ if weight.dtype in DTYPES else str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name}: its output layer's weight is quantized ({kind}); the ops take floating point")
    return layer


def is_dtensor(x: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as FSDP2's parameters are outside the forward pass."""
    return hasattr(x, "full_tensor")
