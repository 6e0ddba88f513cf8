"""TRL's own trainers with `integrations.trl.fused()` and without: same losses, gradients and metrics.

The 20 steps are on stories260K, which is no part of this repository (test_real_data.py), the variants on random models.
Nothing is downloaded.
"""

import ast
import json
import logging
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from packaging.version import Version
from test_real_data import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, TrainerCallback

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import hooks
from rlhf_fast.integrations import trl as fast_trl
from rlhf_fast.integrations.head import LinearHead

INSTALLED = hooks.library_version("trl") or "0"
pytestmark = [
    pytest.mark.skipif(Version(INSTALLED) < Version("1.15"), reason="trl 1.15 or later is not installed"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # of TRL's own defaults
]
slow = pytest.mark.slow
PPO = Path(__file__).parent / "support" / "trl_ppo.py"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big", "red", "dog", "run", "far", "away"]
SCHEDULE = ("learning_rate", "epoch")  # metrics of the schedule, not of the loss


@pytest.fixture(autouse=True)
def offline(monkeypatch, one_thread):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def utils():
    """Return the module of TRL's that is changed. It takes seconds to import, which quick tests are spared."""
    from trl.trainer import utils

    return utils


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def share_of_vowels(completions, **_):
    return [sum(c.count(x) for x in "aeiou") / max(len(c), 1) for c in completions]


def rows(trainer: str, count: int) -> list[dict]:
    """Return `count` random rows in the columns that the trainer reads."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        row = {"prompt": text(rng, 3, 20) + " "}
        if trainer == "sft":
            row["completion"] = text(rng, 3, 25)
        elif trainer == "dpo":
            row |= {"chosen": text(rng, 3, 15), "rejected": text(rng, 3, 15)}
        elif trainer == "kto":
            row |= {"completion": text(rng, 3, 15), "label": i % 2 == 0}
        made.append(row)
    return made


class Record(TrainerCallback):
    """The logged metrics, and the gradients of the first optimizer step."""

    def __init__(self):
        self.metrics, self.grads = [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.metrics.append({k: v for k, v in logs.items() if isinstance(v, int | float)})

    def values(self, name):
        return torch.tensor([metrics[name] for metrics in self.metrics], dtype=torch.float64)


def train(kind: str, model, words, folder, steps: int, inside=nullcontext, **options) -> SimpleNamespace:
    """Train `steps` steps of 4 rows with a new trainer of TRL's; return its record and what `inside()` gave."""
    import trl
    from datasets import Dataset

    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}[kind]
    peft_config = options.pop("peft_config", None)
    sampled = {"num_generations": 4, "max_completion_length": 16, "temperature": 0.9}
    if kind not in ("grpo", "rloo"):
        sampled = {"max_length": 96}
    settings = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 1e-4},
        **{
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "seed": 0,
            "max_grad_norm": 0.0,
        },
        **{"lr_scheduler_type": "constant", "optim": "adamw_torch", "bf16": False, "gradient_checkpointing": False},
        **{"disable_tqdm": True, "logging_nan_inf_filter": False},
        **sampled,
        **options,
    }
    rest = {}
    if kind in ("grpo", "rloo"):
        rest["reward_funcs"] = share_of_vowels
    elif kind in ("dpo", "kto") and peft_config is None:
        rest["ref_model"] = type(model)(model.config)
        rest["ref_model"].load_state_dict(model.state_dict())
    record = Record()
    data = Dataset.from_list(rows(kind, 4 * steps if kind in ("sft", "dpo", "kto") else 16))
    torch.manual_seed(0)
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=data,
        processing_class=words,
        callbacks=[record],
        **({"peft_config": peft_config} if peft_config else {}),
        **rest,
    )
    with inside() as handle:
        trainer.train()
    return SimpleNamespace(record=record, status=handle.status if handle else None)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the first."""
    return float((one - other).norm() / one.norm().clamp_min(1e-12))


def worst_gradient(plain: Record, ours: Record) -> float:
    assert plain.grads and plain.grads.keys() == ours.grads.keys()
    return max(far(grad, ours.grads[name]) for name, grad in plain.grads.items())


def assert_same_metrics(plain, ours, tolerance: float, but: tuple[str, ...] = SCHEDULE) -> None:
    """Check that both logged the same names, and the same values but for times."""
    assert len(plain.metrics) == len(ours.metrics)
    for one, other in zip(plain.metrics, ours.metrics, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(but):
            if "time" not in name and name != "eps":  # episodes per second
                assert other[name] == pytest.approx(one[name], rel=tolerance, abs=tolerance), name


def loaded(folder):
    """Return a function that loads the folder's model anew, and its tokenizer."""
    words = AutoTokenizer.from_pretrained(folder)
    words.pad_token, words.chat_template = words.unk_token, None
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), words


