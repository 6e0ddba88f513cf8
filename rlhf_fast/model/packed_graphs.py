"""The training forward and its backward pass as CUDA graphs: the launches of all layers cost the host more time than a
GPU needs to run them.

    first call of a size    runs op by op
    second call             is captured, forward and backward, and both graphs are replayed
    later calls             fill the graph's tensors with their rows, and replay

    rows | padding, in sequences of at most 64 tokens |        N tokens, padded to a bucket, at most an eighth more;
                                                               S sequences, padded to a power of two with empty ones

The graph holds the layers. The head and the loss run op by op on the states of the tokens that they need. Gradients of
the parameters leave the graph as copies.

All graphs of a device share one memory for activations. A forward pass occupies it until its backward pass has run;
another that comes between runs op by op. Residual dropout and gradient checkpointing are never captured.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.graph_capture import Recorder, recorder_for, report_failure
from rlhf_fast.model.packing import PackedRows, pad, padding_sequences, to_device

MIN_STEP = 64
"""Buckets of tokens are multiples of this, and of an eighth of the power of two below them."""
MIN_SEQUENCES = 16
MAX_GRAPHS = 16
"""More sizes of one model run op by op."""

Forward = Callable[[PackedRows], Tensor]
"""Maps rows on the device to the hidden states (N, D) of all tokens."""


class Size(NamedTuple):
    """Sizes and switches of a captured pass."""

    num_tokens: int
    num_sequences: int
    has_parents: bool
    trained: tuple[int, ...]
    """Indices of the parameters that have a gradient; () without a backward pass."""
    adapter_enabled: bool


def bucket_of(rows: PackedRows) -> tuple[int, int]:
    """Return the numbers of tokens and of sequences to which `rows` are padded."""
    N, S = len(rows.tokens), len(rows.offsets) - 1
    step = max(MIN_STEP, 1 << max((N - 1).bit_length() - 4, 0))
    num_tokens = -(-N // step) * step
    S = max(S + padding_sequences(num_tokens - N), MIN_SEQUENCES)
    return num_tokens, 1 << (S - 1).bit_length()


class SharedMemory:
    """The memory of all graphs of a device."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.passes = 0
        """Forward passes that have written to it."""
        self._holder: Callable[[], Any] | None = None

    @property
    def is_occupied(self) -> bool:
        """True while a forward pass waits for its backward pass."""
        return self._holder is not None and self._holder() is not None

    def occupy(self) -> Occupation:
        occupation = Occupation()
        self._holder = weakref.ref(occupation)
        return occupation

    def release(self) -> None:
        self._holder = None


class Occupation:
    """Lives as long as a backward pass can come."""


_memories: dict[torch.device, SharedMemory] = {}


def shared_memory(device: torch.device) -> SharedMemory | None:
    """Return the memory of a device's graphs, None where nothing is captured."""
    if device not in _memories or os.environ.get("RLHF_FAST_CUDA_GRAPHS") == "0":
        recorder = recorder_for(device)
        if recorder is None:
            return None
        _memories[device] = SharedMemory(recorder)
    return _memories[device]


class PackedGraphs:
    """The graphs of one model, by size."""

    def __init__(self) -> None:
        self.failed = False
        """True after a capture that failed: all passes run op by op."""
        self._key: Any = None
        self._seen: set[Size] = set()
        self._graphs: dict[Size, _Graph] = {}
        self._gradients: dict[tuple[int, ...], list[Tensor]] = {}
        """Outputs of the backward graphs, by their trained parameters."""

    def __deepcopy__(self, memo: dict) -> PackedGraphs:
        """Return none: a copied model has its weights elsewhere."""
        return PackedGraphs()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(self, model: Any, decoder: Any, forward: Forward, rows: PackedRows, kept: Tensor) -> Tensor | None:
        """Return the hidden states (n, D) of the tokens at index `kept` (n,), None where they are not captured. Call it
        with the adapter as model.adapter_enabled says."""
        memory = None if self.failed or not len(rows.tokens) else shared_memory(model.device)
        if memory is None or memory.is_occupied:
            return None
        parameters = list(decoder.parameters())
        key = [x.data_ptr() for x in (*parameters, *decoder.buffers())]
        if key != self._key:
            self._key = key
            self._seen.clear()
            self._graphs.clear()
            self._gradients.clear()
        index = tuple(i for i, p in enumerate(parameters) if p.requires_grad) if torch.is_grad_enabled() else ()
        trained = [parameters[i] for i in index]
        size = Size(*bucket_of(rows), rows.parents is not None, index, model.adapter_enabled)
        rows = pad(rows, size.num_tokens, size.num_sequences)
        if size not in self._seen:
            if len(self._seen) < MAX_GRAPHS:
                self._seen.add(size)
            return None
        if size not in self._graphs:
            try:
                with torch.inference_mode(False):
                    if index not in self._gradients:
                        self._gradients[index] = [torch.empty_like(p, requires_grad=False) for p in trained]
                    self._graphs[size] = _Graph(memory, rows, forward, model.device, trained, self._gradients[index])
            except RuntimeError as error:
                report_failure(f"{model.name}: the training forward", error)
                self.failed = True
                self._graphs.clear()
                self._gradients.clear()
                return None
        graph, kept = self._graphs[size], to_device(kept, model.device)
        if trained:
            return _Replay.apply(graph, rows, kept, *trained)
        return graph.forward(rows)[kept]


