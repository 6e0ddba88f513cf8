"""Rollouts, PPO and the stages on a GPU. Every test also runs on the CPU, where its code is tried without one.

What is promised on a GPU: the same call gives the same bits. Of another batch a row's tokens are the same in float32,
up to ties within rounding, but not its bits: cuBLAS sums in another order for another number of rows. A run that is
resumed goes on from the saved state to the bit; its later steps may round otherwise, because some of torch's backward
kernels add in any order.
"""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import toy
import transformers
from architectures import GPT, SMALL, build, greedy, prompts, prompts_without_ties, sampling

from rlhf_fast.batches import Experience, Prompts, Responses, Texts, pad_rows
from rlhf_fast.config.fields import KLConfig, ModelConfig, OptimConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run import checkpoint, memory
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
for_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = SMALL | {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 128,
    "initializer_range": 0.1,
}  # fmt: skip
GPT_SHAPE = GPT | {"n_embd": 128, "n_layer": 3, "n_positions": 128, "initializer_range": 0.1}
MODELS = {
    "llama": build("Llama", SHAPE),
    "llama, one head of keys": build("Llama", SHAPE, hidden_size=64, head_dim=16, num_key_value_heads=1),
    "mistral, window 6": build("Mistral", SHAPE, sliding_window=6),
    "qwen2": build("Qwen2", SHAPE, num_attention_heads=2),
    "qwen3": build("Qwen3", SHAPE, head_dim=64),
    "gpt2": build("GPT2", GPT_SHAPE),
    "gpt_neox": build("GPTNeoX", SHAPE, num_attention_heads=2, rotary_pct=0.5),
}  # fmt: skip
"""Heads of 16, 32 and 64. The longest prompts and responses cross the end of a page of 64 positions."""
LENGTHS = (1, 60, 7, 70, 12)
TOLERANCE = 1e-4
"""Nats, in float32."""
for_each_model = pytest.mark.parametrize("name", MODELS)


def model_on(device: str, name: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return Model(MODELS[name]().to(device, dtype))


def scorer_on(device: str) -> Model:
    config = transformers.LlamaConfig(**SHAPE, num_labels=1)
    return Model(transformers.LlamaForSequenceClassification(config).to(device), head="scalar")


# Rollouts


@on_each_device
@for_each_model
@pytest.mark.parametrize("decode_path", ["fused", "attention"])
@pytest.mark.exhaustive(12)
def test_greedy_is_transformers_generate(device, name, decode_path):
    """Prompts of different lengths in one batch, each against generate() alone."""
    model = model_on(device, name)
    batch = prompts_without_ties(model.module, *LENGTHS)
    found = Rollout(model, sampling(temperature=0.0), decode_path=decode_path).generate(batch)
    assert found.response_ids() == [greedy(model.module, tokens) for tokens in batch.tokens]
    assert all(field.device.type == "cpu" for field in found)


@on_each_device
@for_each_model
@for_each_dtype
@pytest.mark.parametrize("decode_path", ["fused", "attention", "transformers"])
@torch.no_grad()
@pytest.mark.exhaustive(30)
def test_logprobs_are_those_of_one_forward_pass(device, name, dtype, decode_path):
    """The ratio of the first PPO step is 1. In bfloat16 the layers round, by a few 1e-2 nats."""
    model = model_on(device, name, dtype)
    cfg = sampling(temperature=0.7, top_k=20)
    responses = Rollout(model, cfg, decode_path=decode_path).generate(prompts(*LENGTHS), samples=3)
    ours, entropy = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths, 0.7)
    for one, other in ((responses.logprobs, ours), (responses.entropy, entropy)):
        gap = (one - other.cpu())[responses.mask].abs()
        if dtype == torch.float32:
            assert gap.max() < TOLERANCE
        else:
            assert gap.mean() < 0.05 and gap.max() < 0.7


@on_each_device
@for_each_dtype
@pytest.mark.parametrize("decode_path", ["fused", "attention"])
def test_the_same_call_gives_the_same_bits(device, dtype, decode_path):
    """By a new rollout and by one that has its cache from the last call."""
    model, batch = model_on(device, "qwen3", dtype), prompts(*LENGTHS)
    found = []
    for rollout in (Rollout(model, sampling(), 3, decode_path=decode_path, keep_cache=True) for _ in range(2)):
        found += [rollout.generate(batch, samples=2) for _ in range(2)]
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, found[0], strict=True))


