"""The input embedding that has the output layer's weight: the gradients of its tokens are added to the layer's."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.integrations.head import find_model
from rlhf_fast.integrations.switch import (
    OwnForward,
    Switch,
    alive,
    compiles_backward,
    is_own,
    traces_or_transforms,
)

current_pass = torch._C._current_graph_task_id  # the number of the backward pass, one for each in the process


class SharedWeight(torch.autograd.Function):
    """Return the weight from which the embedding and the output layer read. Its gradient is the layer's, to which
    those of the tokens are added in place.

    Autograd calls this node after both of them. It needs no hook of the weight, and graphs may outlive the handle.
    Rows that wait in a pass that an error ends stay until the graph is freed."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.size, ctx.waiting = weight.shape, defaultdict(list)
        return weight.detach()  # a view could not be read after an optimizer's step

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        for tokens, rows in ctx.waiting.pop(current_pass(), ()):
            if grad is None:  # the output layer had no part in this pass
                grad = rows.new_zeros(ctx.size)
            index = tokens[:, None].expand_as(rows)
            if torch.is_grad_enabled():  # a second derivative may need it as it is
                grad = grad.scatter_add(0, index, rows)
            else:
                grad = grad.contiguous().scatter_add_(0, index, rows)  # a sum's is expanded
        return grad


class Embed(torch.autograd.Function):
    """Return the tokens' rows of a shared weight, at whose node their gradients wait for the layer's."""

    @staticmethod
    def forward(ctx, shared: Tensor, tokens: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.padding, ctx.waiting = padding, shared.grad_fn.waiting  # type: ignore[union-attr]
        ctx.shared = shared  # which later forward passes are to find until the backward pass
        return nn.functional.embedding(tokens, shared)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.shared = None
        tokens, rows = ctx.saved_tensors[0].flatten().long(), grad.reshape(-1, grad.shape[-1])
        if ctx.padding >= 0:
            kept = tokens != ctx.padding
            tokens, rows = tokens[kept], rows[kept]
        ctx.waiting[current_pass()].append((tokens, rows))
        return None, None, None


class TiedForward:
    """The embedding's forward, without a gradient of the weight's size. Forward passes whose graphs are there at the
    same time have one SharedWeight."""

    def __init__(self, embedding: nn.Embedding, switch: Switch):
        self.reference, self.switch = weakref.ref(embedding), switch
        self.latest: tuple[weakref.ref[Tensor], int] | None = None

    def __call__(self, input: Tensor) -> Tensor:
        embedding = alive(self.reference, "the input embedding")
        if not self._applies_to(embedding):
            return nn.Embedding.forward(embedding, input)
        weight = embedding.weight
        shared = self._shared(weight)
        if shared is None:
            shared = SharedWeight.apply(weight)
            self.latest = weakref.ref(shared), weight._version
        padding = -1 if embedding.padding_idx is None else embedding.padding_idx % len(weight)
        return Embed.apply(shared, input, padding)

    def layer_weight(self, weight: Tensor) -> Tensor:
        """Return the weight for the output layer's product."""
        shared = self._shared(weight)
        return weight if shared is None else shared

    def _shared(self, weight: Tensor) -> Tensor | None:
        """Return the latest shared weight if its graph is there still, and if it is this weight as it is now: an
        optimizer's step writes into it, `weight.data = ...` gives it other memory."""
        shared = self.latest and self.latest[0]()
        if not self.latest or shared is None or not weight.requires_grad:
            return None
        if shared.grad_fn.next_functions[0][0].variable is not weight:  # type: ignore[union-attr]
            return None
        return shared if weight._version == self.latest[1] and shared.is_set_to(weight) else None

    def _applies_to(self, embedding: nn.Embedding) -> bool:
        """Return whether the tokens' gradients are to be added by rows: in 16 bits the sum would be rounded for each
        row of a token, and on a GPU a dense gradient costs little."""
        weight = embedding.weight
        return (
            not traces_or_transforms()
            and not compiles_backward()
            and self.switch.on
            and torch.is_grad_enabled()
            and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None)
            and type(weight) is nn.Parameter
            and weight.requires_grad
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.float64)
        )

    def remove(self) -> None:
        """Give the embedding its own forward back; what wrapped it since then stays there."""
        embedding = self.reference()
        if embedding is not None and vars(embedding).get("forward") is self:
            del embedding.forward

    def __deepcopy__(self, memo: dict) -> OwnForward:
        """A copy of the model has a plain embedding."""
        return OwnForward(copy.deepcopy(alive(self.reference, "the input embedding"), memo))

    def __reduce__(self) -> tuple:
        """A saved model has a plain embedding."""
        return OwnForward, (alive(self.reference, "the input embedding"),)


def replace_embedding_forward(model: Any, layer: nn.Linear, switch: Switch) -> TiedForward | None:
    """Give a model's input embedding a TiedForward, and return it; None if the embedding stays as it is."""
    try:
        embedding = find_model(model).get_input_embeddings()
    except NotImplementedError:
        return None
    if getattr(embedding, "weight", None) is not layer.weight or type(embedding).forward is not nn.Embedding.forward:
        return None
    before = vars(embedding).get("forward")
    if before is not None and not is_own(embedding, before):
        return None
    embedding.forward = forward = TiedForward(embedding, switch)
    return forward
