"""`rlhf-fast export`: GGUF files of each family, their tokenizers, Modelfiles, folders, and what is never written over.

llama.cpp computes the files where llama-cpp-python is installed; elsewhere its conventions are written out here.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import transformers as t
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.errors import UserError
from rlhf_fast.export import gguf_file, gguf_tensors, gguf_vocabulary, llama_cpp, modelfile
from rlhf_fast.export.agreement import TEXTS, Row, compare, greedy_rows, logits_of, rounding
from rlhf_fast.export.export import Request, export
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model

gguf = pytest.importorskip("gguf", reason="extra [export]")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"

CORPUS = [
    *TEXTS,
    gguf_vocabulary.PROBE,
    "The cat sat on the mat. It's the dog's 1234 bones, they'll say; we've 56!",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
LAST_TURN = (
    "{{ messages[-1]['role'] + messages[-1]['content'] }}{% if not add_generation_prompt %}<|im_end|>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bpe_tokenizer(pre: str = "gpt-2", template: str = "", ignore_merges: bool | None = None, bos: bool = False):
    """A byte-level BPE of 320 tokens with one of llama.cpp's ways to split."""
    known = gguf_vocabulary.PRE[pre]
    backend = Tokenizer(models.BPE(ignore_merges=known.ignore_merges if ignore_merges is None else ignore_merges))
    backend.pre_tokenizer = known.split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        )
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    if template:
        tokenizer.chat_template = template
    return tokenizer


SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15}
NEOX = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
MODELS = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, SHAPE),
    "llama, tied, biases, wide heads": (
        t.LlamaForCausalLM, t.LlamaConfig,
        SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32},
    ),
    "llama, rotation of llama3": (t.LlamaForCausalLM, t.LlamaConfig, SHAPE | {"rope_parameters": LLAMA3}),
    "llama, linear rotation": (
        t.LlamaForCausalLM, t.LlamaConfig,
        SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": (t.MistralForCausalLM, t.MistralConfig, SHAPE | {"sliding_window": None}),
    "mistral, window": (t.MistralForCausalLM, t.MistralConfig, SHAPE | {"sliding_window": 160}),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, SHAPE),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, SHAPE | {"head_dim": 32}),
    "smollm3": (t.SmolLM3ForCausalLM, t.SmolLM3Config, SHAPE | {"num_hidden_layers": 4}),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "gpt2, own head": (t.GPT2LMHeadModel, t.GPT2Config, GPT | {"tie_word_embeddings": False}),
    "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, NEOX | {"rotary_pct": 0.5, "hidden_act": "gelu_new"}),
    "gpt_neox, in sequence, tied": (
        t.GPTNeoXForCausalLM, t.GPTNeoXConfig,
        NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
}  # fmt: skip


def module_of(kind: str, tokenizer, **changes):
    """A random model with the rows that the tokenizer needs; no bias or norm is 0 or 1."""
    cls, config, shape = MODELS[kind]
    torch.manual_seed(1)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    module = cls(config(**{**shape, **changes, **ids, "vocab_size": len(tokenizer)}))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return module


def model_of(kind: str, tokenizer=None, **changes) -> Model:
    tokenizer = tokenizer or bpe_tokenizer()
    return Model(module_of(kind, tokenizer, **changes).eval(), tokenizer)


def folder_of(folder: Path, kind: str = "llama", tokenizer=None, **changes) -> str:
    tokenizer = tokenizer or bpe_tokenizer()
    module_of(kind, tokenizer, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(model: Model, path: Path, kind: str = "f32", template: str = "auto"):
    encoder = Encoder(model.tokenizer, template, eos=False)
    held, facts = gguf_tensors.contents(model, gguf), gguf_vocabulary.tokenizer_facts(model, encoder)
    gguf_file.write(path, "model", kind, held, facts)
    return encoder, held, facts


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(path).tensors}


def field(path: Path, name: str):
    return gguf.GGUFReader(path).fields[name].contents()


