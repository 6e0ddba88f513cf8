"""`exact`: the log-probabilities of a training step are those of the rollout to the bit, for every family and dtype, in
any batch and micro-batch."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import toy
from architectures import GPT, SMALL, build, halved, prompts, sampling
from test_fused import MODELS
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import _cpu_head, _product
from rlhf_fast.kernels._backends import COMPILED, forcing
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import compiled_step
from rlhf_fast.rollout.exact import make_exact
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages import ppo
from rlhf_fast.stages.fit import check_fit
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import ppo_policy_loss
from rlhf_fast.training.micro_batches import micro_batches

pytestmark = pytest.mark.skipif(compiled_step.find_kernels() is None, reason="no compiled kernels for this processor")
LENGTHS = (1, 7, 3, 12, 30)


def exact_model(make, dtype=torch.float32) -> Model:
    model = Model(make().to(dtype))
    make_exact(model)
    return model


def sampled(model: Model, batch: int = 4, given: Prompts | None = None, **settings) -> Responses:
    """Return three responses to each prompt: those of one prompt share it in the training pass."""
    rollout = Rollout(model, sampling(max_new_tokens=20, batch=batch, **settings), decode_path="fused")
    return rollout.generate(given or prompts(*LENGTHS), samples=3)


def trained(model: Model, responses: Responses, budget: int, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities (B, R) of a training pass in micro-batches of `budget` tokens, with gradients."""
    found = torch.full_like(responses.logprobs, torch.nan)
    for index, part in micro_batches(responses, budget, packed=True):
        logprobs, _ = model.logprobs(
            part.tokens, part.prompt_lengths, part.lengths, temperature, sampled_tokens_only=True
        )
        assert logprobs.requires_grad
        found[index, : logprobs.shape[1]] = logprobs.detach()
    return found


# GPT-2's sums over inputs are those of chains of 128.
SEVERAL_CHAINS = {"gpt2 of width 160": build("GPT2", GPT, n_embd=160, initializer_range=0.06)}


