"""The input embedding that has the output layer's weight: the gradients of its tokens are added to the layer's."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.integrations.head import find_model
from rlhf_fast.integrations.switch import OwnForward, Switch, alive, is_own

current_pass = torch._C._current_graph_task_id  # -1 outside of a backward pass


class LayerWeight(torch.autograd.Function):
    """Return the output layer's weight, and note in which backward pass it got a gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor, tied: TiedForward) -> Tensor:
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.tied.last_pass = current_pass()
        return grad, None


class Embed(torch.autograd.Function):
    """Return the tokens' rows of a weight. Where the layer gave it a gradient in the same backward pass, theirs waits
    for the sum; else it is a dense one."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, padding: int, tied: TiedForward) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.padding, ctx.tied = len(weight), padding, tied
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        if torch.is_grad_enabled() or ctx.tied.last_pass != current_pass():
            dense = torch.ops.aten.embedding_dense_backward(grad, tokens, ctx.rows, ctx.padding, False)
            return dense, None, None, None
        tokens, grad = tokens.flatten(), grad.reshape(-1, grad.shape[-1])
        if ctx.padding >= 0:
            kept = tokens != ctx.padding
            tokens, grad = tokens[kept], grad[kept]
        ctx.tied.waiting[current_pass()].append((tokens, grad))
        return None, None, None, None


class TiedForward:
    """The embedding's forward, without a gradient of the weight's size.

    A hook of the weight adds the tokens' gradients in place to the sum of all others, which the output layer has made
    dense. Where that layer had no part in the backward pass, the embedding's gradient is dense, as it was.
    """

    def __init__(self, embedding: nn.Embedding, switch: Switch):
        self.reference, self.weight, self.switch = weakref.ref(embedding), weakref.ref(embedding.weight), switch
        self.last_pass = -1
        self.waiting: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.hook = embedding.weight.register_hook(self._add_waiting)

    def __call__(self, input: Tensor) -> Tensor:
        embedding = alive(self.reference, "the input embedding")
        if not self._applies_to(embedding.weight):
            return nn.Embedding.forward(embedding, input)
        if current_pass() == -1:
            self.waiting.clear()  # of a pass that an error ended
        padding = -1 if embedding.padding_idx is None else embedding.padding_idx
        return Embed.apply(embedding.weight, input, padding, self)

    def layer_weight(self, weight: Tensor) -> Tensor:
        """Return the weight for the output layer's product."""
        return LayerWeight.apply(weight, self) if self._applies_to(weight) else weight

    def _applies_to(self, weight: Tensor) -> bool:
        """Return whether the tokens' gradients are to be added by rows: in 16 bits the sum would be rounded for each
        row of a token, and on a GPU a dense gradient costs little."""
        return (
            self.switch.on
            and torch.is_grad_enabled()
            and weight is self.weight()
            and weight.requires_grad
            and self._is_first_hook(weight)
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.float64)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        )

    def _is_first_hook(self, weight: Tensor) -> bool:
        """Return whether hooks of others, as one that masks rows, see the whole gradient: they come after this one."""
        for hook_id, hook in (weight._backward_hooks or {}).items():
            if hook_id == self.hook.id:
                return True
            if not isinstance(getattr(hook, "__self__", None), TiedForward):
                return False
        return False

    def _add_waiting(self, grad: Tensor) -> Tensor:
        """Return the weight's gradient with what waited for it. The hook is there until a backward pass after `remove`,
        which may be that of a graph made before."""
        if not self.switch.on:
            self.hook.remove()
        for tokens, rows in self.waiting.pop(current_pass(), ()):
            grad = grad if grad.is_contiguous() else grad.contiguous()  # the mean of a weight gives an expanded one
            grad.scatter_add_(0, tokens[:, None].expand_as(rows), rows)
        return grad

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
    is_plain = not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None)
    before = vars(embedding).get("forward")
    is_replaced = before is not None and not is_own(embedding, before)
    is_leaf = type(layer.weight) is nn.Parameter and layer.weight.requires_grad
    if is_replaced or not (is_plain and is_leaf):
        return None
    embedding.forward = forward = TiedForward(embedding, switch)
    return forward