@pytest.fixture
def stories(tmp_path):
    """Return a function that loads stories260K, or a random model where that is not, and the tokenizer."""
    return loaded(MODEL if MODEL.is_dir() else toy.model(tmp_path / "model", letters=WORDS))


@pytest.fixture
def small(tmp_path):
    """Return a function that loads a random model whose tokens are WORDS, and its tokenizer."""
    return loaded(toy.model(tmp_path / "model", letters=WORDS))


@slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_twenty_steps_are_the_same(kind, stories, tmp_path):
    make, words = stories
    sampled = kind in ("grpo", "rloo")
    options = {"num_iterations": 2, "beta": 0.04} if sampled else {}
    plain = train(kind, make(), words, tmp_path, 20, **options)
    ours = train(kind, make(), words, tmp_path, 20, fast_trl.fused, **options)
    one, other = plain.record, ours.record
    assert len(one.metrics) == 20
    if sampled:  # their losses pass through 0
        if kind == "grpo":
            assert other.values("grad_norm") == pytest.approx(one.values("grad_norm"), rel=1e-5, abs=0)
        else:  # its ratio is of sums of 16 rounded log-probabilities, and some of its gradients are small differences
            assert far(one.values("grad_norm"), other.values("grad_norm")) < 5e-5
        assert other.values("loss") == pytest.approx(one.values("loss"), rel=1e-5, abs=1e-6)
    else:
        assert other.values("loss") == pytest.approx(one.values("loss"), rel=1e-5, abs=0)
    assert worst_gradient(one, other) < 1e-5
    assert_same_metrics(one, other, 1e-3)
    assert not ours.status.fallbacks and ours.status.answered.total() >= 20, str(ours.status)


@slow
def test_sixteen_bits_are_as_near_as_trls(stories, tmp_path):
    """Under autocast to bfloat16, as TRL trains by default, neither is nearer to float32 than the other."""
    make, words = stories
    exact = train("sft", make(), words, tmp_path, 20).record
    plain = train("sft", make(), words, tmp_path, 20, bf16=True).record
    ours = train("sft", make(), words, tmp_path, 20, fast_trl.fused, bf16=True)
    assert ours.status.answered.total() == 20 and not ours.status.fallbacks
    loss = exact.values("loss")
    assert far(loss, plain.values("loss")) < 0.01 and far(loss, ours.record.values("loss")) < 0.01
    assert far(plain.values("loss"), ours.record.values("loss")) < 2e-3
    assert worst_gradient(exact, ours.record) < max(1.2 * worst_gradient(exact, plain), 0.02)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


VARIANTS = {
    "sft-dft": ("sft", {"loss_type": "dft"}),
    "sft-packing": ("sft", {"packing": True, "max_length": 32}),
    "sft-padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft-accumulation": ("sft", {"gradient_accumulation_steps": 2, "activation_checkpointing": True}),
    "sft-lora": ("sft", {"peft_config": lora}),
    "dpo-lora": ("dpo", {"peft_config": lora}),
    "dpo-losses": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "grpo-cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 2.0, "num_iterations": 2}),
    "grpo-sequence": ("grpo", {"importance_sampling_level": "sequence", "num_iterations": 2}),
    "grpo-entropy": ("grpo", {"entropy_coef": 0.05}),
    "rloo-lora": ("rloo", {"peft_config": lora, "beta": 0.1}),
}


@slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_same(variant, small, tmp_path):
    kind, options = VARIANTS[variant]
    if "peft_config" in options:
        options = options | {"peft_config": options["peft_config"]()}
    make, words = small
    plain = train(kind, make(), words, tmp_path, 3, **options).record
    ours = train(kind, make(), words, tmp_path, 3, fast_trl.fused, **options)
    assert worst_gradient(plain, ours.record) < 1e-5
    assert_same_metrics(plain, ours.record, 1e-4)
    assert ours.status.answered.total() >= 3 and not ours.status.fallbacks


