"""OpenRLHF's Actor, losses and GAE with `integrations.openrlhf.fused` and without: the same numbers.

test_openrlhf.py runs this in a process of its own, with OpenRLHF's wheel on the path. Packages that it imports and that
need a GPU are stubs, and torch.compile is off, as in OpenRLHF's own tests.
"""

import ast
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import peft
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import hooks, lazy_head, openrlhf, status

EXPERIENCE_FILE = "openrlhf/trainer/ppo_utils/experience_maker.py"
STUBS = ("bitsandbytes", "deepspeed", "flash_attn", "loralib", "pylatexenc", "pynvml", "ray", "vllm")


class Stub(MagicMock):
    __path__ = ()


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in STUBS else None

    def create_module(self, spec):
        return Stub(__spec__=spec, __name__=spec.name)

    def exec_module(self, module):
        pass


def load():
    stubs, compiled = Stubs(), torch.compile
    sys.meta_path.insert(0, stubs)
    torch.compile = lambda f=None, **_: f if f is not None else lambda g: g
    try:
        from openrlhf.models import actor, loss
    finally:
        torch.compile = compiled
        sys.meta_path.remove(stubs)
        for name in [name for name in sys.modules if name.partition(".")[0] in STUBS]:
            del sys.modules[name]
    return actor, loss


def load_experience_maker():
    """Return a module that has RemoteExperienceMaker with its GAE alone: the whole one imports Ray and vLLM."""
    (found,) = [node for node in hooks._tree("openrlhf", EXPERIENCE_FILE).body if isinstance(node, ast.ClassDef)][-1:]
    found.body = [node for node in found.body if getattr(node, "name", "") == "get_advantages_and_returns"]
    module = types.ModuleType(openrlhf.EXPERIENCE)
    module.__dict__.update(torch=torch, Tuple=tuple)
    exec(compile(ast.Module([found], []), EXPERIENCE_FILE, "exec"), vars(module))
    hooks._tree.cache_clear()  # which has lost the rest of the class
    sys.modules[openrlhf.EXPERIENCE] = module
    return module


actor_module, loss_module = load()
ROOT = Path(actor_module.__file__).parents[2]
experience = load_experience_maker()
NAMES = (
    (actor_module, "log_probs_from_logits"),
    (actor_module, "compute_entropy"),
    (loss_module.PolicyLoss, "forward"),
    (loss_module.ValueLoss, "forward"),
    (experience.RemoteExperienceMaker, "get_advantages_and_returns"),
)
THEIRS = [vars(owner)[name] for owner, name in NAMES]
SIZES = {
    "vocab_size": 311, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def put_back():
    yield
    assert [vars(owner)[name] for owner, name in NAMES] == THEIRS, "OpenRLHF was left changed"


def make_actor(temperature=1.0, kind="llama"):
    torch.manual_seed(0)
    if kind == "gemma2":
        sizes = SIZES | {"head_dim": 8, "num_key_value_heads": 4}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0, attn_implementation="eager"))
    elif kind == "phi":
        model = PhiForCausalLM(PhiConfig(**SIZES))
        torch.nn.init.normal_(model.lm_head.bias)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head.weight.data.mul_(20)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made = actor_module.Actor(model.eval(), temperature=temperature)
    made.packing_samples = False  # Actor sets it only where it loads the model itself
    return made


