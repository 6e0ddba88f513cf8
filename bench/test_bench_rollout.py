"""A decode step of a rollout beside transformers' generate: SmolLM2-135M's shape, random weights, prompts of 64 tokens.

    pytest bench -k rollout --threads 2 [--vllm PYTHON]

Times are of one decode step; prefill is not counted. Ours returns log-probabilities, the others return none. The floor
is every weight and every cached key and value read once a step, or the operations of the products. `--vllm` names an
interpreter that has vLLM's CPU build, which runs in a process of its own.
"""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from rlhf_fast.batches import Prompts
from rlhf_fast.bench.shapes import SMOLLM2_135M, random_model, step_bytes
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout

PROMPT, NEW, BASELINE_NEW = 64, 128, 48
BATCHES = (1, 8, 32)
ROUNDS = 2  # of some seconds each, after one to warm up


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return random_model(SMOLLM2_135M, "cpu", request.param)


def prompts(batch: int) -> Prompts:
    tokens = torch.randint(
        1, SMOLLM2_135M["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(batch)
    )
    return Prompts(list(range(batch)), tokens.tolist(), [""] * batch)


def ours(model: Model, batch: Prompts, new: int = NEW, **sampling) -> float:
    """Return seconds of one of our decode steps."""
    stamps = []
    settings = SamplingConfig(max_new_tokens=new, batch=len(batch.uids), **sampling)
    Rollout(model, settings).generate(batch, progress=lambda *_: stamps.append(time.perf_counter()))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


class _Stamps(StoppingCriteria):
    def __init__(self):
        self.times = []

    def __call__(self, ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


@torch.no_grad()
def transformers_generate(model: Model, batch: Prompts, **sampling) -> float:
    """Return seconds of one decode step of transformers' generate."""
    stamps, ids = _Stamps(), torch.tensor(batch.tokens)
    model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=BASELINE_NEW, do_sample=True, top_k=0,
        stopping_criteria=StoppingCriteriaList([stamps]), **sampling,
    )  # fmt: skip
    return (stamps.times[-1] - stamps.times[0]) / (len(stamps.times) - 1)


def floor(model: Model, batch: int) -> dict[str, float]:
    """Return the bytes that a step reads and the operations of its products."""
    weights = sum(p.nbytes for p in model.module.parameters())
    itemsize = model.head_weight.element_size()
    reads = step_bytes(SMOLLM2_135M, weights, batch, PROMPT + NEW // 2, itemsize)
    return {"reads": reads, "flops": 2 * batch * sum(p.numel() for p in model.module.parameters())}


def check(model: Model, batch: Prompts):
    """Return a check: greedy tokens equal transformers', and log-probabilities are near where bfloat16 rounds both."""

    def run():
        few = batch.take(range(min(2, len(batch.uids))))
        settings = SamplingConfig(max_new_tokens=8, temperature=0.0)
        found = Rollout(model, settings, decode_path="fused").generate(few)
        if model.head_weight.dtype == torch.float32:
            ids = torch.tensor(few.tokens)
            theirs = model.module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
            assert found.response_ids() == theirs[:, PROMPT:].tolist()
        bound = 1e-4 if model.head_weight.dtype == torch.float32 else 0.1
        with torch.no_grad():
            again, _ = model.logprobs(found.tokens, found.prompt_lengths, found.lengths, sampled_tokens_only=True)
        torch.testing.assert_close(found.raw_logprobs, again, rtol=0, atol=bound)

    return run


@pytest.fixture(scope="module")
def vllm(model, request, tmp_path_factory) -> dict[str, float]:
    """Return seconds of vLLM's step by batch size, or nothing; it starts in minutes, so it runs once a dtype."""
    python, folder = request.config.getoption("vllm"), tmp_path_factory.mktemp("vllm")
    if not python:
        return {}
    model.module.save_pretrained(folder)
    report = subprocess.run(
        [python, str(Path(__file__).parent / "vllm_step.py"), str(folder), str(model.head_weight.dtype)[6:],
         ",".join(map(str, BATCHES)), str(PROMPT), str(BASELINE_NEW), str(torch.get_num_threads())],
        capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr[-2000:]
    return json.loads(report.stdout.splitlines()[-1])


@pytest.mark.parametrize("size", BATCHES)
def test_step(compare, model, vllm, size):
    batch, kind = prompts(size), str(model.head_weight.dtype)[6:]
    baselines = {"transformers generate": lambda: transformers_generate(model, batch)}
    if str(size) in vllm:
        baselines["vLLM (CPU), not interleaved"] = lambda: vllm[str(size)]
    compare(
        f"rollout step {kind}, batch {size}", lambda: ours(model, batch), baselines, check=check(model, batch),
        rounds=ROUNDS, **floor(model, size),
    )  # fmt: skip


@pytest.mark.parametrize("size", [8, 32])
def test_step_with_top_p(compare, model, size):
    batch, kind = prompts(size), str(model.head_weight.dtype)[6:]
    baselines = {
        "the same without top-p": (lambda: ours(model, batch, BASELINE_NEW), 1 / 1.15),
    }
    if size == 8:
        baselines["transformers generate"] = lambda: transformers_generate(model, batch, top_p=0.95)
    compare(
        f"rollout step {kind}, batch {size}, top-p 0.95", lambda: ours(model, batch, BASELINE_NEW, top_p=0.95),
        baselines, check=lambda: None, rounds=ROUNDS, **floor(model, size),
    )  # fmt: skip