@pytest.mark.parametrize("kind", MODELS)
def test_file_holds_the_model(kind, tmp_path):
    """Every weight is found again in the file, and what is read back is put where it was."""
    model = model_of(kind)
    before = {name: p.detach().clone() for name, p in model.base.named_parameters()}
    _, held, _ = written(model, tmp_path / "f32.gguf")
    assert sum(gguf_file.read_back(tmp_path / "f32.gguf", held).values()) == len(held.weights)
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())
    total = sum(x.size for x in tensors_of(tmp_path / "f32.gguf").values())
    own = sum(p.numel() for p in before.values())
    rope = sum(w.parameter.numel() for w in held.weights if w.name == "rope_freqs.weight")
    again = model.head_layer.weight.numel() if "neox" in kind and "tied" in kind else 0
    assert total == own + rope + again


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotation of Llama: elements 2 i and 2 i + 1 are a point."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """transformers' rotation: elements i and i + half are a point."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def test_rows_of_q_and_k_suit_the_rotation_of_llama_cpp(tmp_path):
    """The score of a query and a key is that of transformers' own order with its rotation."""
    model = model_of("llama, tied, biases, wide heads")
    written(model, tmp_path / "x.gguf")
    found = {name: torch.from_numpy(value.copy()) for name, value in tensors_of(tmp_path / "x.gguf").items()}
    attention = model.base.model.layers[1].self_attn
    x = torch.randn(2, 64)
    angles = torch.outer(torch.tensor([3.0, 17.0]), model.decoder.rotary_emb.inv_freq)

    def scores(q_weight, q_bias, k_weight, k_bias, rotate):
        q = rotate((x[1] @ q_weight.T + q_bias).view(4, 32), angles[1])
        k = rotate((x[0] @ k_weight.T + k_bias).view(2, 32), angles[0])
        return torch.einsum("hd,hd->h", q, k.repeat_interleave(2, 0))

    names = [f"blk.1.attn_{part}" for part in ("q.weight", "q.bias", "k.weight", "k.bias")]
    theirs = scores(*(found[name] for name in names), rotate_pairs)
    q, k = attention.q_proj, attention.k_proj
    ours = scores(q.weight, q.bias, k.weight, k.bias, rotate_halves)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    wrong = scores(q.weight, q.bias, k.weight, k.bias, rotate_pairs)
    assert float((wrong - ours).detach().abs().max()) > 1e-2


def test_fused_projections_are_in_the_order_of_llama_cpp(tmp_path):
    """All q, then all k, then all v; GPT-2's matrices have a row for each output."""
    model, x = model_of("gpt_neox"), torch.randn(3, 64)
    written(model, tmp_path / "neox.gguf")
    found = tensors_of(tmp_path / "neox.gguf")
    layer = model.base.gpt_neox.layers[0].attention.query_key_value
    q, k, v = layer(x).view(3, 4, 3, 16).unbind(2)
    value = x @ torch.from_numpy(found["blk.0.attn_qkv.weight"].copy()).T
    value += torch.from_numpy(found["blk.0.attn_qkv.bias"].copy())
    torch.testing.assert_close(value, torch.cat([y.reshape(3, 64) for y in (q, k, v)], 1))

    model = model_of("gpt2")
    written(model, tmp_path / "gpt2.gguf")
    found = tensors_of(tmp_path / "gpt2.gguf")
    layer = model.base.transformer.h[1].mlp.c_fc
    value = x @ torch.from_numpy(found["blk.1.ffn_up.weight"].copy()).T
    torch.testing.assert_close(value + torch.from_numpy(found["blk.1.ffn_up.bias"].copy()), layer(x))
    assert "output.weight" not in found and found["position_embd.weight"].shape == (256, 64)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_round_within_their_bound(kind, tmp_path):
    model = model_of("llama", intermediate_size=80)  # rows of 80: no multiple of q8_0's block
    before = model.base.model.layers[0].mlp.up_proj.weight.detach().clone()
    _, held, _ = written(model, tmp_path / "x.gguf", kind)
    rows = greedy_rows(model, Encoder(model.tokenizer, eos=False), 256)
    counts = gguf_file.read_back(tmp_path / "x.gguf", held)
    after = model.base.model.layers[0].mlp.up_proj.weight
    assert 0 < float((after - before).detach().abs().max()) < 0.01
    assert counts["F32"] == 5 and (kind != "q8_0" or counts == {"F32": 5, "F16": 2, "Q8_0": 14})
    assert 0 < rounding(rows, logits_of(model.base)) < 0.5


