"""verl with the plugin and without: the same numbers. test_verl.py runs this in verl's own environment.

`import verl` loads the plugin by its entry point. What it replaces keeps verl's function as `__wrapped__`.
"""

import __future__

import ast
import sys

import pytest
import torch
import verl  # loads the plugin
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import hooks
from rlhf_fast.integrations import verl as fast

AT_IMPORT = set(sys.modules)

from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental import torch_functional as experimental  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.utils import losses as worker_losses  # noqa: E402

OURS, THEIRS = experimental.FusedLinearForPPO, experimental.FusedLinearForPPO.__mro__[1]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 7, "loss_scale_factor": 11}]
SIZES = {
    "vocab_size": 311, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip


# -- the door ----------------------------------------------------------------------------------------------------------


def test_import_verl_alone_loads_the_plugin():
    assert verl.__version__ == fast.TESTED
    assert "rlhf_fast.integrations.verl_plugin" in AT_IMPORT
    assert not AT_IMPORT & {fast.CORE, fast.HEAD, fast.PATCH, "rlhf_fast.ops"}, "the plugin imported what costs seconds"


def test_all_parts_are_replaced():
    assert OURS.__module__ == "rlhf_fast.integrations.verl_head" and THEIRS.__module__ == fast.HEAD
    for name in ("compute_gae_advantage_return", "compute_value_loss"):
        ours = getattr(core_algos, name)
        assert ours.__code__.co_filename.endswith("verl_losses.py") and ours.__wrapped__.__module__ == fast.CORE
    assert core_algos.get_policy_loss_fn("rlhf_fast").__module__ == "rlhf_fast.integrations.verl_losses"
    assert core_algos.get_policy_loss_fn("vanilla").__module__ == fast.CORE
    assert worker_losses.compute_value_loss is core_algos.compute_value_loss  # taken by name


def test_a_second_install_does_nothing():
    fast.install()
    assert experimental.FusedLinearForPPO is OURS
    assert core_algos.compute_value_loss.__wrapped__.__module__ == fast.CORE


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    torch.manual_seed(0)
    forward = LlamaForCausalLM.forward
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head.weight.data.mul_(20)
    monkey_patch.patch_forward_with_backends(model, True, "torch")
    assert LlamaForCausalLM.forward is not forward
    yield model
    LlamaForCausalLM.forward = forward


def forward_and_backward(model, head, monkeypatch, temperature=0.8, dtype=None):
    monkeypatch.setattr(experimental, "FusedLinearForPPO", head)
    torch.manual_seed(1)
    ids = torch.randint(311, (2, 11))
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(input_ids=ids, return_dict=True, temperature=temperature, use_cache=False)
    assert out.log_probs.dtype == torch.float32
    (out.log_probs * torch.arange(11.0) + 0.3 * out.entropy).sum().backward()
    return out.log_probs.detach(), out.entropy.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("temperature", [0.8, 1.0, torch.tensor([0.8])])
def test_forward_with_torch_backend(llama, monkeypatch, temperature):
    expected = forward_and_backward(llama, THEIRS, monkeypatch, temperature)
    before = fast.status().answered["FusedLinearForPPO"]
    found = forward_and_backward(llama, OURS, monkeypatch, temperature)
    assert fast.status().answered["FusedLinearForPPO"] == before + 1
    for x, y in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for name, grad in expected[2].items():
        assert (found[2][name] - grad).norm() <= 5e-5 * grad.norm() + 1e-8, name


def test_forward_is_the_models_own(llama, monkeypatch):
    """Against the logits of an unpatched model: verl's head is no witness of its own."""
    found = forward_and_backward(llama, OURS, monkeypatch)[0]
    torch.manual_seed(1)
    ids = torch.randint(311, (2, 11))
    logits = llama.lm_head(llama.model(input_ids=ids).last_hidden_state) / 0.8
    expected = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_forward_under_autocast(llama, monkeypatch):
    expected = forward_and_backward(llama, THEIRS, monkeypatch, dtype=torch.bfloat16)
    found = forward_and_backward(llama, OURS, monkeypatch, dtype=torch.bfloat16)
    assert found[1].dtype == expected[1].dtype
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=8e-2)  # verl rounds its logits
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=8e-2)


