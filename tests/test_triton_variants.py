"""Triton's own way from a call to a compiled variant, without a GPU: it takes every kernel, and one variant serves any
number of rows, so that a rollout whose rows end one by one does not wait for a compilation."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

RECORD = """
import collections
import functools
from importlib import import_module

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from rlhf_fast.bench.checks.triton_resources import KERNELS, file_stem
from rlhf_fast.kernels._op import OPS
from rlhf_fast.kernels.triton import launch

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
launches = collections.defaultdict(set)  # kernel -> variants


@functools.cache
def binder(kernel):
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def record(kernel, grid, *args, **meta):
    _, specialization, options = binder(kernel)(*args, **meta)
    launches[kernel.fn.__name__].add((tuple(specialization), str(options)))


launch.run, launch.num_sms, launch.sm_arch = record, lambda _: 132, lambda _: 90


def run(op, *args, **options):
    getattr(import_module(f"rlhf_fast.kernels.triton.{file_stem(op)}"), op.name)(*op.normalized(*args, **options))


def has_triton(op):
    return (KERNELS / f"{file_stem(op)}.py").is_file()
"""

EVERY_OP = """
for op in filter(has_triton, OPS.values()):
    for dtype in (torch.float32, torch.bfloat16):
        for size in op.small_sizes:
            run(op, *op.make_inputs(device="cpu", dtype=dtype, **size))
print(*launches, sep="\\n")
"""

ANY_NUMBER_OF_ROWS = """
D, V, PAGES = 64, 4500, 40


def calls(B):
    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    rows, weight, logits, ids = zeros(B, D), zeros(V, D), zeros(B, V), torch.arange(B)
    int32s = ids.int()
    plain = {"seed": 16 * B, "row_ids": ids, "steps": ids, "temperature": 0.7}
    filtered = {**plain, "top_p": 0.9, "top_k": 50}
    yield "sample_tokens", [logits], plain
    yield "sample_tokens", [logits], filtered
    yield "linear_sample_tokens", [rows, weight], plain
    yield "linear_sample_tokens", [rows, weight], filtered
    yield "rms_norm", [rows, rows[0], 1e-6, rows.clone()], {}
    yield "layer_norm", [rows, rows[0], rows[0]], {}
    yield "swiglu", [rows, rows], {}
    yield "gelu", [rows], {}
    heads, cache = zeros(B, 4, 16), zeros(PAGES + B, 2, 16, 16)
    half = zeros(B, 8)
    yield "rope_store", [heads, heads[:, :2], heads[:, :2], half, half, cache, cache.clone(), ids], {}
    yield "decode_attention", [heads, cache, cache, zeros(B, PAGES).int(), int32s, int32s, 0.25], {}
    yield "token_logprobs", [logits, ids], {}
    yield "linear_logprobs", [rows, weight, ids], {}
    yield "linear_logprobs", [rows.float(), weight.float(), ids], {}
    tokens = zeros(B, 300, dtype=torch.float32)
    yield "gae", [tokens, tokens, tokens == 0], {}
    yield "ppo_advantages", [tokens, tokens, tokens, tokens[:, 0], tokens == 0], {}
    yield "ranking_loss", [tokens[:, :4].flatten(), torch.arange(B + 1) * 4, torch.arange(4 * B)], {}


kept = collections.defaultdict(lambda: collections.defaultdict(set))  # call -> kernel -> variants
for B in range(1, 65):
    for i, (name, args, options) in enumerate(calls(B)):
        launches.clear()
        run(OPS[name], *args, **options)
        for kernel, variants in launches.items():
            kept[i, B][kernel] = variants
for (i, B), kernels in kept.items():
    for kernel, variants in kernels.items():
        new = variants - kept[i, 37][kernel]
        if new:
            print(kernel, B, *new)
print("compared", len(kept))
"""


def run_without_interpreter(code, file):
    file.write_text(RECORD + code)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_triton_takes_the_arguments_of_every_kernel(tmp_path):
    """The interpreter and the compiler do not see what a launch does first: no parameter may be called `options`."""
    assert len(run_without_interpreter(EVERY_OP, tmp_path / "every_op.py")) > 20


@pytest.mark.slow
def test_one_variant_serves_any_number_of_rows(tmp_path):
    """Except where a tile follows from their number, the mask of 16-byte loads ends at it, or a pointer's alignment
    follows from it."""
    *differences, compared = run_without_interpreter(ANY_NUMBER_OF_ROWS, tmp_path / "rows.py")
    assert compared == "compared 1024"
    may_differ = {"ppo_advantages_merge_kernel", "ranking_loss_merge_kernel"}
    may_differ |= {"list_valid_kernel", "merge_splits_kernel"}
    assert {line.split()[0] for line in differences} <= may_differ, "\n".join(differences)[:4000]