def test_a_damaged_file_is_noticed(tmp_path):
    model = model_of("llama")
    _, held, _ = written(model, tmp_path / "x.gguf", "q8_0")
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    data[-1000] ^= 0x40
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match="errors above the rounding"):
        gguf_file.read_back(tmp_path / "x.gguf", held)


def test_f16_that_overflows_is_refused(tmp_path):
    model = model_of("llama")
    model.base.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    with pytest.raises(UserError, match=r"above 65504.*bf16"):
        written(model, tmp_path / "x.gguf", "f16")


@pytest.mark.parametrize("pre", gguf_vocabulary.PRE)
def test_splits_are_named_by_behaviour(pre, tmp_path):
    tokenizer = bpe_tokenizer(pre, bos=pre == "smollm")
    model = model_of("llama", tokenizer)
    written(model, tmp_path / "x.gguf", "f16")
    assert field(tmp_path / "x.gguf", "tokenizer.ggml.pre") == pre
    assert field(tmp_path / "x.gguf", "tokenizer.ggml.add_bos_token") == (pre == "smollm")
    assert field(tmp_path / "x.gguf", "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    if llama_cpp.is_installed():
        import llama_cpp as package

        engine = package.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
        for text in CORPUS[:6]:
            assert engine.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text).input_ids


def test_unknown_splits_and_normalizers_are_refused():
    backend = bpe_tokenizer().backend_tokenizer
    assert gguf_vocabulary.pre_tokenizer_name("m", backend, False) == "gpt-2"
    with pytest.raises(UserError, match=r"none of llama.cpp's"):
        gguf_vocabulary.pre_tokenizer_name("m", backend, True)  # GPT-2's splits with merges that are ignored
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="changes a text before it splits"):
        gguf_vocabulary.pre_tokenizer_name("m", backend, False)
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"none of llama.cpp's"):
        gguf_vocabulary.pre_tokenizer_name("m", backend, False)


def test_merges_that_scores_cannot_express_are_refused():
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    bpe = {"vocab": {token: i for i, token in enumerate(tokens)}}
    model = model_of("llama")
    good = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert gguf_vocabulary._scores(model, bpe | {"merges": good}, tokens) == [-1e9] * 3 + [0.0, -1.0, -2.0]
    with pytest.raises(UserError, match="early and late"):
        gguf_vocabulary._scores(model, bpe | {"merges": [("ab", "c"), ("b", "c"), ("a", "bc"), ("a", "b")]}, tokens)
    with pytest.raises(UserError, match="does not merge 'a' and 'bc'"):
        gguf_vocabulary._scores(model, bpe | {"merges": good[:3]}, tokens)


REFUSED = {
    "gemma": (lambda: (t.GemmaForCausalLM, t.GemmaConfig, SHAPE | {"head_dim": 16}), {}, "GemmaForCausalLM is not"),
    "gelu": (lambda: MODELS["llama"], {"hidden_act": "gelu"}, "its activation is gelu"),
    "n_inner": (lambda: MODELS["gpt2"], {"n_inner": 100}, "n_inner is 100"),
    "by layer": (lambda: MODELS["gpt2"], {"scale_attn_by_inverse_layer_idx": True}, "scales attention scores"),
    "layers": (lambda: MODELS["smollm3"], {"no_rope_layers": [1, 0, 1, 1]}, "not every 4th"),
    "yarn": (
        lambda: MODELS["llama"],
        {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}},
        "rotation is yarn",
    ),
    "mlp bias": (lambda: MODELS["qwen2"], {"head_dim": 32}, "128 elements together"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case, monkeypatch):
    make, changes, reason = REFUSED[case]
    monkeypatch.setitem(MODELS, case, make())
    model = model_of(case, **changes)
    with pytest.raises(UserError, match=reason):
        gguf_tensors.contents(model, gguf)


def test_a_window_shortens_the_context(tmp_path):
    model = model_of("mistral, window")
    _, held, _ = written(model, tmp_path / "x.gguf")
    assert field(tmp_path / "x.gguf", "llama.context_length") == held.context_length == 160
    assert "160, the width of the model's attention window" in held.notes[0]


def row_of(*logits: list[float]) -> Row:
    values = torch.tensor(logits)
    return Row("text", [1], values.argmax(1).tolist(), values)