@slow
def test_wpo_is_left_to_trl(small, tmp_path, caplog, monkeypatch, utils):
    """Its weights need the sum of squared probabilities. The reference's log-probabilities are the op's."""
    make, words = small
    plain = train("dpo", make(), words, tmp_path, 3, use_weighting=True)
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        ours = train("dpo", make(), words, tmp_path, 3, fast_trl.fused, use_weighting=True)
    assert worst_gradient(plain.record, ours.record) < 1e-5
    # A reward is the difference of the two: at the first step 0 but for rounding, so that its sign is any.
    assert_same_metrics(plain.record, ours.record, 1e-4, (*SCHEDULE, "rewards/accuracies"))
    ((reason, count),) = ours.status.fallbacks.items()
    assert "log_sum_sq_probs" in reason and count == 3 and ours.status.answered.total() == 3
    assert [record.getMessage() for record in caplog.records if record.name == "rlhf_fast"] == [
        f"trl calls its own {reason}"
    ]
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"RLHF_FAST_STRICT=1 and trl calls its own .* log_sum_sq_probs"):
        train("dpo", make(), words, tmp_path, 1, fast_trl.fused, use_weighting=True)
    assert not isinstance(utils._ChunkedLogProbFunction, fast_trl.Fused)


CASES = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "scale": {"scale": 0.25, "temperature": 1.3, "bias": True},
    "softcap": {"softcap": 3.0, "scale": 2.0, "temperature": 0.8, "outputs": ("entropy", "is_top1")},
    "softcap 0": {"softcap": 0.0, "outputs": ("entropy",)},
    "log p alone": {"outputs": ("log_probs",)},
    "no rows": {"rows": 0},
    # Without is_top1: TRL rounds logits to 16 bits, which makes ties.
    "bfloat16": {"dtype": torch.bfloat16, "bias": True, "outputs": ("entropy", "mean_logits")},
    "float32 head": {"dtype": torch.bfloat16, "hidden_dtype": torch.float32},
}


def apply(function, inputs, case):
    """Return the outputs of the function and the gradients of its inputs under fixed gradients of log p and entropy."""
    given = [None if x is None else x.clone().requires_grad_() for x in inputs[:3]]
    out = function.apply(
        *given, inputs[3], case.get("temperature", 1.0), 16, case.get("softcap"), case.get("scale", 1.0),
        case.get("outputs", ("log_probs", "entropy", "mean_logits", "is_top1")),
    )  # fmt: skip
    weights = torch.linspace(-1, 2, len(inputs[3]))
    sum((x * weights).sum() * (i + 1) for i, x in enumerate(out[:2]) if x is not None).backward()
    return out, [None if x is None else x.grad for x in given]


@slow
@pytest.mark.parametrize("name", CASES)
def test_each_output_is_trls(name, utils):
    case = CASES[name]
    dtype = case.get("dtype", torch.float32)
    n, d, v = case.get("rows", 19), 24, 57
    inputs = [torch.randn(n, d, dtype=case.get("hidden_dtype", dtype)), torch.randn(v, d, dtype=dtype) / 3]
    inputs += [torch.randn(v, dtype=dtype) if case.get("bias") else None, torch.randint(v, (n,))]
    inputs[3][::2] = (inputs[0].float() @ inputs[1].float().T)[::2].argmax(-1)  # some of the likeliest tokens
    plain, plain_grads = apply(utils._ChunkedLogProbFunction, inputs, case)
    upcast = [x if x is None or x.dtype == torch.int64 else x.float() for x in inputs]
    exact, exact_grads = apply(utils._ChunkedLogProbFunction, upcast, case)  # TRL's, which rounds in 16 bits
    with fast_trl.fused() as handle:
        ours, our_grads = apply(utils._ChunkedLogProbFunction, inputs, case)
    assert handle.status.answered == {"ChunkedLogProbFunction": 1} and not handle.status.fallbacks
    found = zip((*plain, *plain_grads), (*ours, *our_grads), (*exact, *exact_grads), strict=True)
    for one, other, true in found:
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, other.requires_grad)
            assert other.isfinite().all()
            one, other, true = one.float().detach(), other.float().detach(), true.float().detach()
            assert far(true, other) <= 1.5 * far(true, one) + 2e-6
    assert name != "plain" or 0 < plain[4].sum() < n


