"""Training passes that repeat the rollout's arithmetic: the setting `exact` of PPO.

On the CPU the decode step is one call of compiled code (csrc/cpu/decode_step.cpp). Its products, norms and attention
have one order of summation each, whatever tokens are beside a token. With `exact` the training forward runs ops of the
same order on float32 activations (model/packed_decoder.py), and the rollout's log-probabilities come from the op of the
training step. So a token's log-probability is the same number in both, to the bit, in any batch or micro-batch.
"""

from __future__ import annotations

import os

from rlhf_fast.errors import UserError
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._product import is_fast
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.compiled_step import SUPPORTED_DTYPES, find_kernels
from rlhf_fast.rollout.weights import read_weights


def make_exact(*models: Model) -> None:
    """Let all forward passes of `models` repeat the arithmetic of the compiled decode step. UserError for a model that
    it does not serve, or without compiled kernels; a model that is changed later is refused at its next pass."""
    for model in models:
        model.exact = False
        reason = _find_obstacle(model)
        if reason is None:
            model.exact = True
            reason = model.packed_refusal
        if reason is not None:
            model.exact = False
            raise UserError(f"{model.name}: exact cannot be set, because {reason}; set exact to false")


def find_kernel_obstacle() -> str | None:
    """Return why this machine and the environment have no kernels for it, or None."""
    kernels = find_kernels()
    if kernels is not None and is_fast(kernels):
        return None
    variables = [name for name in ("RLHF_FAST_BACKEND", "RLHF_FAST_ISA", "RLHF_FAST_EXT") if os.environ.get(name)]
    setting = " and ".join(f"{name}={os.environ[name]}" for name in variables)
    return "it needs compiled kernels with AVX2, and there are none" + (f" with {setting}" if setting else "")


def _find_obstacle(model: Model) -> str | None:
    """Return why the decode step does not serve `model`, or None."""
    if model.device.type != "cpu":
        return f"only the CPU's compiled decode step has an order of sums to repeat, and the device is {model.device}"
    if why := find_kernel_obstacle():
        return why
    if model.head_layer.weight.dtype not in SUPPORTED_DTYPES:
        return f"its weights are {model.head_layer.weight.dtype}, and it serves float32 and bfloat16"
    try:
        read_weights(model)
    except Unsupported as reason:
        return f"the decode path fused (docs/rollouts.md) does not serve it: {reason}"
    return None
