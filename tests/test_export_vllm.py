"""vLLM reads a run's folder and an exported one: prompts, greedy tokens, log-probabilities and end tokens are ours.

vLLM wants its own versions of torch and transformers: RLHF_FAST_VLLM_PYTHON names a Python that has it.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers as t
from test_rollout import SMOLLM2, STORIES

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.export.agreement import TEXTS, Row, greedy_rows, logits_of
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model

PYTHON = os.environ.get("RLHF_FAST_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else "")
READER = Path(__file__).resolve().parent / "support" / "vllm_reader.py"
HEAD = 32
"""The narrowest head of vLLM's attention on the CPU."""
POSITIONS = 256
NEAR_TIE = 1e-3
"""Gap in nats below which the order of sums may exchange two tokens."""
LOGPROB = 2e-3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

needs_vllm = pytest.mark.skipif(not PYTHON, reason="RLHF_FAST_VLLM_PYTHON names no Python with vLLM")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="no real data")
pytestmark = pytest.mark.slow


def widen_heads(source: Path, out: Path) -> None:
    """Write the Llama of `source` as one of HEAD wide heads that computes the same.

    New dimensions are 0. Pair i of a head rotates with theta^(-2i/width), so that in a head k times as wide it is pair
    k * i. The scores' factor width^-0.5 is made good in the queries; k = 4 makes that exact.
    """
    module = t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, width = module.config, module.config.head_dim
    times = HEAD // width
    pairs = torch.arange(width // 2) * times
    places = torch.cat((pairs, pairs + HEAD // 2))
    state = {}
    for name, weight in module.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.reshape(-1, width, weight.shape[1])
            wide = torch.zeros(len(heads), HEAD, weight.shape[1])
            wide[:, places] = heads * (times**0.5 if kind == "q_proj" else 1)
            weight = wide.flatten(0, 1)
        elif kind == "o_proj":
            heads = weight.reshape(len(weight), -1, width)
            wide = torch.zeros(len(weight), heads.shape[1], HEAD)
            wide[:, :, places] = heads
            weight = wide.flatten(1)
        state[name] = weight
    config.head_dim = HEAD
    wider = t.LlamaForCausalLM(config)
    wider.load_state_dict(state)
    wider.save_pretrained(out)
    t.AutoTokenizer.from_pretrained(source).save_pretrained(out)


class Case(NamedTuple):
    """A folder for vLLM and our responses of the model in it."""

    folder: str
    rows: list[Row]
    texts: list[str]
    """Prompts as text, if the folder has no chat template."""
    chats: list[list[dict]]


def case_of(folder: Path | str) -> Case:
    model = Model.load(ModelConfig(str(folder), dtype="float32"), device="cpu")
    encoder = Encoder(model.tokenizer, "auto", eos=False)
    rows = greedy_rows(model, encoder, POSITIONS)
    assert len(rows) == len(TEXTS)
    chats = [[{"role": "user", "content": text}] for text in TEXTS] if encoder.chat else []
    return Case(str(folder), rows, [] if chats else list(TEXTS), chats)


def read_by_vllm(cases: list[Case], folder: Path) -> list[dict]:
    """Return what vLLM makes of each case, read in one process."""
    jobs = [
        {
            "folder": case.folder,
            "prompts": [row.prompt for row in case.rows],
            "texts": case.texts,
            "chats": case.chats,
            "new": max(len(row.response) for row in case.rows),
        }
        for case in cases
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, str(READER), str(folder / "jobs.json"), str(folder / "out.json")]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((folder / "out.json").read_text())
    print("vLLM", found["version"])
    return found["jobs"]


def check(case: Case, theirs: dict) -> None:
    """The prompts of vLLM are ours, and its greedy responses with their log-probabilities."""
    assert (theirs["chats"] or theirs["texts"]) == [row.prompt for row in case.rows]
    equal = total = 0
    moved = 0.0
    for row, found in zip(case.rows, theirs["responses"], strict=True):
        logprobs = torch.log_softmax(row.logits, 1)
        total += len(row.response)
        for i, token in enumerate(row.response):
            assert i < len(found["tokens"]), f"vLLM ends after {i} tokens ({found['finish']}), ours are {row.response}"
            if token != found["tokens"][i]:  # from here on they are different texts
                gap = float(logprobs[i, token] - logprobs[i, found["tokens"][i]])
                assert gap < NEAR_TIE, f"token {i} is {token}, theirs {found['tokens'][i]}, {gap:.3g} nats apart"
                break
            equal += 1
            moved = max(moved, abs(float(logprobs[i, token]) - found["logprobs"][i]))
            assert found["logprobs"][i] > found["likeliest"][i] - NEAR_TIE
        else:
            assert len(found["tokens"]) == len(row.response)
    print(f"{case.folder}: {equal} of {total} tokens equal, log-probabilities within {moved:.2g}")
    assert equal >= 0.9 * total and moved < LOGPROB


def toy_folder(folder: Path) -> Path:
    """A random Llama with a chat template and two end tokens. Greedy, the first response comes to the second one."""
    from test_export import SPECIAL, bpe_tokenizer, folder_of

    tokenizer = bpe_tokenizer(template=CHATML)
    folder_of(folder, tokenizer=tokenizer, head_dim=HEAD)
    case = case_of(folder)
    reached = case.rows[0].response[9]
    assert tokenizer.decode([reached]) not in SPECIAL
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [tokenizer.eos_token_id, reached]
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def export(*arguments) -> None:
    assert main(["export", *map(str, arguments)]) == 0


@needs_stories
def test_wide_heads_compute_the_same(tmp_path):
    widen_heads(STORIES, tmp_path / "wide")
    tokens = [1, 403, 407, 261, 378, 432, 317, 260]
    logits = [
        logits_of(t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))(tokens)
        for folder in (STORIES, tmp_path / "wide")
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


@needs_vllm
@pytest.mark.skipif(not find_spec("gguf"), reason="extra [export]")
def test_chat_template_and_every_end_token(tmp_path):
    case = case_of(toy_folder(tmp_path / "run"))
    assert len(case.rows[0].response) <= 10 and case.chats
    (theirs,) = read_by_vllm([case], tmp_path)
    assert theirs["responses"][0]["finish"] == "stop"
    check(case, theirs)


@needs_vllm
@needs_stories
def test_stories260k(tmp_path):
    """A stage's own folder, its export in bfloat16, and a run with an adapter, merged anew."""
    pytest.importorskip("peft")
    widen_heads(STORIES, tmp_path / "wide")
    lines = [{"prompt": "Once upon a time", "completion": " there was a dog."}, {"prompt": "Tom", "completion": " ran."}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    arguments = ["--model.path", tmp_path / "wide", "--data.path", tmp_path / "data.jsonl", "--optim.lr", "1e-3"]
    assert main([str(x) for x in ("sft", *arguments, "--out", tmp_path / "run")]) == 0
    model = Model.load(ModelConfig(str(tmp_path / "wide"), dtype="bfloat16", lora=LoraConfig(rank=2)), device="cpu")
    with lora.nonzero_adapters(model.module):
        model.save(tmp_path / "adapted")
    export(tmp_path / "run", "--safetensors-dtype", "bfloat16", "--out", tmp_path / "half")
    export(tmp_path / "adapted", "--merge-lora", "--safetensors-dtype", "float32", "--out", tmp_path / "merged")
    cases = [case_of(tmp_path / name) for name in ("run", "half", "merged")]
    assert len({str(case.rows) for case in cases}) == 3
    for case, theirs in zip(cases, read_by_vllm(cases, tmp_path), strict=True):
        check(case, theirs)


@needs_vllm
@pytest.mark.skipif(not SMOLLM2, reason="RLHF_FAST_SMOLLM2 names no folder with SmolLM2-135M")
def test_smollm2(tmp_path):
    export(SMOLLM2, "--safetensors-dtype", "bfloat16", "--out", tmp_path / "half")
    case = case_of(tmp_path / "half")
    (theirs,) = read_by_vllm([case], tmp_path)
    check(case, theirs)