def test_only_near_ties_may_differ():
    row = row_of([0.0, 2.0, 1.98], [3.0, 0.0, 0.0])

    def theirs(*logits):
        return lambda tokens: torch.tensor([*logits, [0.0, 0.0, 0.0]])

    same = compare([row], theirs(*row.logits.tolist()), 0.1, 3, "it")
    assert (same.tokens, same.ties, same.moved) == (2, [], 0.0)
    tie = compare([row], theirs([0.0, 1.98, 2.0], [3.0, 0.0, 0.0]), 0.1, 3, "it")
    assert len(tie.ties) == 1 and "1 of 2 greedy tokens" in tie.sentence("it", 1)
    with pytest.raises(UserError, match="it says other tokens than the model: token 2 of response 1 is 0, theirs 1"):
        compare([row], theirs([0.0, 2.0, 1.98], [0.0, 3.0, 0.0]), 0.1, 3, "it")
    with pytest.raises(UserError, match="other log-probabilities"):
        compare([row], theirs([0.0, 2.0, 1.98], [9.0, 0.0, 0.0]), 0.01, 3, "it")
    with pytest.raises(UserError, match="other tokens"):
        compare([row], theirs([float("nan")] * 3, [3.0, 0.0, 0.0]), 0.1, 3, "it")


def checked(path: Path, row: Row):
    options = {"is_chat": False, "ends": [2], "activation": "silu", "kind": "f32", "rounding": 0.0, "num_tokens": 3}
    return llama_cpp.check(path, [row], **options)


def answers(monkeypatch, prompts: list, ends: list, logits: Tensor, status: int = 0):
    """Let llama.cpp's process answer so."""

    def run(command, input, **options):
        folder = Path(json.loads(input)["folder"])
        np.save(folder / "0.npy", logits.numpy())
        (folder / "found.json").write_text(json.dumps({"prompts": prompts, "ends": ends}))
        return subprocess.CompletedProcess(command, status, "", "Traceback\nValueError: no such architecture")

    monkeypatch.setattr(subprocess, "run", run)


def test_what_llama_cpp_answers_is_compared(tmp_path, monkeypatch):
    row = row_of([0.0, 2.0, 1.0], [3.0, 0.0, 0.0])
    same = torch.cat([row.logits, torch.zeros(1, 3)])
    answers(monkeypatch, [[1]], [True], same)
    assert checked(tmp_path / "x.gguf", row).tokens == 2
    answers(monkeypatch, [[7]], [True], same)
    with pytest.raises(UserError, match="reads the prompt 'text' as other tokens than the model: token 1 is 7, ours 1"):
        checked(tmp_path / "x.gguf", row)
    answers(monkeypatch, [[1]], [False], same)
    with pytest.raises(UserError, match=r"token 2 ends our responses, and does not end llama.cpp's"):
        checked(tmp_path / "x.gguf", row)
    answers(monkeypatch, [[1]], [True], same.flip(1))
    with pytest.raises(UserError, match=r"llama.cpp says other tokens than the model"):
        checked(tmp_path / "x.gguf", row)
    answers(monkeypatch, [[1]], [True], same, -signal.SIGILL)
    with pytest.raises(UserError, match=r"ended by SIGILL.*compiled for instructions"):
        checked(tmp_path / "x.gguf", row)
    answers(monkeypatch, [[1]], [True], same, 1)
    with pytest.raises(UserError, match=r"x.gguf: llama.cpp cannot read it: ValueError: no such architecture"):
        checked(tmp_path / "x.gguf", row)


