"""lazy_head: a causal language model whose logits are made only where somebody reads them."""

from __future__ import annotations

import copy
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import lazy_reads, lazy_scales, lazy_views
from rlhf_fast.integrations.calls import log
from rlhf_fast.integrations.handle import Handle
from rlhf_fast.integrations.head import DTYPES, LinearHead, find_output_layer, is_dtensor, multiplied_in, output_layer
from rlhf_fast.integrations.lazy_logits import LazyLogits
from rlhf_fast.integrations.lazy_rows import Rows, Source
from rlhf_fast.integrations.record import LogitsCalls
from rlhf_fast.integrations.switch import OwnForward, alive, is_own, traces_or_transforms
from rlhf_fast.integrations.tied_embedding import TiedForward, replace_embedding_forward

HANDLERS = lazy_views, lazy_scales, lazy_reads
"""The files that register what LazyLogits answer."""
FEW_ROWS = 8
RECORDS: WeakKeyDictionary[nn.Module, LogitsCalls] = WeakKeyDictionary()


class LazyForward:
    """The output layer's forward: lazy logits, or the logits themselves where none are to be saved. It has a weak
    reference to the layer, which holds it: a circle would keep the weight until the garbage collector runs."""

    def __init__(self, layer: nn.Linear, record: LogitsCalls, tied: TiedForward | None = None):
        self.reference, self.record, self.tied = weakref.ref(layer), record, tied

    @property
    def layer(self) -> nn.Linear:
        """The output layer. RuntimeError if it is gone."""
        return alive(self.reference, "the output layer")

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        if traces_or_transforms() or not self.record.switch.on:
            return nn.Linear.forward(layer, input)
        self.record.switch.reached = True
        given = self._cast(input)
        if given is None:
            self.record.direct += 1
            return nn.Linear.forward(layer, input)
        hidden, head = given
        if not torch.is_grad_enabled():
            hidden, head = hidden.detach(), head.detach()
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        return LazyLogits.of(Rows(hidden, head, Source(self.record, hidden, head)), shape, hidden.dtype)

    def _cast(self, hidden: Tensor) -> tuple[Tensor, LinearHead] | None:
        """Return hidden states and head in the dtype of the layer's product, autocast's within it; None if the logits
        are to be made: for few rows without a gradient, as in decoding, and where the ops do not take the tensors.
        Tensors of inference mode do not count their writes, so that lazy logits would not notice one."""
        layer = self.layer
        weight, bias = layer.weight, layer.bias
        if type(hidden) is not Tensor or hidden.dim() < 2 or hasattr(weight, "ds_id") or is_dtensor(weight):
            return None
        if hidden.device != weight.device:
            raise UserError(
                f"lazy_head: hidden states on {hidden.device} came to an output layer on {weight.device};"
                " nn.DataParallel copies a model to several GPUs: start with torchrun (DDP), or show one GPU by"
                " CUDA_VISIBLE_DEVICES"
            )
        if torch.is_inference_mode_enabled() or hidden.is_inference() or weight.is_inference():
            return None
        rows = hidden.numel() // max(1, hidden.shape[-1])
        if not torch.is_grad_enabled() and (hidden.shape[-2] == 1 or rows <= FEW_ROWS):
            return None
        weight = weight if self.tied is None else self.tied.layer_weight(weight)
        hidden, head = multiplied_in(hidden, LinearHead(weight, bias))
        same = hidden.dtype == head.weight.dtype and hidden.shape[-1] == head.weight.shape[1]
        return (hidden, head) if same and hidden.dtype in DTYPES else None

    def __deepcopy__(self, memo: dict) -> LazyForward:
        """A copy of the model has a layer and a record of its own, and the switch in common."""
        layer = copy.deepcopy(self.layer, memo)
        RECORDS[layer] = LogitsCalls(self.record.owner, switch=self.record.switch)
        return LazyForward(layer, RECORDS[layer])

    def __reduce__(self) -> tuple:
        """A saved model is a plain one."""
        return OwnForward, (self.layer,)


