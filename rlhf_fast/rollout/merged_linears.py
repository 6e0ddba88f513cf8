"""A decode step's products of linear layers that read the same input, as one where model/adjacent_weights.py has moved
their weights: on a GPU a step of a small model is a chain of products that take no longer than a launch."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.model.adjacent_weights import joined
from rlhf_fast.rollout.weights import DecoderWeights, LayerWeights, LinearWeights


def merge_adjacent(weights: DecoderWeights) -> DecoderWeights:
    """Return the weights with those products merged whose weights are adjacent. Nothing is copied."""
    return weights._replace(layers=[_merge_layer(layer) for layer in weights.layers])


def _merge_layer(layer: LayerWeights) -> LayerWeights:
    gate_up = None if layer.gate is None else _merge((layer.gate, layer.up))
    qkv = None
    if layer.q_norm is None and layer.k_norm is None:  # a norm of each head would copy its part of the product
        qkv = _merge(layer.qkv)
    return layer._replace(qkv=layer.qkv if qkv is None else (qkv,), gate_up=gate_up)


def _merge(linears: Sequence[LinearWeights]) -> LinearWeights | None:
    """Return one layer with all outputs, or None if the weights or biases are not adjacent."""
    separate = any(linear.transposed or linear.is_split for linear in linears)
    joint = None if separate else joined(linears)
    return None if joint is None else LinearWeights(*joint, transposed=False)