def batch(seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(3, 311, (3, 12))
    attention, action = torch.ones_like(ids), (torch.rand(3, 6) > 0.2).long()
    attention[1, :3] = 0
    return ids, action, attention


def forward_and_backward(actor, entropy=False):
    ids, action, attention = batch()
    actor.zero_grad()
    logprobs, out = actor(ids, action, attention_mask=attention, return_output=True, return_entropy=entropy)
    total = (logprobs * torch.arange(1.0, 7)).sum()
    found = [logprobs.detach()]
    if entropy:
        assert out.entropy.shape == (3, 11)
        total = total + 0.3 * (out.entropy[:, -6:] * action).sum()
        found.append(out.entropy.detach())
    total.backward()
    return found, {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    for x, y in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    assert found[1].keys() == expected[1].keys() != set()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 5e-5 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_actor(kind, temperature, entropy):
    actor = make_actor(temperature, kind)
    expected = forward_and_backward(actor, entropy)
    with openrlhf.fused(actor) as handle:
        found = forward_and_backward(actor, entropy)
        assert handle.status.answered == {"linear_logprobs": 1} and not handle.status.fallbacks  # one, with entropy too
        assert status(actor.model).lazy and not status(actor.model).direct
    assert_same(found, expected)
    assert not status(actor.model).lazy
    assert_same(forward_and_backward(actor, entropy), expected)


def test_all_log_probs_of_sft_and_dpo():
    actor, (ids, _, attention) = make_actor(), batch()
    with torch.no_grad():
        expected = actor(ids, attention_mask=attention, return_logprobs=True)
        with openrlhf.fused(actor) as handle:
            found = actor(ids, attention_mask=attention, return_logprobs=True)
            assert handle.status.answered == {"linear_logprobs": 1}
    assert found.shape == (3, 11)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_the_models_own_reader_of_logits():
    """Without action_mask and return_logprobs the Actor gives its output away: the logits are made."""
    actor, (ids, _, attention) = make_actor(0.7), batch()
    expected = actor(ids, attention_mask=attention, return_output=True)["logits"]
    with openrlhf.fused(actor):
        logits = actor(ids, attention_mask=attention, return_output=True)["logits"]
        torch.testing.assert_close(logits + 0, expected)


def test_two_actors_at_a_time():
    policy, reference = make_actor(), make_actor(0.7)
    expected = forward_and_backward(policy), forward_and_backward(reference)
    first, second = openrlhf.fused(policy), openrlhf.fused(reference)
    with pytest.raises(UserError, match="has lazy logits already"):
        openrlhf.fused(policy)
    assert_same(forward_and_backward(policy), expected[0])
    first.remove()
    first.remove()
    with pytest.raises(UserError, match=r"this handle of openrlhf\.fused was removed"), first:
        pass
    assert actor_module.compute_entropy is not THEIRS[1]  # the second needs it
    assert_same(forward_and_backward(reference), expected[1])
    assert second.status.answered == {"linear_logprobs": 1}
    assert_same(forward_and_backward(policy), expected[0])
    second.remove()


def test_an_error_inside_puts_all_back():
    actor = make_actor()
    with pytest.raises(ZeroDivisionError), openrlhf.fused(actor, losses=True):
        1 / 0  # noqa: B018
    assert not status(actor.model).lazy


@pytest.mark.parametrize("name", ["gone", "ValueLoss"])
def test_a_failed_start_puts_all_back(name, monkeypatch):
    """Neither an import that fails nor a function that cannot be replaced leaves a changed actor."""
    actor = make_actor()
    if name == "gone":
        monkeypatch.setattr(openrlhf, "LOSS", "openrlhf.models.gone")
    else:
        monkeypatch.delattr(loss_module, name)
    with pytest.raises((ImportError, AttributeError), match=name):
        openrlhf.fused(actor, losses=True)
    assert not status(actor.model).lazy
    assert [vars(owner)[name] for owner, name in NAMES] == THEIRS
    monkeypatch.undo()
    with openrlhf.fused(actor, losses=True) as handle:
        run_policy_loss({}, {}, 0.4)
    assert handle.status.answered == {"PolicyLoss": 1}


def test_what_somebody_else_replaced_stays(monkeypatch):
    def other(logits):
        return logits

    with openrlhf.fused(make_actor()), monkeypatch.context() as patch:
        patch.setattr(actor_module, "compute_entropy", other)
        handle = openrlhf.fused(make_actor(), losses=True)
        handle.remove()
        assert actor_module.compute_entropy is other
    with monkeypatch.context() as patch:
        handle = openrlhf.fused(make_actor())
        patch.setattr(actor_module, "compute_entropy", other)
        handle.remove()
        assert actor_module.compute_entropy is other
        assert vars(actor_module)["log_probs_from_logits"] is THEIRS[0]
    actor_module.compute_entropy = THEIRS[1]  # the context put our own back


# -- losses ------------------------------------------------------------------------------------------------------------


def tokens(spread=0.4):
    torch.manual_seed(2)
    shape = 5, 9
    mask = (torch.rand(shape) > 0.25).float()
    mask[-1] = 0  # a sequence without a token
    old, advantages = torch.randn(shape) - 3, torch.randn(shape)
    new = (old + spread * torch.randn(shape)).requires_grad_()
    return new, old, advantages, mask, old + 0.6 * torch.randn(shape)


TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": torch.tensor(77.0), "global_batch_size": torch.tensor(8.0)}]
TIS = {"is_correction_level": "token", "is_correction_threshold": (0.0, 1.2)}
SERVED = [
    {},
    {"dual_clip": 1.5},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.28},
    {"token_level_loss": False},
    {**TIS, "is_correction_mode": "clip"},
    {**TIS, "is_correction_mode": "mask"},
    {**TIS, "is_correction_mode": "mask", "token_level_loss": False, "dual_clip": 2.0},
]
THEIR_OWN = {
    "policy_loss_type is gspo": {"policy_loss_type": "gspo"},
    "is_correction_level is seq": {"is_correction_level": "seq"},
    "is_correction_threshold has a lower bound": {"is_correction_level": "token"},
    "is_correction_gating is tv": {
        "is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1),
    },
    "is_correction_gating is binary_kl": {
        "is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.1),
    },
}  # fmt: skip


def run_policy_loss(options, totals, spread):
    new, old, advantages, mask, rollout = tokens(spread)
    out = loss_module.PolicyLoss(**options)(
        new, old, advantages, action_mask=mask, rollout_log_probs=rollout, **totals
    )  # fmt: skip
    out[0].backward()
    return [x if x is None else x.detach() for x in out], new.grad


def assert_same_tuple(found, expected):
    (found, grad), (expected, their_grad) = found, expected
    assert len(found) == len(expected) == 5
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-7)
    assert grad.any()


