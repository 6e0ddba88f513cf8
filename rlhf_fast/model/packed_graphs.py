"""The training forward and its backward pass as CUDA graphs: the launches of all layers cost the host more time than a
GPU needs to run them.

    first call of a size    runs op by op, padded
    second call             is captured, forward and backward, and both graphs are replayed
    later calls             fill the graph's tensors with their rows, and replay

    rows | padding, in sequences of at most 64 tokens |        N tokens, padded to a multiple of 256 and of an eighth of
                                                               the power of two below N; S sequences, padded to a power
                                                               of 4 with empty ones

The graph holds the layers. The head and the loss run op by op on the states of the tokens that they need. Gradients of
the parameters leave the graph as copies.

All graphs of a device share one pool of memory for activations. From a forward pass to its backward pass, another pass
runs op by op and not padded. So do sizes of a model beyond MAX_GRAPHS, and those for which a capture found no memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_fast.graph_capture import Recorder, captures_on, recorder_for, report_failure
from rlhf_fast.model.architectures import read_decoder
from rlhf_fast.model.garbage_collection import paused_garbage_collection
from rlhf_fast.model.packed_decoder import Inspection, packed_hidden
from rlhf_fast.model.packing import PackedRows, pad, padding_sequences, to_device

MIN_STEP = 256
MIN_SEQUENCES = 16
MAX_GRAPHS = 32


class GraphKey(NamedTuple):
    """Sizes and switches of a captured pass."""

    num_tokens: int
    num_sequences: int
    has_parents: bool
    trained: tuple[int, ...]
    """Indices of the parameters that have a gradient; () without a backward pass."""
    adapter_enabled: bool
    adapters: tuple[str, ...]
    """Inspection.adapters."""
    dropout: float
    """The probability of residual dropout."""
    dropouts: tuple[bool, ...]
    """Switches of the adapters' dropouts."""


