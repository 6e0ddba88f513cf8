"""Predict the decode step of the rollout: one graph of all layers' launches, at the shapes of bench/shapes.py.

The nodes of a layer are listed by hand, as the rollout launches them on merged weights; what each op launches is
recorded. The library's products have no code here: their bytes count, and their operations.
"""

from typing import NamedTuple

import torch

from rlhf_fast.bench.launches import Arguments, Node, record
from rlhf_fast.bench.problem import Case
from rlhf_fast.bench.shapes import SHAPES, step_bytes
from rlhf_fast.bench.targets import Target
from rlhf_fast.kernels._op import OPS

CONTEXT, PAGE = 512, 64
BATCHES = (1, 64, 256)
STATE_NODES = 22  # of the measured step, 325 launches of 30 layers and 185 of 16: lookups, copies, the rows' state
ITEMSIZE = torch.bfloat16.itemsize


class StepCase(NamedTuple):
    """A decode step: a model's shape and the number of rows."""

    model: str
    batch: int

    @property
    def target(self) -> Target:
        """No goal."""
        return Target("", {})

    def __str__(self) -> str:
        return f"decode step {self.model}, B = {self.batch}, context {CONTEXT}"

    @property
    def minimum(self) -> tuple[float, float]:
        """The bytes of the weights and of the keys and values, and the operations of the products."""
        shape = SHAPES[self.model]
        numbers = sum(rows * columns for rows, columns in self.matrices) * shape["num_hidden_layers"]
        numbers += shape["vocab_size"] * shape["hidden_size"]
        moved = step_bytes(shape, ITEMSIZE * numbers, self.batch, CONTEXT, ITEMSIZE)
        return float(moved), 2.0 * self.batch * numbers

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's products: queries with keys and values, attention's, gate with up, down."""
        shape = SHAPES[self.model]
        D, d, intermediate = shape["hidden_size"], shape["head_dim"], shape["intermediate_size"]
        H, Hkv = shape["num_attention_heads"], shape["num_key_value_heads"]
        return [(D, (H + 2 * Hkv) * d), (H * d, D), (D, 2 * intermediate), (intermediate, D)]


def step_cases() -> list[StepCase]:
    return [StepCase(model, batch) for model in ("135M", "1B") for batch in BATCHES]


def product(batch: int, inner: int, columns: int) -> Node:
    """Return the node of a product of `batch` rows with a weight."""
    moved = ITEMSIZE * (batch * inner + inner * columns + batch * columns)
    name = f"mm {batch} x {inner} x {columns}"
    return Node(name, "torch", num_bytes=float(moved), flops=2.0 * batch * inner * columns)


def nodes_of(step: StepCase, recorder) -> list[tuple[Arguments | None, list[Node]]]:
    """Return the nodes of a step in their order, with the arguments of the op that launches them."""
    shape, batch = SHAPES[step.model], step.batch
    D, intermediate, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads = {"H": shape["num_attention_heads"], "Hkv": shape["num_key_value_heads"], "d": shape["head_dim"], "P": PAGE}

    def launched(op: str, size: dict, backend: str = "cuda") -> tuple[Arguments, list[Node]]:
        arguments = Arguments(Case(OPS[op], size, torch.bfloat16, False))
        record(arguments, backend, recorder)
        return arguments, record(arguments, backend, recorder) or []

    norm = launched("rms_norm", {"shape": (batch, D), "residual": True})
    rope = launched("rope_store", {"N": batch, **heads})
    attention = launched("decode_attention", {"lengths": (CONTEXT,) * batch, **heads})
    swiglu = launched("swiglu", {"shape": (batch, intermediate)})
    sample = launched("linear_sample_tokens", {"B": batch, "D": D, "V": vocabulary}, "triton")
    qkv, out, up, down = ((None, [product(batch, *sizes)]) for sizes in step.matrices)
    layer = [norm, qkv, rope, attention, out, norm, up, swiglu, down]
    state = (None, [Node("lookups, copies, the rows' state", "torch")] * STATE_NODES)
    return layer * shape["num_hidden_layers"] + [norm, sample, state]