@on_each_device
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "min_p": 0.01}, {"min_new_tokens": 3}], ids=str)
def test_a_row_has_the_same_tokens_in_any_batch(device, filters):
    """float32, batches of 1, 3 with refilled slots, and 8; on a GPU the log-probabilities may round otherwise."""
    model, batch, cfg = model_on(device), prompts(*LENGTHS, 5, 33), sampling(**filters)
    whole = Rollout(model, replace(cfg, batch=8), 3).generate(batch, samples=2)
    for size in (1, 3):
        found = Rollout(model, replace(cfg, batch=size), 3).generate(batch, samples=2)
        assert found.response_ids() == whole.response_ids()
        torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=0, atol=TOLERANCE)


@NO_GPU
def test_cuda_samples_the_tokens_of_the_cpu():
    """The sampling noise is the same on a GPU and on a CPU."""
    model, batch = model_on("cuda"), prompts(*LENGTHS)
    found = []
    for device in ("cuda", "cpu"):
        model.module.to(device)
        found.append(Rollout(model, sampling(), 3).generate(batch, samples=2))
    assert found[0].response_ids() == found[1].response_ids()
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=0, atol=TOLERANCE)


# PPO

PPO = PPOConfig(
    kl=KLConfig(coef=0.1),
    sampling=sampling(),
    optim=OptimConfig(lr=1e-3, schedule="constant", micro_batch_tokens=200),
    value_optim=OptimConfig(lr=1e-3, schedule="constant", micro_batch_tokens=200),
    batch=10,
    minibatch=5,
    inner_epochs=1,
)  # fmt: skip


def share_of_even_tokens(responses: Responses) -> torch.Tensor:
    return (responses.tokens % 2 == 0).float().mean(1)


def collect(policy: Model, value: Model, batch: Prompts) -> tuple[Experience, dict[str, float]]:
    """Return the experience of one rollout, with the policy as its own reference."""
    responses = Rollout(policy, PPO.sampling, 3).generate(batch, samples=2)
    return make_experience(responses, policy, policy, value, share_of_even_tokens, PPO)


def update(policy: Model, value: Model, experience: Experience) -> dict[str, float]:
    """Take the steps of one batch: two minibatches, by both learners."""
    learners = Learner(policy, PPO.optim, 10, ema=0.9), Learner(value, PPO.value_optim, 10)
    return ppo.ppo_update(ppo.State(*learners, KLController(PPO.kl), None), experience, None, PPO, step=0)


def weights(model: Model) -> torch.Tensor:
    """Return all trained weights in one vector."""
    return torch.cat([p.detach().cpu().float().flatten() for p in model.trainable().values()])