@needs_llama_cpp
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_says_the_same_tokens(kind, tmp_path):
    run = folder_of(tmp_path / "run", kind, bpe_tokenizer("qwen2", CHATML))
    lines = list(export(Request(run, str(tmp_path / "out"), "f32")))
    [line] = [line for line in lines if line.startswith("llama.cpp: ")]
    equal, tokens = map(int, re.match(r"llama.cpp: (\d+) of (\d+) greedy tokens", line).groups())
    assert tokens >= 32 and (equal == tokens or "gpt" in kind), line  # GELU is a table of half precision there


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_llama_cpp_shows_rows_in_a_wrong_order(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "_row_order", lambda *_: None)
    if kind == "gpt2":
        original = gguf_file._rounded

        def flipped(weight, type_, package):
            return original(weight, type_, package) * (1.5 if weight.name == "blk.1.attn_qkv.weight" else 1)

        monkeypatch.setattr(gguf_file, "_rounded", flipped)
        monkeypatch.setattr(gguf_file, "_allowed", lambda value, kind: value.abs() + 1e9)
    run = folder_of(tmp_path / "run", kind)
    with pytest.raises(UserError, match=r"other tokens than|other log-probabilities"):
        list(export(Request(run, str(tmp_path / "out"), "f32")))
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(not STORIES.is_dir(), reason="no real data")
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_stories260k(kind, tmp_path):
    lines = list(export(Request(str(STORIES), str(tmp_path / "out"), kind, ollama=True)))
    assert any("greedy tokens of 4 prompts are ours" in line for line in lines)
    if llama_cpp.is_installed():
        assert any(line.startswith("llama.cpp: ") for line in lines)
        assert kind != "f32" or any(line.startswith("llama.cpp: 256 of 256") for line in lines)


@pytest.mark.parametrize("template", [CHATML, HEADERS, ""])
def test_modelfile_renders_the_models_prompts(template):
    tokenizer = bpe_tokenizer(template=template, bos=template == HEADERS)
    model = model_of("llama", tokenizer)
    encoder = Encoder(tokenizer, "auto" if template else "dialog", eos=False)
    text = modelfile.modelfile("x.gguf", model, encoder, [2], 256)
    assert text.startswith('FROM ./x.gguf\nTEMPLATE """') and 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 256" in text and "PARAMETER temperature 1.0" in text
    if template == HEADERS:  # the start token is the program's own
        assert "[user]" in text and "<|im_start|>" not in text
    elif not template:
        assert "Human: {{ $m.Content }}" in text and text.count("\n\nAssistant:") == 1


def go_parts(source: str) -> list[str]:
    """Return texts and actions of a template as Go's lexer finds them: an action begins at the first two braces."""
    return re.split(r"\{\{(.*?)\}\}", source, flags=re.DOTALL)


def test_a_brace_before_an_action_of_the_modelfile():
    braces = (
        "{% for m in messages %}{{ '{' + m['role'] + '}{' + m['content'] + '}<|im_end|>{' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{assistant}{' }}{% endif %}"
    )
    tokenizer = bpe_tokenizer(template=braces)
    encoder = Encoder(tokenizer, "auto", eos=False)
    source = modelfile.go_template(model_of("llama", tokenizer), encoder)
    parts = go_parts(source)
    actions = {action.strip() for action in parts[1::2]}
    conditions = {f'{word} eq $m.Role "{role}"' for word in ("if", "else if") for role in modelfile.ROLES}
    assert actions <= conditions | {'"{"', "$m.Content", "end", "range $i, $m := .Messages"}
    begin = next(i for i, part in enumerate(parts) if part.strip() == 'else if eq $m.Role "user"' or
                 part.strip() == 'if eq $m.Role "user"')  # fmt: skip
    rest = ["Hi" if part.strip() == "$m.Content" else part.strip().strip('"') if part.strip() == '"{"' else part
            for part in parts[begin + 1 :]]  # fmt: skip
    turn = "".join(rest[: next(i for i, part in enumerate(rest) if part.strip().startswith(("else", "end")))])
    last = "".join(rest[len(rest) - 1 - rest[::-1].index(" end ") + 1 :])
    assert turn + last == encoder.prompt([{"role": "user", "content": "Hi"}])[1]