class LazyHead(Handle):
    """The handle that `lazy_head` returns."""

    call = "lazy_head(model)"

    def __init__(self, model: Any, forward: LazyForward):
        self.model, self.forward = weakref.ref(model), forward

    @property
    def is_open(self) -> bool:
        return self.forward.record.switch.on

    @property
    def status(self) -> LogitsCalls:
        """The counts so far."""
        return self.forward.record.snapshot(self.is_open)

    def remove(self) -> None:
        """Give the model its logits back, and copies of it. Lazy logits that it gave before stay good.

        What wrapped the layer's forward since then stays there."""
        record, layer = self.forward.record, self.forward.reference()
        if record.switch.on and self._layer_was_exchanged():
            log.warning(
                "lazy_head: %s has another output layer now, as after resize_token_embeddings or peft's"
                " modules_to_save, and it gave real logits; call lazy_head after such a change",
                record.owner,
            )
        elif record.switch.on and not (record.switch.reached or self.failed):
            log.warning(
                "lazy_head: no pass of %s came to this handle. torch.compile of the whole model, torch.func, a trainer"
                " that makes the model itself (model_init), and one that calls the head itself, as TRL's of 1.15 and"
                " later do (integrations.trl.fused() is for them), pass it by",
                record.owner,
            )
        record.switch.on = False
        if layer is not None and vars(layer).get("forward") is self.forward:
            del layer.forward
        if self.forward.tied is not None:
            self.forward.tied.remove()

    def _layer_was_exchanged(self) -> bool:
        """Return whether the model's output layer is another object than the one with lazy logits."""
        model, layer = self.model(), self.forward.reference()
        if model is None:
            return False
        now = find_output_layer(model)
        return now is None or hasattr(now, "modules_to_save") or all(module is not layer for module in now.modules())


def lazy_head(model: Any) -> LazyHead:
    """Let a causal language model of transformers give logits that are made only where somebody reads them.

        with lazy_head(model):
            Trainer(model, ...).train()

    Or `handle = lazy_head(model)`, and `handle.remove()`. The model may be wrapped before or after, by peft, DDP, FSDP2
    or accelerate. Its output layer's `forward` is replaced on the instance; parameters, their names and their tying
    stay. The losses and their gradients are the same; `status(model)` says which lines read logits. On a CPU, an input
    embedding of the same weight adds its gradient to the layer's, a row for each token.

    Raises UserError if the output layer is not a plain linear one, or its forward was replaced before.
    """
    layer, name = output_layer(model), type(model).__name__
    before = vars(layer).get("forward")
    if is_lazy(layer):
        raise UserError(
            f"{name}: has lazy logits already; call remove() of the first handle, or leave its `with` block, first"
        )
    if before is not None and not (isinstance(before, LazyForward) or is_own(layer, before)):  # one that is off
        raise UserError(f"{name}: something else replaced its output layer's forward (offloading, for one); undo that")
    RECORDS[layer] = record = LogitsCalls(name)
    tied = replace_embedding_forward(model, layer, record.switch)
    layer.forward = forward = LazyForward(layer, record, tied)  # type: ignore[method-assign]
    return LazyHead(model, forward)


def is_lazy(layer: Any) -> bool:
    """Return whether a layer gives lazy logits, though something wrapped its forward afterwards."""
    return layer in RECORDS and RECORDS[layer].switch.on and "forward" in vars(layer)


def status(model: Any) -> LogitsCalls:
    """Return whether a model's output layer gives lazy logits now, and what they did since the last `lazy_head`."""
    layer = find_output_layer(model)
    layer = getattr(layer, "base_layer", layer)  # of an adapter that came after lazy_head
    record = RECORDS.get(layer) or LogitsCalls(type(model).__name__)
    return record.snapshot(is_lazy(layer))