class _Graph:
    """A captured forward pass of `rows`, and its backward pass if there are `trained` parameters."""

    def __init__(
        self,
        memory: SharedMemory,
        rows: PackedRows,
        forward: Forward,
        device: torch.device,
        trained: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ):
        self.memory = memory
        self.inputs = torch.cat(_read(rows)).to(device)
        parts = self.inputs.split([len(x) for x in _read(rows)])
        own_rows = rows._replace(**dict(zip(READ, parts, strict=False)))
        self.gradients: list[Tensor | None] = [None] * len(trained)
        if device.type == "cuda":  # memory that op by op passes have left cannot be freed during a capture
            torch.cuda.empty_cache()
        states: Tensor | None = None

        def run_forward() -> Tensor:
            nonlocal states
            with torch.set_grad_enabled(bool(trained)):
                states = forward(own_rows)
            return states.detach()

        def run_backward() -> Tensor:
            assert states is not None
            found = torch.autograd.grad(states, trained, self.grad, allow_unused=True)
            used = [i for i, gradient in enumerate(found) if gradient is not None]
            for i in used:
                self.gradients[i] = gradients[i]
            torch._foreach_copy_([gradients[i] for i in used], [found[i] for i in used])
            return self.grad

        self.replay_forward = memory.recorder.capture(run_forward)
        if trained:
            assert states is not None
            self.grad = torch.zeros_like(states)
            self.replay_backward = memory.recorder.capture(run_backward)
        states = None  # the graphs know the addresses of the activations; others may write there now

    def forward(self, rows: PackedRows) -> Tensor:
        """Return the states (N, D) of padded rows, which the next replay of any graph overwrites."""
        values = torch.cat(_read(rows))
        self.inputs.copy_(values.pin_memory() if self.inputs.is_cuda else values, non_blocking=True)
        self.memory.passes += 1
        return self.replay_forward()

    def backward(self, kept: Tensor, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of the trained parameters for the gradient (n, D) of the states at `kept`."""
        self.grad.zero_().index_put_((kept,), grad, accumulate=True)
        self.replay_backward()
        used = [gradient for gradient in self.gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in used]
        torch._foreach_copy_(copies, used)
        left = iter(copies)
        return [None if gradient is None else next(left) for gradient in self.gradients]


READ = ("tokens", "positions", "offsets", "parents")
"""The fields of PackedRows that a forward pass reads."""


def _read(rows: PackedRows) -> list[Tensor]:
    fields = [getattr(rows, name) for name in READ]
    return [field for field in fields if field is not None]


class _Replay(torch.autograd.Function):
    """A graph's forward pass, and its backward pass for autograd."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, rows: PackedRows, kept: Tensor, *_trained: Tensor) -> Tensor:
        ctx.graph, ctx.kept = graph, kept
        states = graph.forward(rows)[kept]
        ctx.occupation, ctx.number = graph.memory.occupy(), graph.memory.passes
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.graph.memory.passes:
            raise RuntimeError(
                "the activations of this forward pass were overwritten by a later one: they are kept for one backward"
                " pass; RLHF_FAST_CUDA_GRAPHS=0 keeps them"
            )
        gradients = ctx.graph.backward(ctx.kept, grad)
        ctx.occupation = None
        ctx.graph.memory.release()
        return None, None, None, *gradients