def test_modelfile_of_plain_prompts_and_of_a_template_that_is_no_sequence_of_turns():
    model = model_of("llama")
    assert '"""{{ .Prompt }}"""' in modelfile.modelfile(
        "x.gguf", model, Encoder(model.tokenizer, "plain", False), [2], 64
    )
    tokenizer = bpe_tokenizer(template=LAST_TURN)
    model = model_of("llama", tokenizer)
    with pytest.raises(UserError, match="cannot translate its chat template"):
        modelfile.modelfile("x.gguf", model, Encoder(tokenizer, "chat", eos=False), [2], 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_folder_in_another_dtype(dtype, tmp_path, capsys):
    run = folder_of(tmp_path / "run", tokenizer=bpe_tokenizer(template=CHATML))
    assert main(["export", run, "--safetensors-dtype", dtype, "--out", str(tmp_path / "out")]) == 0
    assert f"transformers on {dtype}: " in capsys.readouterr().out
    module = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert module.dtype == getattr(torch, dtype)
    own = t.AutoModelForCausalLM.from_pretrained(run, dtype="auto")
    for (name, x), (other, y) in zip(module.state_dict().items(), own.state_dict().items(), strict=True):
        assert name == other and torch.equal(x, y.to(x.dtype))
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHATML and module.generation_config.eos_token_id == tokenizer.eos_token_id


def test_folder_has_what_servers_read(tmp_path):
    """The names of the weights and of the class are those of transformers' own save_pretrained."""
    run = folder_of(tmp_path / "run")
    list(export(Request(run, str(tmp_path / "out"), dtype="bfloat16")))
    from safetensors import safe_open

    names = []
    for folder in ("run", "out"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("run", "out")]
    assert names[0] == names[1] and configs[1]["architectures"] == ["LlamaForCausalLM"]
    assert (
        configs[0] | {"dtype": "bfloat16"} == configs[1] | {"dtype": "bfloat16"} and configs[1]["dtype"] == "bfloat16"
    )


def test_reward_models(tmp_path, capsys):
    tokenizer = bpe_tokenizer()
    config = t.LlamaConfig(**SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1)
    t.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "rm"), "--gguf", "f16", "--out", out]) == 2
    assert "llama.cpp has no scalar head" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "rm"), "--safetensors-dtype", "bfloat16", "--out", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "export: bfloat16: scores equal to the model's" and f"{out}." not in "".join(lines)
    again = t.AutoModelForSequenceClassification.from_pretrained(out, dtype="auto")
    assert again.dtype == torch.bfloat16 and again.score.weight.shape == (1, 64)


def lora_run(folder: Path) -> Path:
    """A folder as a stage saves it: trained in bfloat16, the adapter merged, and alone in adapter/."""
    pytest.importorskip("peft")
    base = folder_of(folder / "base")
    model = Model.load(ModelConfig(path=base, dtype="bfloat16", lora=LoraConfig(rank=2)), device="cpu")
    with lora.nonzero_adapters(model.module):
        model.save(folder / "run")
    return folder / "run"


def test_adapter_is_merged_in_float32(tmp_path):
    run, out = lora_run(tmp_path), tmp_path / "out"
    lines = list(export(Request(str(run), str(out), dtype="float32", merge_lora=True)))
    assert "merged in float32" in lines[0]
    import peft

    base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
    merged, plain = (t.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (out, run))
    distance = [
        max(float((p - q).detach().abs().max()) for p, q in zip(m.parameters(), whole.parameters(), strict=True))
        for m in (merged, plain)
    ]
    assert distance[0] < 1e-6 < 1e-4 < distance[1]  # the run's own weights are rounded to bfloat16


def test_a_relative_base_is_that_of_the_directory_of_the_run(tmp_path, monkeypatch):
    run = lora_run(tmp_path / "project")
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    saved = {"stage": "sft", "config": {"out": "elsewhere"}, "directory": str(tmp_path / "project")}
    (run / "run.json").write_text(json.dumps(saved))
    folder_of(tmp_path / "base", "llama", initializer_range=0.05)  # another model, at the path from here
    monkeypatch.chdir(tmp_path)
    lines = list(export(Request("project/run", "out", dtype="float32", merge_lora=True)))
    assert lines[0].startswith(f"{tmp_path / 'project' / 'base'} and project/run/adapter merged in float32")
    shutil.copytree(run, run / "last", ignore=shutil.ignore_patterns("run.json"))  # a folder inside the run's
    lines = list(export(Request("project/run/last", "out-last", dtype="float32", merge_lora=True)))
    assert lines[0].startswith(f"{tmp_path / 'project' / 'base'} and project/run/last/adapter")
    (run / "run.json").unlink()
    monkeypatch.chdir(tmp_path / "project")
    lines = list(export(Request("run", "out", dtype="float32", merge_lora=True)))
    assert lines[0].startswith("base and run/adapter")