def test_a_packed_row(llama):
    """hidden (N, D), as VLMs have it after removing padding."""
    hidden, ids = torch.randn(9, 32, requires_grad=True), torch.randint(311, (9,), dtype=torch.int32)
    found, expected = (head()(hidden, llama.lm_head.weight, ids, 1.3) for head in (OURS, THEIRS))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        OURS(impl_backend="none")


def models():
    torch.manual_seed(0)
    gemma = Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=4, final_logit_softcapping=2.0)
    recurrent = RecurrentGemmaConfig(**SIZES, lru_width=32, logits_soft_cap=3.0)
    return {
        r"a soft cap \(final_logit_softcapping=2\.0\)": Gemma2ForCausalLM(gemma),
        r"a soft cap \(logits_soft_cap=3\.0\)": RecurrentGemmaForCausalLM(recurrent),
        "a bias": PhiForCausalLM(PhiConfig(**SIZES)),
        r"a scale \(logit_scale=0\.0625\)": CohereForCausalLM(CohereConfig(**SIZES)),
        r"a scale \(logits_scaling=4\.0\)": GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    }


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("fault", models())
def test_a_head_that_verl_computes_wrongly_is_refused(fault, backend):
    model = models()[fault]
    forward = type(model).forward
    with pytest.raises(UserError, match=rf"^{type(model).__name__}: its output layer has {fault}, which verl's"):
        monkey_patch.patch_forward_with_backends(model, True, backend)
    with pytest.raises(UserError, match=fault):
        monkey_patch.apply_monkey_patch(
            model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
        )
    monkey_patch.patch_forward_with_backends(model, False, backend)
    assert type(model).forward is forward


def test_verls_head_is_wrong_for_a_soft_cap(monkeypatch):
    """The reason of the refusal, which can go when this fails."""
    model = models()[r"a soft cap \(final_logit_softcapping=2\.0\)"].eval()
    ids = torch.randint(311, (2, 11))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        right = model(input_ids=ids).logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)
        monkeypatch.setattr(type(model), "forward", type(model).forward)
        monkey_patch.patch_forward_with_backends.__wrapped__(model, True, "torch")
        monkeypatch.setattr(experimental, "FusedLinearForPPO", THEIRS)
        theirs = model(input_ids=ids, return_dict=True, use_cache=False).log_probs
    assert (theirs - right).abs().max() > 0.1


# -- GAE and losses ----------------------------------------------------------------------------------------------------


def tokens(spread=0.5):
    torch.manual_seed(2)
    shape = 5, 9
    mask = torch.rand(shape) > 0.3
    mask[3, 3:] = False
    old, advantages = torch.randn(shape) - 3, torch.randn(shape)
    return (old + spread * torch.randn(shape)).requires_grad_(), old, advantages, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (torch.tensor(0.9), 0.0)])
def test_gae(gamma, lam):
    _, values, rewards, mask = tokens()
    given = rewards, values, mask.long(), gamma, lam
    before = fast.status().answered["compute_gae_advantage_return"]
    found = core_algos.compute_gae_advantage_return(*given)
    expected = core_algos.compute_gae_advantage_return.__wrapped__(*given)
    assert fast.status().answered["compute_gae_advantage_return"] == before + 1
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-4, atol=1e-5)
        assert x.dtype == y.dtype and not x.requires_grad


def trainers_compute_advantage():
    """Return the function of the trainer's module, which imports what serves models."""
    tree = hooks._find(hooks._tree("verl", "verl/trainer/ppo/ray_trainer.py"), "compute_advantage")
    space = {"core_algos": core_algos, "AdvantageEstimator": core_algos.AdvantageEstimator}
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module([tree], []), "verl/trainer/ppo/ray_trainer.py", "exec", flags), space)
    return space["compute_advantage"]