@slow
def test_products_are_in_the_dtype_of_autocast(utils):
    inputs = [torch.randn(19, 24), torch.randn(57, 24), torch.randn(57), torch.randint(57, (19,))]
    rounded = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    with fast_trl.fused():
        expected, _ = apply(utils._ChunkedLogProbFunction, rounded, {})
        with torch.autocast("cpu", torch.bfloat16):
            found, grads = apply(utils._ChunkedLogProbFunction, inputs, {})
    for one, other in zip(expected, found, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert all(grad.dtype == torch.float32 for grad in grads)


@slow
def test_a_tie_is_a_hit_whichever_token_comes_first(utils):
    inputs = [torch.ones(2, 4), torch.ones(3, 4), None, torch.tensor([0, 2])]
    assert apply(utils._ChunkedLogProbFunction, inputs, {})[0][4].tolist() == [True, False]
    with fast_trl.fused():
        assert apply(utils._ChunkedLogProbFunction, inputs, {})[0][4].tolist() == [True, True]


def scored(model, ids, labels):
    """Return the log-probabilities and the gradients that TRL's forward pass gives."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    out.log_probs.sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@slow
def test_only_rows_with_a_label_reach_the_head(small, utils, monkeypatch):
    """A batch without a label gives a differentiable 0."""
    model, ids = small[0](), torch.randint(3, 15, (2, 8))
    utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    labels = torch.where(torch.rand(2, 8) < 0.5, ids, -100)
    labels[0, :4], labels[1, :] = ids[0, :4], -100
    plain, plain_grads = scored(model, ids, labels)
    rows, score = [], LinearHead.logprobs
    monkeypatch.setattr(LinearHead, "logprobs", lambda head, *given: rows.append(len(given[0])) or score(head, *given))
    with fast_trl.fused():
        ours, grads = scored(model, ids, labels)
        assert rows == [int((labels[:, 1:] != -100).sum())] and rows[0] < 14
        for name in ("log_probs", "entropy", "mean_logits"):
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.is_top1, plain.is_top1) and torch.equal(ours.label_mask, plain.label_mask)
        assert all(far(grad, grads[name]) < 1e-5 for name, grad in plain_grads.items())
        nothing, grads = scored(model, ids, torch.full_like(ids, -100))
    assert not nothing.log_probs.any() and nothing.loss == 0
    assert not any(grad.any() for grad in grads.values())


@slow
def test_the_mean_logit_under_a_soft_cap_is_left_to_trl(utils):
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=20, final_logit_softcapping=0.1, **shape, **heads))
    utils.add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
    ids = torch.randint(20, (1, 6))
    plain, plain_grads = scored(model, ids, ids)
    with fast_trl.fused() as handle:
        ours, grads = scored(model, ids, ids)
    assert list(handle.status.fallbacks.values()) == [1] and not handle.status.answered
    assert "soft cap" in str(handle.status)
    torch.testing.assert_close(ours.mean_logits, plain.mean_logits)
    assert all(far(grad, grads[name]) < 1e-5 for name, grad in plain_grads.items())


def test_the_module_is_found_by_its_package():
    from rlhf_fast import integrations

    assert integrations.trl is fast_trl and "trl" in integrations.__all__


@slow
def test_trl_is_put_back(utils):
    before = utils._ChunkedLogProbFunction, utils._use_triton
    handle = fast_trl.fused()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) != before
    with pytest.raises(UserError, match="trl is fused already: end that"):
        fast_trl.fused()
    assert utils._ChunkedLogProbFunction is handle
    handle.remove()
    handle.remove()
    with pytest.raises(UserError, match=r"this handle of trl\.fused was removed"), handle:
        pass
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    with pytest.raises(KeyError), fast_trl.fused():
        assert utils._use_triton(torch.device("cpu"))
        raise KeyError
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


@slow
def test_what_somebody_else_replaced_stays(utils):
    names = "_ChunkedLogProbFunction", "_use_triton"
    before = [getattr(utils, name) for name in names]
    for name in names:
        other, handle = object(), fast_trl.fused()
        setattr(utils, name, other)
        handle.remove()
        after = [getattr(utils, each) for each in names]
        for each, value in zip(names, before, strict=True):
            setattr(utils, each, value)
        assert after == [other if each == name else value for each, value in zip(names, before, strict=True)]


@slow
def test_a_block_without_a_call_is_warned_of(utils, caplog):
    inputs = [torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([0, 2, 1])]
    with caplog.at_level(logging.WARNING, fast_trl.__name__):
        with fast_trl.fused():
            apply(utils._ChunkedLogProbFunction, inputs, {})
        assert not caplog.records
        handle = fast_trl.fused()
        handle.remove()
        handle.remove()
    assert [record.getMessage() for record in caplog.records] == [
        f"no trainer of TRL's scored tokens while trl was fused: of trl {INSTALLED} only trainers that call"
        " add_fused_lm_head do"
    ]


@pytest.mark.parametrize(
    ("file", "before", "after", "fault"),
    [
        ("trainer/utils.py", "_ChunkedLogProbFunction.apply(", "other(", r"add_fused_lm_head has no `_Chunked"),
        ("trainer/utils.py", "def add_fused_lm_head", "def fuse_lm_head", "has no add_fused_lm_head"),
        ("kernels/chunked_logprob.py", "class ChunkedLogProbFunction", "class Other", "has no ChunkedLogProbFunction"),
    ],
)
def test_a_moved_hook_is_refused(file, before, after, fault, monkeypatch):
    tree = hooks._tree
    source = ast.unparse(tree("trl", f"trl/{file}"))
    assert before in source
    other = ast.parse(source.replace(before, after))
    monkeypatch.setattr(hooks, "_tree", lambda lib, name: other if name == f"trl/{file}" else tree(lib, name))
    with pytest.raises(
        UserError, match=rf"^trl {re.escape(INSTALLED)}: trl/{file}:? .*{fault}.*: install trl==1\.16\.0$"
    ):
        fast_trl.fused()


class OtherSignature(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        return hidden


@slow
@pytest.mark.parametrize(
    ("found", "function", "sentence"),
    [
        (None, ..., r"trl is not installed: pip install trl=="),
        ("1.14.2", ..., r"trl 1\.14\.2 has no .*install trl==1\.16\.0, or .*lazy_head\(model\)"),
        ("0.29.1", ..., r"trl 0\.29\.1 has no"),
        (
            "2.0.0",
            OtherSignature,
            r"trl 2\.0\.0: .*takes \(ctx, hidden, weight, targets, temperature\), not \(ctx, .*1\.16",
        ),
        ("1.15.0", None, r"trl 1\.15\.0: .*_ChunkedLogProbFunction is not there"),
    ],
)
def test_another_trl_is_refused(found, function, sentence, monkeypatch, utils):
    monkeypatch.setattr(fast_trl, "library_version", lambda library: found)
    if function is not ...:
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", function)
    before = utils._ChunkedLogProbFunction, utils._use_triton
    with pytest.raises(UserError, match=sentence):
        fast_trl.fused()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


@pytest.mark.parametrize("hook", fast_trl.HOOKS, ids=lambda hook: f"{hook.file}:{hook.name}")
def test_what_the_integration_stands_on_is_there(hook):
    """This fails first where a new trl has moved something."""
    assert hooks.moved(hook) == ""


@slow
@pytest.mark.skipif(
    "RLHF_FAST_TRL_PPO" not in os.environ, reason="RLHF_FAST_TRL_PPO names no folder that holds trl 1.12"
)
def test_ppo_of_trl_1_12_under_lazy_head(tmp_path):
    """Three updates of the last PPOTrainer, in a process of its own. Nothing of TRL is changed."""
    folder = MODEL if MODEL.is_dir() else toy.model(tmp_path / "model", letters=WORDS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["RLHF_FAST_TRL_PPO"], *sys.path])}
    command = [sys.executable, "-W", "ignore", PPO, folder, tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, ours = (SimpleNamespace(**run) for run in json.loads((tmp_path / "found.json").read_text()))
    assert len(plain.metrics) == 3 and plain.version == ours.version and plain.version.startswith("1.12.")
    assert_same_metrics(plain, ours, 2e-4)
    assert far(torch.tensor(plain.weights), torch.tensor(ours.weights)) < 1e-5
    assert far(torch.tensor(plain.start), torch.tensor(plain.weights)) > 1e-3  # the policy was trained
    # 3 batches of 2 epochs; the reference scores each batch once. The policy's generated tokens came with their logits.
    assert plain.counts == [] and ours.counts == [[6, 0], [3, 0]]