@pytest.mark.parametrize("name", [*MODELS, *SEVERAL_CHAINS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.exhaustive(18)
def test_logprobs_are_the_rollouts(name, dtype):
    model = exact_model((MODELS | SEVERAL_CHAINS)[name], dtype)
    responses = sampled(model)
    mask = responses.mask
    for budget in (40, 100_000):
        found = trained(model, responses, budget)
        assert torch.equal(found[mask], responses.logprobs[mask]), (found - responses.logprobs)[mask].abs().max()


def test_without_it_they_differ():
    """The other tests would pass too if nothing but rounding to few digits were compared."""
    model = Model(MODELS["llama 8/2 heads of 128"]().bfloat16())
    responses = sampled(model)
    assert not torch.equal(trained(model, responses, 100)[responses.mask], responses.logprobs[responses.mask])


@pytest.mark.parametrize("name", ["qwen3 4/2 heads of 80", "gpt2, odd widths", "mistral, window 5"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 products"])
def test_threads_batches_and_temperatures(name, kind, monkeypatch):
    monkeypatch.setattr(compiled_step, "MIN_NANOSECONDS_TO_THREAD", 0)  # always use threads
    if kind == "bfloat16 products":
        monkeypatch.setattr(_product, "BF16_DOT", 2)
        monkeypatch.setattr(_cpu_head, "MIN_BF16_WEIGHT", 0)
    model = exact_model(MODELS[name], torch.float32 if kind == "float32" else torch.bfloat16)
    given = prompts(*LENGTHS)
    responses, alone = (sampled(model, batch, given, temperature=0.7) for batch in (15, 1))
    mask, threads = responses.mask, torch.get_num_threads()
    assert torch.equal(responses.logprobs[mask], alone.logprobs[mask])
    try:
        for count, budget in ((1, 1), (3, 64), (2, 1000)):
            torch.set_num_threads(count)
            assert torch.equal(trained(model, responses, budget, 0.7)[mask], responses.logprobs[mask])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [backend for backend in COMPILED if backend.startswith("cpu:avx")])
@pytest.mark.parametrize("name", ["llama 3/1 heads of 80, tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(backend, name, dtype):
    with forcing(backend):
        model = exact_model(MODELS[name], dtype)
        responses = sampled(model)
        found = trained(model, responses, 100)
    assert torch.equal(found[responses.mask], responses.logprobs[responses.mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ppo_starts_with_a_ratio_of_one(dtype):
    """The metrics of a run's first step, before and after the weights have changed."""
    cfg = PPOConfig(batch=15, minibatch=15)
    policy = exact_model(build("Llama", hidden_size=48), dtype)
    reference, value = copy.deepcopy(policy), Model(build_value().to(dtype), head="scalar")
    make_exact(value)
    learner = Learner(policy, replace(cfg.optim, lr=1e-2), total_steps=10)
    for step in range(2):
        responses = sampled(policy)
        experience, stats = make_experience(
            responses, policy, reference, value, lambda r: torch.randn(len(r.lengths)), cfg
        )
        assert (stats["objective/kl"] == 0) == (step == 0), "the reference has the policy's first weights"
        loss = partial(ppo_policy_loss, measure_gap=True)
        stats = learner.step([(loss, experience, 1.0)])
        assert stats["rollout/gap_max"] == stats["rollout/gap_mean"] == 0
        assert stats["val/ratio_max"] == stats["val/ratio_min"] == 1 and stats["policy/approxkl_avg"] == 0


def build_value(**changes):
    config = LlamaConfig(**{**SMALL, **changes}, num_labels=1)
    config.pad_token_id = 0
    return LlamaForSequenceClassification(config)


def loss_weights(length: int) -> torch.Tensor:
    return torch.linspace(-1, 1, length)


def true_gradients(model: Model, responses: Responses) -> dict[str, torch.Tensor]:
    """Return the gradients of the weighted log-probabilities in a float64 copy of transformers' module."""
    module = copy.deepcopy(model.module).double()
    logprobs = module(input_ids=responses.tokens).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, responses.tokens[:, 1:, None])[..., 0]
    weights = loss_weights(responses.logprobs.shape[1])
    rows = zip(logprobs, responses.prompt_lengths, responses.lengths, strict=True)
    sum((row[start - 1 : end - 1] * weights[: end - start]).sum() for row, start, end in rows).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("name", ["llama 8/1 heads of 96, biases", "qwen3 4/2 heads of 80", "gpt2", "llama, gelu"])
def test_gradients_are_true_with_and_without_it(name, dtype, tolerance):
    plain = Model(halved(MODELS[name]()).to(dtype))
    model = copy.deepcopy(plain)
    make_exact(model)
    responses = sampled(model)
    truth = true_gradients(plain, responses)
    largest = max(float(expected.norm()) for expected in truth.values())
    for one in (plain, model):
        logprobs, _ = one.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths)
        (logprobs * loss_weights(logprobs.shape[1])).sum().backward()
        found = {key: parameter.grad.double() for key, parameter in one.trainable().items()}
        assert found.keys() == truth.keys()
        for key, expected in truth.items():
            error = float((found[key] - expected).norm())
            assert error <= tolerance * max(float(expected.norm()), 0.01 * largest), (one.exact, key, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_longer_than_a_split_of_the_keys(dtype):
    """More than the 64 tokens of a prefill's block, and than the 256 keys of an attention's split."""
    model = exact_model(build("Llama", max_position_embeddings=400, tie_word_embeddings=True), dtype)
    responses = sampled(model, 4, prompts(300, 255, 64))
    found = trained(model, responses, 1000)
    assert torch.equal(found[responses.mask], responses.logprobs[responses.mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_scores_do_not_depend_on_the_micro_batch(dtype):
    value = Model(build_value(hidden_size=96, initializer_range=0.05).to(dtype), head="scalar")
    make_exact(value)
    responses = sampled(Model(build("Llama")()))
    for find in (value.values, lambda tokens, prompts, lengths: value.last_scores(tokens, lengths, prompts)[:, None]):
        whole = find(responses.tokens, responses.prompt_lengths, responses.lengths)
        for budget in (1, 60, 300):
            for index, part in micro_batches(responses, budget, packed=True):
                found = find(part.tokens, part.prompt_lengths, part.lengths)
                assert torch.equal(found, whole[index, : found.shape[1]])


def test_a_stage_has_no_gap(folder):
    """The setting reaches the models of a run, and its log."""
    ppo.run(toy.ppo(folder, exact=True, episodes=2 * 16))
    rows = toy.metrics(folder / "ppo")
    assert len(rows) == 2 and [row["rollout/gap_max"] for row in rows] == [0, 0]
    assert [row["val/ratio_first"] for row in rows] == pytest.approx([1, 1], abs=1e-6)  # a mean
    with_adapter = replace(toy.ppo(folder).policy, lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="exact must be false with an adapter"):  # before any stage of a recipe
        toy.ppo(folder, "other", exact=True, policy=with_adapter)


def test_a_recipe_is_refused_before_its_first_stage(folder):
    with forcing("reference"), pytest.raises(UserError, match="ppo: exact cannot be set, because it needs compiled"):
        check_fit(toy.ppo(folder, exact=True), [toy.sft(folder)])


def test_it_refuses_what_it_cannot_repeat():
    model = Model(build("Llama")())
    with (
        forcing("reference"),
        pytest.raises(UserError, match="exact cannot be set, because it needs compiled kernels with AVX2"),
    ):
        make_exact(model)
    assert not model.exact
    with pytest.raises(UserError, match=r"weights are torch\.float16"):
        make_exact(Model(build("Llama")().half()))
    with pytest.raises(UserError, match=r"the decode path fused \(docs/rollouts.md\) does not serve it"):
        make_exact(Model(build("Gemma", head_dim=8)()))
    model.module = lora.attach(model.module, LoraConfig(rank=2), "lm", 0)
    with pytest.raises(UserError, match="it has an adapter"):
        make_exact(model)
    assert not model.exact


def test_a_model_that_is_changed_later_is_refused():
    model = exact_model(MODELS["llama 4/4 heads of 64"])
    responses = sampled(model)
    tokens = (responses.tokens, responses.prompt_lengths, responses.lengths)
    hook = model.decoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="a pass cannot be exact, because its modules have hooks"):
        model.logprobs(*tokens)
    hook.remove()
    with forcing("reference"), pytest.raises(UserError, match="a pass cannot be exact"):
        model.logprobs(*tokens)
    with pytest.raises(UserError, match="exact needs the compiled step of the decode path fused"):
        Rollout(model, sampling(), decode_path="attention")
    model.module.half()
    with pytest.raises(UserError, match="a pass cannot be exact"):
        model.logprobs(*tokens)
    with pytest.raises(UserError, match="exact cannot be set"):
        make_exact(model)
    assert not model.exact