def bucket_of(rows: PackedRows) -> tuple[int, int]:
    """Return the numbers of tokens and of sequences to which `rows` are padded."""
    N, S = len(rows.tokens), len(rows.offsets) - 1
    step = max(MIN_STEP, 1 << max((N - 1).bit_length() - 4, 0))
    num_tokens = -(-N // step) * step
    num_sequences = MIN_SEQUENCES
    while num_sequences < S + padding_sequences(num_tokens - N):
        num_sequences *= 4
    return num_tokens, num_sequences


class GraphPool:
    """The memory of all graphs of a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.num_passes = 0
        """Forward passes that have written to it."""
        self._recorder: Recorder | None = None
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._pending: Callable[[], PendingBackward | None] | None = None

    @property
    def has_pending_backward(self) -> bool:
        """True while the activations of a forward pass wait for its backward pass."""
        return self._pending is not None and self._pending() is not None

    def recorder_for(self, graph: _Graph) -> Recorder:
        """Return the recorder for a new graph. It is another where all earlier graphs are gone: torch releases a pool
        with its last graph, and cannot capture to it again."""
        if self._recorder is None or not self._graphs:
            self._recorder = recorder_for(self.device)
        self._graphs.add(graph)
        assert self._recorder is not None
        return self._recorder

    def abandon_recorder(self) -> None:
        """Capture no more to the pool of a capture that failed."""
        self._recorder = None

    def begin(self) -> PendingBackward:
        """Keep the activations of the newest forward pass as long as the result lives."""
        pending = PendingBackward()
        self._pending = weakref.ref(pending)
        return pending

    def end(self) -> None:
        """Let the next pass overwrite the activations."""
        self._pending = None


class PendingBackward:
    """Lives as long as a backward pass can come."""


_pools: dict[torch.device, GraphPool] = {}


class PackedGraphs:
    """The graphs of one model, by size."""

    def __init__(self) -> None:
        self.failed = False
        """True after a capture that failed otherwise than for lack of memory."""
        self._weights: Any = None
        """The modules' classes, and the addresses of the tensors that the graphs read."""
        self._seen: set[GraphKey] = set()
        self._too_large: set[GraphKey] = set()
        self._graphs: dict[GraphKey, _Graph] = {}
        self._gradients: dict[tuple[int, ...], list[Tensor]] = {}
        """Outputs of the backward graphs, by their trained parameters."""

    def __deepcopy__(self, memo: dict) -> PackedGraphs:
        """Return none: a copied model has its weights elsewhere."""
        return PackedGraphs()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(self, model: Any, found: Inspection, rows: PackedRows, kept: Tensor, dropout: float = 0.0) -> Tensor | None:
        """Return the hidden states (n, D) of the tokens at index `kept` (n,), None where nothing is captured. Call it
        with the adapter as model.adapter_enabled says."""
        if self.failed or not len(rows.tokens) or not captures_on(model.device):
            return None
        pool = _pools.setdefault(model.device, GraphPool(model.device))
        if pool.has_pending_backward:
            return None
        weights = (found.kinds, [x.data_ptr() for x in (*found.parameters, *found.buffers)])
        if weights != self._weights:
            self._clear()
            self._weights = weights
        trained = [i for i, p in enumerate(found.parameters) if p.requires_grad] if torch.is_grad_enabled() else []
        key = GraphKey(
            *bucket_of(rows), rows.parents is not None, tuple(trained),
            model.adapter_enabled, found.adapters, dropout, found.dropouts,
        )  # fmt: skip
        if key in self._too_large or (key not in self._seen and len(self._seen) >= MAX_GRAPHS):
            return None
        rows, kept = pad(rows, key.num_tokens, key.num_sequences), to_device(kept, model.device)
        if key not in self._seen:
            self._seen.add(key)
            return _Layers(model.decoder, dropout)(rows)[kept]
        parameters = [found.parameters[i] for i in trained]
        if key not in self._graphs:
            graph = self._capture(pool, model, key, rows, parameters)
            if graph is None:
                return None
            self._graphs[key] = graph
        graph = self._graphs[key]
        if parameters:
            return _Replay.apply(graph, rows, kept, *parameters)
        return graph.forward(rows)[kept]

    def _clear(self) -> None:
        for found in (self._seen, self._too_large, self._graphs, self._gradients):
            found.clear()

    def _capture(
        self, pool: GraphPool, model: Any, key: GraphKey, rows: PackedRows, trained: Sequence[Tensor]
    ) -> _Graph | None:
        """Return a new graph, None if that fails."""
        layers = _Layers(model.decoder, key.dropout)
        try:
            with torch.inference_mode(False), _no_garbage_collection():
                if key.trained not in self._gradients:
                    self._gradients[key.trained] = [torch.empty_like(p, requires_grad=False) for p in trained]
                return _Graph(pool, layers, rows, trained, self._gradients[key.trained])
        except RuntimeError as error:
            pool.abandon_recorder()
            if isinstance(error, torch.OutOfMemoryError):
                self._too_large.add(key)
            else:
                self.failed = True
                self._clear()
            report_failure(f"{model.name}: a training forward of {key.num_tokens} tokens", error)
            return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not within the block: a graph that is destroyed there would end the capture."""
    gc.collect()
    with paused_garbage_collection():
        yield


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
        pool: GraphPool,
        layers: _Layers,
        rows: PackedRows,
        trained: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ):
        self.pool = pool
        self.inputs = to_device(rows.flat(), pool.device)
        own_rows = rows.with_flat(self.inputs)
        self.gradients: list[Tensor | None] = [None] * len(trained)
        if pool.device.type == "cuda":  # memory that op by op passes have left cannot be freed during a capture
            torch.cuda.empty_cache()
        states: Tensor | None = None
        # Of a parameter that earlier passes used, autograd's node may be alive; it would wait for their stream.
        aliases = {id(p): nn.Parameter(p.detach()) for p in trained}
        exchanged: dict[str, Tensor] = {
            name: aliases[id(p)] for name, p in layers.named_parameters() if id(p) in aliases
        }

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

        recorder = pool.recorder_for(self)
        self.replay_forward = recorder.capture(run_forward)
        if trained:
            assert states is not None
            self.grad = torch.zeros_like(states)
            self.replay_backward = recorder.capture(run_backward)
        states = None  # the graphs know the addresses of the activations; others may write there now

    def forward(self, rows: PackedRows) -> Tensor:
        """Return the states (N, D) of padded rows, which the next replay of any graph overwrites."""
        self.inputs.copy_(to_device(rows.flat(), self.pool.device))
        self.pool.num_passes += 1
        return self.replay_forward()

    def backward(self, kept: Tensor, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of the trained parameters for the gradient (n, D) of the states at `kept`."""
        self.grad.zero_().index_put_((kept,), grad, accumulate=True)
        self.replay_backward()
        used = [gradient for gradient in self.gradients if gradient is not None]
        left = iter(torch._foreach_mul(used, 1.0))  # copies, by one call
        return [None if gradient is None else next(left) for gradient in self.gradients]


class _Replay(torch.autograd.Function):
    """A graph's forward pass, and its backward pass for autograd."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, rows: PackedRows, kept: Tensor, *_trained: Tensor) -> Tensor:
        ctx.graph, ctx.kept = graph, kept
        states = graph.forward(rows)[kept]
        ctx.pending, ctx.number = graph.pool.begin(), graph.pool.num_passes
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.graph.pool.num_passes:
            raise RuntimeError(
                "the activations of this forward pass are gone: CUDA graphs keep them for one backward pass"
                "; RLHF_FAST_CUDA_GRAPHS=0 turns graphs off, and retain_graph keeps them as usual"
            )
        gradients = ctx.graph.backward(ctx.kept, grad)
        ctx.pending = ctx.number = None
        ctx.graph.pool.end()
        return None, None, None, *gradients