def test_gae_by_the_trainer():
    _, values, rewards, mask = tokens()
    expected = core_algos.compute_gae_advantage_return.__wrapped__(rewards, values, mask.long(), 0.99, 0.95)
    data = {"token_level_rewards": rewards, "values": values, "response_mask": mask.long()}
    before = fast.status().answered["compute_gae_advantage_return"]
    data = verl.DataProto.from_dict(data)
    out = trainers_compute_advantage()(data, "gae", gamma=0.99, lam=0.95, config={}).batch
    assert fast.status().answered["compute_gae_advantage_return"] == before + 1
    for x, y in zip((out["advantages"], out["returns"]), expected, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-4, atol=1e-5)


def test_gae_of_no_tokens_is_verls_error():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="At least one element in the mask has to be 1"):
        core_algos.compute_gae_advantage_return(x, x, x.long(), 1.0, 1.0)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("the mask is floating point", {"mask": 0.5}),
        ("gamma or lam is not within", {"gamma": 1.5}),
        ("gamma or lam is not one number", {"lam": torch.full((5,), 0.9)}),
    ],
)
def test_gae_that_stays_theirs(reason, changes, caplog):
    _, values, rewards, mask = tokens()
    mask = mask * changes.get("mask", 1)
    given = rewards, values, mask, changes.get("gamma", 0.9), changes.get("lam", 0.9)
    found = core_algos.compute_gae_advantage_return(*given)
    expected = core_algos.compute_gae_advantage_return.__wrapped__(*given)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert reason in caplog.text and any(reason in text for text in fast.status().fallbacks)


def config(totals, **options):
    made = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    made.global_batch_info.update(totals)
    return made


def run_policy_loss(name, mode, config, weights=None, spread=0.5):
    new, old, advantages, mask = tokens(spread)
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, loss_agg_mode=mode, config=config,
        rollout_is_weights=weights,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), new.grad, metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.4}])
@pytest.mark.parametrize("spread", [0.5, 2.0, 25.0])  # the last is beyond the clamp of the log-ratio
def test_policy_loss(mode, totals, weighted, options, spread):
    made = config(totals, **options)
    weights = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) if weighted else None
    expected = run_policy_loss("vanilla", mode, made, weights, spread)
    found = run_policy_loss("rlhf_fast", mode, made, weights, spread)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    assert found[1].any()
    assert found[2].keys() == expected[2].keys()
    assert found[2] == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected[2].items()}


def test_rejected_tokens_and_nan_outside_the_mask():
    made, (_, _, _, mask) = config({}), tokens()
    weights = torch.where(mask, 2.0, torch.nan)
    weights[0] = 0
    expected = run_policy_loss("vanilla", "token-mean", made, weights.nan_to_num())
    found = run_policy_loss("rlhf_fast", "token-mean", made, weights)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-7)


def test_verls_own_errors_of_aggregation_stay():
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        run_policy_loss("rlhf_fast", "mean", config({}))
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        run_policy_loss("rlhf_fast", "token-mean", config({"dp_size": 2}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("clip", [0.2, 0.6, 0.0])
def test_value_loss(mode, totals, clip):
    def run(function):
        new, old, returns, mask = tokens()
        loss, clipped = function(new, returns, old, mask, clip, mode, **totals)
        loss.backward()
        return loss.detach(), new.grad, clipped

    expected, found = run(core_algos.compute_value_loss.__wrapped__), run(core_algos.compute_value_loss)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)
    assert found[1].any()
    assert clip == 0 or 0 < expected[2] < 1


def test_no_tokens_have_no_metrics():
    made, x = config({}), torch.zeros(2, 3, requires_grad=True)
    for name in ("vanilla", "rlhf_fast"):
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            x, x, x.detach(), torch.zeros(2, 3).bool(), "token-sum", made
        )
        assert loss == 0 and set(metrics.values()) == {0.0}
    assert core_algos.compute_value_loss(x, x, x, torch.zeros(2, 3).bool(), 0.2, "token-sum")[1] == 0


@pytest.mark.parametrize("hook", fast.HOOKS, ids=lambda hook: f"{hook.file}:{hook.name}")
def test_hooks_stand(hook):
    assert hooks.moved(hook) == ""
