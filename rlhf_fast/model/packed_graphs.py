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
another that comes between runs op by op. Passes with gradient checkpointing are never captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_fast.graph_capture import Recorder, captures_on, recorder_for, report_failure
from rlhf_fast.model.architectures import read_decoder
from rlhf_fast.model.packed_decoder import Inspection, packed_hidden
from rlhf_fast.model.packing import PackedRows, pad, padding_sequences, to_device

MIN_STEP = 64
"""Buckets of tokens are multiples of this, and of an eighth of the power of two below them."""
MIN_SEQUENCES = 16
MAX_GRAPHS = 32
"""More sizes of one model run op by op."""


class Size(NamedTuple):
    """Sizes and switches of a captured pass."""

    num_tokens: int
    num_sequences: int
    has_parents: bool
    trained: tuple[int, ...]
    """Indices of the parameters that have a gradient; () without a backward pass."""
    adapter_enabled: bool
    dropout: float
    """The probability of residual dropout."""
    dropouts: tuple[bool, ...]
    """Switches of the adapters' dropouts."""


def bucket_of(rows: PackedRows) -> tuple[int, int]:
    """Return the numbers of tokens and of sequences to which `rows` are padded."""
    N, S = len(rows.tokens), len(rows.offsets) - 1
    step = max(MIN_STEP, 1 << max((N - 1).bit_length() - 4, 0))
    num_tokens = -(-N // step) * step
    S = max(S + padding_sequences(num_tokens - N), MIN_SEQUENCES)
    return num_tokens, 1 << (S - 1).bit_length()


class SharedMemory:
    """The memory of all graphs of a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._recorder: Recorder | None = None
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.passes = 0
        """Forward passes that have written to it."""
        self._holder: Callable[[], Any] | None = None

    @property
    def is_occupied(self) -> bool:
        """True while a forward pass waits for its backward pass."""
        return self._holder is not None and self._holder() is not None

    def add(self, graph: _Graph) -> Recorder:
        """Return the recorder for a new graph. It is another where all earlier graphs are gone: torch gives a pool up
        with its last graph, and cannot capture to it again."""
        if self._recorder is None or not self._graphs:
            self._recorder = recorder_for(self.device)
        self._graphs.add(graph)
        assert self._recorder is not None
        return self._recorder

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
    return _memories.setdefault(device, SharedMemory(device)) if captures_on(device) else None


class PackedGraphs:
    """The graphs of one model, by size."""

    def __init__(self) -> None:
        self.failed = False
        """True after a capture that failed: all passes run op by op."""
        self._memory: SharedMemory | None = None
        self._key: Any = None
        """The modules, and the addresses of the weights that the graphs read."""
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

    def run(self, model: Any, found: Inspection, rows: PackedRows, kept: Tensor, dropout: float = 0.0) -> Tensor | None:
        """Return the hidden states (n, D) of the tokens at index `kept` (n,), None where they are not captured. Call it
        with the adapter as model.adapter_enabled says."""
        if self.failed or not len(rows.tokens):
            return None
        memory = shared_memory(model.device)
        if memory is None or (self._memory or memory).is_occupied:
            return None
        key = (found.kinds, [x.data_ptr() for x in (*found.parameters, *found.buffers)])
        if key != self._key:
            self._clear()
            self._key, self._memory = key, memory
        trained = [i for i, p in enumerate(found.parameters) if p.requires_grad] if torch.is_grad_enabled() else []
        switches = (tuple(trained), model.adapter_enabled, dropout, found.dropouts)
        size = Size(*bucket_of(rows), rows.parents is not None, *switches)
        rows = pad(rows, size.num_tokens, size.num_sequences)
        if size not in self._seen:
            if len(self._seen) < MAX_GRAPHS:
                self._seen.add(size)
            return None
        parameters = [found.parameters[i] for i in trained]
        if size not in self._graphs:
            try:
                with torch.inference_mode(False):
                    self._graphs[size] = self._capture(model, size, rows, parameters)
            except RuntimeError as error:
                self.failed = True
                self._clear()
                _memories.pop(model.device, None)  # its recorder is in an unknown state
                report_failure(f"{model.name}: the training forward", error)
                return None
        graph, kept = self._graphs[size], to_device(kept, model.device)
        if parameters:
            return _Replay.apply(graph, rows, kept, *parameters)
        return graph.forward(rows)[kept]

    def _clear(self) -> None:
        self._seen.clear()
        self._graphs.clear()
        self._gradients.clear()

    def _capture(self, model: Any, size: Size, rows: PackedRows, trained: Sequence[Tensor]) -> _Graph:
        assert self._memory is not None
        if size.trained not in self._gradients:
            self._gradients[size.trained] = [torch.empty_like(p, requires_grad=False) for p in trained]
        layers = _Layers(model.decoder, size.dropout)
        return _Graph(self._memory, model.device, layers, rows, trained, self._gradients[size.trained])


class _Layers(nn.Module):
    """The training forward as a module, whose parameters torch.func can exchange."""

    def __init__(self, decoder: nn.Module, dropout: float):
        super().__init__()
        self.decoder, self.dropout = decoder, dropout

    def forward(self, rows: PackedRows) -> Tensor:
        return packed_hidden(read_decoder(self.decoder), rows, None, self.dropout)


class _Graph:
    """A captured forward pass of `rows`, and its backward pass if there are `trained` parameters."""

    def __init__(
        self,
        memory: SharedMemory,
        device: torch.device,
        layers: _Layers,
        rows: PackedRows,
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
        # Of a parameter that earlier passes used, autograd's node may be alive; it would wait for their stream.
        aliases = {id(p): nn.Parameter(p.detach()) for p in trained}
        exchanged = {name: aliases[id(p)] for name, p in layers.named_parameters() if id(p) in aliases}

        def run_forward() -> Tensor:
            nonlocal states
            with torch.set_grad_enabled(bool(trained)):
                states = torch.func.functional_call(layers, exchanged, (own_rows,))
            return states.detach()

        def run_backward() -> Tensor:
            assert states is not None
            found = torch.autograd.grad(states, list(aliases.values()), self.grad, allow_unused=True)
            used = [i for i, gradient in enumerate(found) if gradient is not None]
            for i in used:
                self.gradients[i] = gradients[i]
            torch._foreach_copy_([gradients[i] for i in used], [found[i] for i in used])
            return self.grad

        recorder = memory.add(self)
        self.replay_forward = recorder.capture(run_forward)
        if trained:
            assert states is not None
            self.grad = torch.zeros_like(states)
            self.replay_backward = recorder.capture(run_backward)
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
        left = iter(torch._foreach_mul(used, 1.0))  # copies, by one call
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
                "the activations of this forward pass are gone: CUDA graphs keep them for one backward pass"
                "; RLHF_FAST_CUDA_GRAPHS=0 runs the layers op by op, with retain_graph as usual"
            )
        gradients = ctx.graph.backward(ctx.kept, grad)
        ctx.occupation = ctx.number = None
        ctx.graph.memory.release()
        return None, None, None, *gradients