@pytest.mark.parametrize("spread", [0.4, 2.0, 25.0])  # the last is beyond the clamp of the log-ratio
@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("options", SERVED)
def test_policy_loss(options, totals, spread):
    expected = run_policy_loss(options, totals, spread)
    with openrlhf.fused(losses=True) as handle:
        found = run_policy_loss(options, totals, spread)
    assert_same_tuple(found, expected)
    assert handle.status.answered == {"PolicyLoss": 1} and not handle.status.fallbacks


@pytest.mark.parametrize("reason", THEIR_OWN)
def test_policy_loss_that_stays_theirs(reason, caplog, monkeypatch):
    expected = run_policy_loss(THEIR_OWN[reason], {}, 0.4)
    with openrlhf.fused(losses=True) as handle:
        found = [run_policy_loss(THEIR_OWN[reason], {}, 0.4) for _ in range(2)]
        monkeypatch.setenv("RLHF_FAST_STRICT", "1")
        with pytest.raises(RuntimeError, match=reason):
            run_policy_loss(THEIR_OWN[reason], {}, 0.4)
    for once in found:
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(once[0], expected[0], strict=True))
        assert torch.equal(once[1], expected[1])
    assert handle.status.fallbacks == {f"PolicyLoss: {reason}": 2}
    assert [r.getMessage() for r in caplog.records] == [f"openrlhf calls its own PolicyLoss: {reason}"]
    assert f"2 times its own PolicyLoss: {reason}" in str(handle.status)


def test_policy_loss_without_what_it_needs():
    """OpenRLHF's own function answers, with its own error where it has one."""
    new, old, advantages, mask, _ = tokens()
    expected = loss_module.PolicyLoss()(new, old, advantages)
    with openrlhf.fused(losses=True) as handle:
        assert torch.equal(loss_module.PolicyLoss()(new, old, advantages)[0], expected[0])
        with pytest.raises(TypeError):
            loss_module.PolicyLoss(**TIS)(new, old, advantages, action_mask=mask)
    reasons = "there is no action_mask", "there are no rollout_log_probs"
    assert list(handle.status.fallbacks) == [f"PolicyLoss: {reason}" for reason in reasons]


@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("clip", [None, 0.0, 0.2])
@pytest.mark.parametrize("token_level", [True, False])
def test_value_loss(clip, token_level, totals):
    def run():
        new, old, returns, mask, _ = tokens()
        loss = loss_module.ValueLoss(clip, token_level)(new, old, returns, action_mask=mask, **totals)
        loss.backward()
        return loss.detach(), new.grad

    expected = run()
    with openrlhf.fused(losses=True) as handle:
        found = run()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    assert found[1].any()
    assert bool(handle.status.fallbacks) == (clip == 0)


