"""The search of sample_tokens' cutoff in csrc/cpu, and in csrc/cuda on a GPU or run on the CPU by tests/simt.

Rows are chosen so that every branch is taken: the cutoff lies within the bins or below them, the bracket has few
tokens, more than the list holds, or none; ties, tokens of -inf, numbers of the smallest and of the largest size.
"""

import functools
import math
from importlib import import_module

import pytest
import torch
from cuda_kernels import at_offset, cuda_backends, on_each_backend

from rlhf_fast import ops

home = import_module("rlhf_fast.kernels.sample_tokens")
BACKENDS = cuda_backends("sample_tokens")
KERNELS = BACKENDS + [(b, "cpu") for b in ops.sample_tokens.backends if b.startswith("cpu")]
CASES = [(*kernel, dtype) for kernel in KERNELS for dtype in (torch.float32, torch.bfloat16)]
CASES += [(*kernel, torch.float16) for kernel in BACKENDS]
on_each_backend = on_each_backend("sample_tokens")
on_each_kernel = pytest.mark.parametrize("backend, device", KERNELS, ids=[b for b, _ in KERNELS])
INFINITY = float("inf")
V = 6007


@functools.cache
def make_rows():
    """Return rows by name, (V,) float32."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(V, generator=generator)
    rare = torch.rand(V, generator=generator) < 0.01
    half = torch.rand(V, generator=generator) < 0.5
    one = torch.arange(V) == V // 3
    return {
        "flat": torch.full((V,), -7.25),
        "one token": torch.where(one, 2.0, -INFINITY),
        "peaked": torch.where(one, 30.0, normal),
        "two levels": torch.where(rare, 5.0, 0.0),
        "zipf": -1.1 * torch.log(torch.randperm(V, generator=generator) + 1.0),
        "normal": 3 * normal,
        "narrow": 20 + 0.3 * normal,
        "rounded": (2 * normal).round(),
        "sorted": (3 * normal).sort(descending=True).values,
        "masked": torch.where(half, 3 * normal, -INFINITY),
        "masked by a number": torch.where(half, 3 * normal, torch.finfo(torch.float16).min),
        "wide": 1e4 * normal,
        "smallest": (50 * normal).round() * 1e-45,
    }


OPTIONS = [
    {"top_p": 0.9}, {"top_p": 0.5, "temperature": 0.3}, {"top_p": 0.999}, {"top_p": 1e-6}, {"top_k": 1}, {"top_k": 50},
    {"top_k": V // 2}, {"top_k": 5000}, {"top_k": 1000, "top_p": 0.9},
    {"top_k": V // 3, "top_p": 0.5, "temperature": 2.0}, {"min_p": 0.05},
    {"min_p": 0.3, "top_p": 0.95, "top_k": 500}, {"min_p": 1e-5, "top_p": 0.9}, {"temperature": 0.0},
]  # fmt: skip


def sample(backend, logits, **options):
    ids = torch.arange(len(logits), device=logits.device)
    return ops.sample_tokens.backend(backend)(logits, **{"seed": 9, "row_ids": ids, "steps": 4} | options)


@pytest.mark.parametrize("backend, device, dtype", CASES, ids=[f"{b}-{str(dtype)[6:]}" for b, _, dtype in CASES])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.exhaustive(6, by=("backend",))
def test_rows_of_every_kind_are_as_in_the_reference(backend, device, dtype, options):
    logits = torch.stack(list(make_rows().values())).to(device, dtype)
    ours, truth = sample(backend, logits, **options), sample("reference", logits, **options)
    wrong = [name for name, a, b in zip(make_rows(), ours[0].tolist(), truth[0].tolist(), strict=True) if a != b]
    assert not wrong
    torch.testing.assert_close(ours[1:], truth[1:], atol=2e-5, rtol=1e-5)


@on_each_kernel
@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("temperature") != 0], ids=str)
@pytest.mark.exhaustive(6, by=("backend",))
def test_the_last_token_kept_is_kept_and_the_next_one_is_not(backend, device, options):
    """Noise makes the token of a place in the order win, if it is kept. The reference is a sort, in float64."""
    rows = torch.stack(list(make_rows().values()))
    temperature, top_p = options.get("temperature", 1.0), options.get("top_p", 1.0)
    min_z = math.log(options["min_p"]) if "min_p" in options else -INFINITY
    logits, noise, expected = [], [], []
    for row in rows:
        order = row.double().sort(descending=True, stable=True).indices
        z = (row[order].double() - row.max().double()) / temperature
        is_allowed = (torch.arange(V) < options.get("top_k", V)) & (z >= min_z) & z.isfinite()
        mass = z.exp() * (torch.arange(V) < options.get("top_k", V))
        before = mass.cumsum(0) - mass
        if top_p < 1 and ((before - top_p * mass.sum()).abs().min() < 1e-6 * mass.sum()):
            continue  # a token at which the mass equals top-p to seven digits may be kept or not
        count = int((is_allowed & ((before < top_p * mass.sum()) | (top_p == 1))).sum())
        for place, is_kept in (count - 1, True), (count, False):
            if place < V:
                token = order[place]
                logits.append(row)
                noise.append(torch.zeros(V).index_fill(0, token[None], 1e9))
                expected.append((int(token), is_kept))
    assert len(expected) > 8
    tokens = sample(backend, torch.stack(logits).to(device), noise=torch.stack(noise).to(device), **options)[0]
    assert [(token, ours == token) for (token, _), ours in zip(expected, tokens.tolist(), strict=True)] == expected


@on_each_backend
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 700, "top_p": 0.8}, {"top_k": V // 2}], ids=str)
@pytest.mark.exhaustive(1, by=("backend", "device"))
def test_bits_do_not_depend_on_the_blocks_of_a_row_nor_on_its_address(backend, device, options, monkeypatch):
    logits = torch.stack(list(make_rows().values())).to(device, torch.bfloat16)
    expected = sample(backend, logits, **options)
    for min_split, offset in (100, 0), (V, 0), (4096, 1), (1000, 3):
        monkeypatch.setattr(home, "MIN_SPLIT", min_split)
        monkeypatch.setattr(home, "BLOCKS_PER_SM", 1000)
        for ours, same in zip(sample(backend, at_offset(logits, offset), **options), expected, strict=True):
            assert torch.equal(ours, same)


@on_each_backend
def test_a_batch_without_rows(backend, device):
    outputs = sample(backend, torch.empty(0, V, device=device), top_p=0.9)
    assert [list(x.shape) for x in outputs] == [[0]] * 6
