"""The memory that a stage names before its first step is the peak of its process, within 25 %, and never 15 % too low;
of adapters within the bounds of docs/running.md.

Each run is a process of its own, whose high-water mark is its own.
"""

import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.config.fields import DataConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.run.estimate import GIB
from rlhf_fast.run.memory import peak_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
LOG = LogConfig(checkpoint_every=1, keep=1, live=False)
OPTIM = OptimConfig(micro_batch_tokens=1024)
CASES = {
    "small": {},
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora": LoraConfig(rank=4)},
    "checkpointing": {"gradient_checkpointing": True},
}


def measured(stage: str, case: str, folder: str) -> None:
    """Run a stage in this process and write the estimate and the peak, in bytes."""
    from rlhf_fast.run import estimate
    from rlhf_fast.stages import ppo, reward, sft

    torch.set_num_threads(1)
    os.chdir(folder)
    found, memory_needed = [], estimate.memory_needed
    estimate.memory_needed = lambda *a: found.append(memory_needed(*a)) or found[-1]
    path = Path(folder)
    name = toy.model_at(path) if case == "small" else str(path / "large")
    model = ModelConfig(name, **CASES[case])
    letters = ["a b c d e f g h " * 5] * 24
    prompts = [f"{' '.join(toy.LETTERS[: 2 + i % 6])} {'a ' * (i // 6 + 1)}." for i in range(24)]
    demonstrations = [{"prompt": p, "completion": text} for p, text in zip(prompts, letters, strict=True)]
    data = DataConfig(toy.jsonl(path / "d.jsonl", demonstrations))
    if stage == "sft":
        changes = {"model": model, "data": data, "select": "last", "pretrain_fraction": 0.0, "residual_dropout": 0.0}
        sft.run(toy.sft(path, optim=OPTIM, log=LOG, epochs=1, batch=12, **changes))
    elif stage == "reward":
        rows = [{"prompt": p, "chosen": "a " * 40, "rejected": "b " * 40} for p in prompts]
        data = DataConfig(toy.jsonl(path / "r.jsonl", rows))
        reward.run(toy.reward(path, model=model, data=data, optim=OPTIM, log=LOG, epochs=1, batch=12))
    else:
        cfg = toy.ppo(path, policy=model, value=replace(model, path=""), optim=OPTIM, value_optim=OPTIM, log=LOG)
        cfg = replace(cfg, pretrain=DataConfig(), episodes=16, batch=16, minibatch=16, select="last")
        ppo.run(replace(cfg, sampling=SamplingConfig(max_new_tokens=48, min_new_tokens=48, allow_biased_filters=True)))
    (path / "measured").write_text(f"{found[0]} {peak_memory()}")


@pytest.mark.exhaustive(0, slow=3)
@pytest.mark.parametrize(
    ("stage", "case"),
    [
        *((stage, case) for stage in ("sft", "reward", "ppo") for case in ("small", "float32")),
        *(("sft", case) for case in ("bfloat16", "adapters", "checkpointing")),
        ("ppo", "adapters"),
    ],
)
def test_the_estimate_is_near_the_peak(tmp_path, stage, case):
    if "lora" in CASES[case]:
        pytest.importorskip("peft")
    if case != "small":
        torch.manual_seed(0)
        words = toy.tokenizer()
        shape = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "max_position_embeddings": 256}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
        LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=1)).save_pretrained(
            tmp_path / "large"
        )
        words.save_pretrained(tmp_path / "large")
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(stage, case, str(tmp_path)))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    estimate, peak = map(int, (tmp_path / "measured").read_text().split())
    print(f"{stage} {case}: estimate {estimate / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, ratio {estimate / peak:.2f}")
    # A busy machine drops pages of files, which lowers a peak: 1.26 was seen of 1.11.
    low, high = (0.97, 1.3) if case == "adapters" else (0.85, 1.25)
    assert low < estimate / peak < high