def test_the_newest_handle_counts():
    first, second = openrlhf.fused(losses=True), openrlhf.fused(losses=True)
    run_policy_loss({}, {}, 0.4)
    counts = [handle.status.answered["PolicyLoss"] for handle in (first, second)]
    first.remove()
    run_policy_loss({}, {}, 0.4)
    counts += [handle.status.answered["PolicyLoss"] for handle in (first, second)]
    third = openrlhf.fused(losses=True)
    third.remove()
    run_policy_loss({}, {}, 0.4)
    counts += [handle.status.answered["PolicyLoss"] for handle in (first, second, third)]
    second.remove()
    assert counts == [0, 1, 0, 2, 0, 3, 0]


def test_gae_of_a_module_that_is_imported_later(tmp_path, monkeypatch):
    whole = ast.parse((ROOT / EXPERIENCE_FILE).read_text())
    (found,) = [node for node in whole.body if getattr(node, "name", "") == "RemoteExperienceMaker"]
    found.body = [node for node in found.body if getattr(node, "name", "") == "get_advantages_and_returns"]
    found.bases, found.decorator_list = [], []
    source = "import torch\nfrom typing import Tuple\n" + ast.unparse(found)
    (tmp_path / "later_experience.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(openrlhf, "EXPERIENCE", "later_experience")
    _, values, rewards, mask, _ = tokens()
    with openrlhf.fused(losses=True) as first, openrlhf.fused(losses=True) as second:
        import later_experience

        maker = later_experience.RemoteExperienceMaker()
        given = values, rewards, mask, 0.97, 0.9
        maker.get_advantages_and_returns(*given)
    assert not first.status.answered
    assert second.status.answered == {"get_advantages_and_returns": 1}
    maker.get_advantages_and_returns(*given)
    assert second.status.answered == {"get_advantages_and_returns": 1}  # OpenRLHF's own is back
    del sys.modules["later_experience"]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_gae(gamma, lam, masked):
    _, values, rewards, mask, _ = tokens()
    maker = experience.RemoteExperienceMaker.__new__(experience.RemoteExperienceMaker)
    given = values, rewards, mask if masked else None, gamma, lam
    expected = maker.get_advantages_and_returns(*given)
    with openrlhf.fused(losses=True) as handle:
        found = maker.get_advantages_and_returns(*given)
        with pytest.raises(AssertionError):  # outside the op's range OpenRLHF's own scan answers
            torch.testing.assert_close(maker.get_advantages_and_returns(*given[:3], 1.5, lam), expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    counts = handle.status
    assert counts.answered == {"get_advantages_and_returns": 1} and sum(counts.fallbacks.values()) == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(hooks, "library_version", lambda _: "0.12.0")
    with pytest.raises(UserError, match=r"^openrlhf 0\.12\.0 is not one that .* install openrlhf==0\.11\.2$"):
        openrlhf.fused(make_actor())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("actor", "compute_entropy(output['logits'])", "entropy_of(output['logits'])"),
        ("loss", "old_log_probs", "behaviour_log_probs"),
    ],
)
def test_another_signature_is_refused(name, before, after, monkeypatch):
    source = ast.unparse(hooks._tree("openrlhf", f"openrlhf/models/{name}.py"))
    tree = hooks._tree
    other = ast.parse(source.replace(before, after))
    monkeypatch.setattr(hooks, "_tree", lambda lib, file: other if file.endswith(f"/{name}.py") else tree(lib, file))
    with pytest.raises(UserError, match=rf"^openrlhf 0\.11\.2: openrlhf/models/{name}\.py: .* tested with"):
        openrlhf.fused(make_actor(), losses=True)


def test_no_actor_is_refused():
    with pytest.raises(UserError, match="nothing to replace"):
        openrlhf.fused()
    with pytest.raises(UserError, match=r"pass an Actor of openrlhf\.models, not a LlamaForCausalLM"):
        openrlhf.fused(make_actor().model)


def test_a_head_that_is_not_linear_is_refused():
    actor = make_actor()
    actor.model.lm_head = torch.nn.Sequential(actor.model.lm_head)
    with pytest.raises(UserError, match=r"its output layer is a torch\.nn\.\w+\.container\.Sequential"):
        openrlhf.fused(actor)


def test_lazy_head_alone_is_not_undone():
    """A handle does not remove another one's work."""
    actor = make_actor()
    with lazy_head(actor.model), pytest.raises(UserError, match="has lazy logits already"):
        openrlhf.fused(actor)


@pytest.mark.parametrize("hook", openrlhf.HOOKS, ids=lambda hook: f"{hook.file}:{hook.name}")
def test_hooks_stand(hook):
    assert hooks.moved(hook) == ""