@on_each_device
def test_a_ppo_step_is_that_of_the_cpu(device):
    """Experience, statistics and weights. Adam's step of a weight whose gradient is near 0 depends on rounding, so that
    the moves are compared as a whole."""
    ours = model_on(device), scorer_on(device)
    theirs = copy.deepcopy(ours)
    for model in theirs:
        model.module.cpu()
    batch = prompts(*LENGTHS)
    experience, stats = collect(*ours, batch)
    expected, expected_stats = collect(*theirs, batch)
    assert stats == pytest.approx(expected_stats, rel=1e-3, abs=1e-3)
    for one, other in zip(experience, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    before = [weights(model) for model in ours]
    stats, expected_stats = update(*ours, experience), update(*theirs, experience)
    assert stats == pytest.approx(expected_stats, rel=1e-3, abs=1e-4)
    assert stats["val/ratio_first"] == pytest.approx(1, abs=TOLERANCE)
    for mine, other, start in zip(ours, theirs, before, strict=True):
        move = (weights(other) - start).norm()
        assert move > 0.1
        assert (weights(mine) - weights(other)).norm() < 0.02 * move


@on_each_device
def test_a_bfloat16_policy_takes_ppo_steps(device):
    """It has float32 master weights. The ratio of the first minibatch is 1 up to the rounding of bfloat16."""
    policy, value = model_on(device, dtype=torch.bfloat16), scorer_on(device)
    before = weights(policy)
    stats = update(policy, value, collect(policy, value, prompts(*LENGTHS))[0])
    assert all(math.isfinite(number) for number in stats.values())
    assert stats["val/ratio_first"] == pytest.approx(1, abs=0.05)
    assert not torch.equal(weights(policy), before)


@on_each_device
def test_a_checkpoint_restores_a_learner_and_the_generators_to_the_bit(device, tmp_path):
    def states(learner: Learner) -> dict[str, torch.Tensor]:
        saved = learner.state_dict()
        adam = {f"adam {name} {key}": x for name, part in saved["adam"].items() for key, x in part.items()}
        return {**saved["weights"], **{f"ema {name}": x for name, x in saved["ema"].items()}, **adam}

    texts = Texts(*pad_rows([row * 2 for row in prompts(*LENGTHS[1:]).tokens[:3]]))
    optim = OptimConfig(lr=1e-3, schedule="constant")
    first, second = (Learner(model_on(device), optim, 10, ema=0.9) for _ in range(2))
    first.step([(pretrain_loss, texts, 1.0)])
    checkpoint.save(tmp_path, 1, {"learner": first.state_dict(), "random": checkpoint.random_states()})
    drawn = torch.randn(5, device=device)
    saved = checkpoint.load(tmp_path / "step_1")
    second.load_state_dict(saved["learner"])
    checkpoint.restore_random_states(saved["random"])
    assert torch.equal(torch.randn(5, device=device), drawn)
    ours, theirs = states(second), states(first)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].device == tensor.device and torch.equal(ours[name], tensor), name
    for learner in (first, second):
        learner.step([(pretrain_loss, texts, 1.0)])
    torch.testing.assert_close(weights(second.model), weights(first.model), rtol=0, atol=1e-4)


# Stages


@on_each_device
def test_peak_memory_is_that_of_the_device_in_use(device):
    if device == "cpu" and torch.cuda.is_initialized():
        pytest.skip("this process has used the GPU, whose peak is then reported")
    memory.reset_peak_memory()
    taken = torch.ones(2**24, device=device)
    assert memory.peak_memory() >= taken.nbytes


@on_each_device
def test_sft_and_reward_run(folder, device):
    """SFT with residual dropout and packed rows; a reward model that then scores as plain transformers does."""
    sft.run(toy.sft(folder, device=device, epochs=1))
    reward.run(toy.reward(folder, device=device, epochs=1, model=ModelConfig(str(folder / "sft"))))
    for stage, name in (("sft", "loss/sft"), ("reward", "loss/reward")):
        losses = [row[name] for row in toy.rows(folder / stage / "metrics.jsonl")]
        assert len(losses) >= 4 and all(math.isfinite(loss) for loss in losses)
    assert not toy.same_weights(folder / "sft", folder / "model")
    sample = toy.rows(folder / "reward/samples.jsonl")[-1]
    assert all(math.isfinite(score) for score in sample["scores"])


@on_each_device
def test_ppo_is_interrupted_and_resumed(folder, device, monkeypatch):
    """With a reward model, PPO-ptx, a moving average and validation. The first step after the checkpoint is that of an
    uninterrupted run."""
    reward.run(toy.reward(folder, device=device, epochs=1))
    settings = {"device": device, "reward": str(folder / "reward"), "episodes": 4 * 16}
    ppo.run(toy.ppo(folder, "whole", **settings))
    ppo_update = ppo.ppo_update

    def interrupted(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return ppo_update(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "ppo_update", interrupted)
        ppo.run(toy.ppo(folder, "resumed", **settings))
    assert (folder / "resumed/checkpoints/step_2").is_dir()
    ppo.run(toy.ppo(folder, "resumed", **settings))
    resumed, whole = (toy.metrics(folder / out) for out in ("resumed", "whole"))
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert all(math.isfinite(number) for row in resumed for number in row.values() if isinstance(number, float))
    assert all(abs(row["val/ratio_first"] - 1) < TOLERANCE for row in resumed)
    assert resumed[2] == pytest.approx(whole[2], rel=0.02, abs=0.02)
    assert not toy.same_weights(folder / "resumed", folder / "model")
    run = json.loads((folder / "resumed/run.json").read_text())
    assert "finished" in run and run["config"]["device"] == device