def test_adapters_that_cannot_be_merged(tmp_path):
    run = lora_run(tmp_path)
    whole = folder_of(tmp_path / "whole")
    with pytest.raises(UserError, match="has no adapter/, so that there is nothing to merge"):
        list(export(Request(whole, str(tmp_path / "out"), merge_lora=True)))
    with pytest.raises(UserError, match="holds an adapter alone"):
        list(export(Request(str(run / "adapter"), str(tmp_path / "out"), dtype="float32")))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="there is no such folder here"):
        list(export(Request(str(run), str(tmp_path / "out"), merge_lora=True)))
    folder_of(tmp_path / "base", "llama", initializer_range=0.05)
    with pytest.raises(UserError, match=r"its weights are not those of"):
        list(export(Request(str(run), str(tmp_path / "out"), merge_lora=True)))
    assert not (tmp_path / "out").exists()


def test_nothing_of_others_is_written_over(tmp_path, capsys):
    run, out = folder_of(tmp_path / "run"), tmp_path / "out"
    call = ["export", run, "--out", str(out), "--safetensors-dtype", "bfloat16"]
    assert main(call) == 0 and main(call) == 0  # its own files it replaces
    (out / "notes.txt").write_text("mine")
    (out / "generation_config.json").write_text("{}")
    before = (out / "model.safetensors").read_bytes()
    assert main([*call[:-1], "float32"]) == 2
    assert "generation_config.json: was changed since the export that wrote it" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").read_bytes() == before
    (out / "run-f16.gguf").write_text("mine too")
    assert main(["export", run, "--out", str(out), "--gguf", "f16"]) == 2
    assert "was not written by an export" in capsys.readouterr().err
    assert main(["export", run, "--out", run, "--gguf", "f16"]) == 2
    assert "is not empty and no export of ours is in it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_that_is_killed_while_it_moves_files_is_repeated(tmp_path, monkeypatch):
    run, out = folder_of(tmp_path / "run"), tmp_path / "out"

    def calls(dtype, moves=None):
        """Export; with `moves`, up to the move of that number, as a killed process does."""
        replace, left = Path.replace, [moves]

        def moved(self, target):
            if moves is not None and self.parent.parent == tmp_path and Path(target).parent == out:
                if self.name != "export.json.tmp" and not left[0]:
                    raise KeyboardInterrupt
                left[0] -= self.name != "export.json.tmp"
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", moved)
            list(export(Request(run, str(out), dtype=dtype)))

    def sums():
        return json.loads((out / "export.json").read_text())["files"]

    for number in (0, 3, 1):  # the first into a new folder
        with pytest.raises(KeyboardInterrupt):
            calls(("bfloat16", "float32", "float16")[number % 3], number)
    weights = out / "model.safetensors"
    assert isinstance(sums()["model.safetensors"], list)
    calls("float32")
    assert set(sums()) == {path.name for path in out.iterdir()} - {"export.json"}
    assert sums() == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sums()}
    assert t.AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32
    with pytest.raises(KeyboardInterrupt):
        calls("bfloat16", 2)
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match="was changed since"):
        calls("bfloat16")


def test_what_killed_exports_leave_beside_the_folder_is_removed(tmp_path):
    run, out = folder_of(tmp_path / "run"), tmp_path / "out"
    names = ["out.export-abcdef12", "out.export-locked_1", "out.export-notes", "out.12345678", "other.export-abcdef12"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("x")
    lock = os.open(tmp_path / names[1], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    out.mkdir()
    (out / "export.json.tmp").write_text('{\n  "rl')
    list(export(Request(run, str(out), dtype="bfloat16")))
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", *names[1:]}
    assert not (out / "export.json.tmp").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "export.json.tmp").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        list(export(Request(run, str(tmp_path / "mine"), dtype="bfloat16")))


def test_bad_calls(tmp_path, capsys, monkeypatch):
    run = toy.model(tmp_path / "toy")
    assert main(["export", run]) == 2
    assert "nothing to write; give --gguf" in capsys.readouterr().err
    assert main(["export", run, "--gguf", "f16"]) == 2
    assert "its tokenizer is WordLevel" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), "--gguf", "f16"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", run, "--gguf", "f16"]) == 2
    assert "pip install gguf" in capsys.readouterr().err
