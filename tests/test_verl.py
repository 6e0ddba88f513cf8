"""verl's plugin. The cases that need verl (support/verl_cases.py) run in its own environment, and are slow."""

import os
import subprocess
import sys
import zipfile
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers as hf
from other_environment import ROOT, environment, run_cases
from torch import nn

from rlhf_fast import ops
from rlhf_fast.integrations import hooks, import_hook, verl
from rlhf_fast.integrations.calls import Calls
from rlhf_fast.integrations.token_weights import token_weights
from rlhf_fast.integrations.verl_head import fused_head, head_fault

PYTHON = os.environ.get("RLHF_FAST_VERL_PYTHON", "")
needs_verl = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="RLHF_FAST_VERL_PYTHON is not set; .ci/integrations.sh installs verl"),
]


@pytest.fixture
def metadata(tmp_path):
    """Return a folder with the metadata of this checkout: an older editable install has other entry points."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"RLHF_FAST_EXT": "0"}, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize("case", [pytest.param("verl_cases.py", marks=needs_verl)])
def test_verl(case, metadata):
    run_cases(case, metadata, min_passed=190, python=PYTHON, path=[metadata])


@pytest.mark.parametrize("parts", [pytest.param("head,gae", marks=needs_verl)])
def test_verl_goes_on_where_a_function_has_moved(parts, metadata):
    script = str(ROOT / "tests" / "support" / "verl_drift.py")
    done = subprocess.run(
        [PYTHON, script], env=environment([metadata], RLHF_FAST_VERL=parts), capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["verl goes on"], done.stdout + done.stderr
    ours = [line for line in done.stderr.splitlines() if "rlhf_fast:" in line and "WARNING" in line]
    assert len(ours) == 1 and ours[0].endswith(
        "rlhf_fast: verl keeps its own gae: compute_gae_advantage_return takes (data), not (token_level_rewards):"
        " install verl==0.9.1"
    ), done.stderr  # fmt: skip


# -- the plugin without verl -------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_plugin():
    import_module("rlhf_fast.integrations.verl_plugin")
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."verl.plugins"]\nrlhf_fast = "rlhf_fast.integrations.verl_plugin"\n' in text


def test_the_plugin_costs_nothing():
    """No op and nothing of verl is imported, and no model of transformers."""
    code = "import sys, rlhf_fast.integrations.verl_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "rlhf_fast.integrations.verl" in loaded
    assert not loaded & {"rlhf_fast.ops", "rlhf_fast.kernels", "rlhf_fast.integrations.head", "transformers", "verl"}


@pytest.fixture
def plugin(monkeypatch):
    """Let the plugin see verl 0.9.1, and return the modules whose import it waits for."""
    waits: dict = {}
    monkeypatch.delenv("RLHF_FAST_VERL", raising=False)
    monkeypatch.delenv("RLHF_FAST_STRICT", raising=False)
    monkeypatch.setattr(hooks, "library_version", lambda _: "0.9.1")
    monkeypatch.setattr(verl, "after_import", waits.__setitem__)
    monkeypatch.setattr(verl, "_installed", set())
    return waits


@pytest.mark.parametrize(
    ("value", "modules"),
    [
        (None, {verl.HEAD, verl.PATCH, verl.CORE}),
        ("1", {verl.HEAD, verl.PATCH, verl.CORE}),
        ("0", set()),
        ("head", {verl.HEAD, verl.PATCH}),
        ("gae, value_loss", {verl.CORE}),
    ],
)
def test_parts_of_the_environment_variable(plugin, monkeypatch, value, modules):
    if value is not None:
        monkeypatch.setenv("RLHF_FAST_VERL", value)
    verl.install()
    assert set(plugin) == modules


def test_an_unknown_part_replaces_nothing(plugin, monkeypatch, caplog):
    monkeypatch.setenv("RLHF_FAST_VERL", "head,losses")
    verl.install()
    assert not plugin
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [
        "rlhf_fast: verl keeps its own functions: RLHF_FAST_VERL: no part is named losses; give 0, 1 or of head, gae,"
        " policy_loss, value_loss"
    ]


def test_another_version_replaces_nothing(plugin, monkeypatch, caplog):
    monkeypatch.setattr(hooks, "library_version", lambda _: "0.10.0")
    verl.install()
    assert not plugin
    assert caplog.messages == [
        "rlhf_fast: verl keeps its own functions: verl 0.10.0 is not one that the integration knows: install"
        " verl==0.9.1"
    ]
    monkeypatch.setenv("RLHF_FAST_VERL", "0")
    verl.install()
    assert not plugin and len(caplog.messages) == 1
    monkeypatch.delenv("RLHF_FAST_VERL")
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    verl.install()  # verl would hide an error now
    with pytest.raises(RuntimeError, match=r"^RLHF_FAST_STRICT=1 and verl keeps its own functions: verl 0\.10\.0 is"):
        plugin[verl.CORE](SimpleNamespace())


def test_whatever_fails_verl_goes_on(plugin, monkeypatch, caplog):
    monkeypatch.setattr(verl, "check", lambda _hooks: None)
    verl.install()
    core = SimpleNamespace(__name__=verl.CORE, compute_value_loss=len)  # the others are not there
    plugin[verl.CORE](core)
    assert core.compute_value_loss.__wrapped__ is len
    assert [message.partition(":")[2] for message in caplog.messages] == [
        " verl keeps its own gae: 'types.SimpleNamespace' object has no attribute 'compute_gae_advantage_return'",
        " verl keeps its own policy_loss: 'types.SimpleNamespace' object has no attribute 'register_policy_loss'",
    ]
    before = core.compute_value_loss
    plugin[verl.CORE](core)
    assert core.compute_value_loss is before
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="RLHF_FAST_STRICT=1 and verl keeps its own gae"):
        plugin[verl.CORE](core)


# -- acting on an import -----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "someones"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "losses.py").write_text("def loss(): return 'theirs'\n")
    (folder / "trainer.py").write_text("from someones.losses import loss\n")
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(import_hook._FINDER, "actions", {})
    invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "someones"]:
        del sys.modules[name]


def test_a_module_is_changed_before_anybody_takes_a_name(package):
    seen = []
    import_hook.after_import("someones.losses", lambda module: (seen.append(module), setattr(module, "loss", len)))
    assert "someones" not in sys.modules and not seen
    trainer = import_module("someones.trainer")
    assert trainer.loss is len and seen == [sys.modules["someones.losses"]]
    assert sys.modules["someones.losses"].__spec__.origin.endswith("losses.py")
    import_hook.after_import("someones.losses", seen.append)  # imported: now
    assert len(seen) == 2


def test_a_module_in_a_zip_file(tmp_path, monkeypatch, package):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for name in ("__init__", "first", "second"):
            file.writestr(f"someones/{name}.py", f"name = {name!r}")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "all.zip"), *sys.path])
    seen = []
    import_hook.after_import("someones.second", seen.append)
    assert find_spec("someones.second") is not None and not seen
    assert import_module("someones.first").name == "first" and not seen
    assert import_module("someones.second").name == "second" and seen == [sys.modules["someones.second"]]


def test_a_module_that_does_not_import_is_not_acted_on(package):
    seen = []
    import_hook.after_import("someones.broken", seen.append)
    import_hook.after_import("someones.none", seen.append)
    with pytest.raises(ZeroDivisionError):
        import_module("someones.broken")
    with pytest.raises(ModuleNotFoundError):
        import_module("someones.none")
    assert not seen
    (Path(sys.modules["someones"].__path__[0]) / "broken.py").write_text("2 / 1\n")
    invalidate_caches()
    assert import_module("someones.broken") is seen[0]


# -- the head ----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"pad_token_id": 0, "num_key_value_heads": 2}


def gemma2(**options):
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8, **options))


def recurrent_gemma(softcap):
    config = hf.RecurrentGemmaConfig(**SIZES, lru_width=16, logits_soft_cap=softcap)
    return hf.RecurrentGemmaForCausalLM(config)


def adapted():
    config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    return peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), config).base_model.model


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), ""),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)), ""),
        (lambda: gemma2(final_logit_softcapping=None), ""),
        (lambda: gemma2(final_logit_softcapping=30.0), "a soft cap (final_logit_softcapping=30.0)"),
        (lambda: recurrent_gemma(0.0), ""),
        (lambda: recurrent_gemma(3.0), "a soft cap (logits_soft_cap=3.0)"),
        (
            lambda: SimpleNamespace(config=hf.xLSTMConfig(output_logit_soft_cap=2.0)),
            "a soft cap (output_logit_soft_cap=2.0)",
        ),
        (lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)), "a bias"),
        (lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)), "a scale (logit_scale=0.0625)"),
        (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES)), ""),
        (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=8.0)), "a scale (logits_scaling=8.0)"),
        (adapted, "an adapter"),
    ],
)
def test_what_a_head_has_besides_its_weight(make, fault):
    assert head_fault(make()) == fault


class Theirs(nn.Module):
    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()
        self.impl_backend = impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        return "theirs"


def test_head_that_stays_theirs(caplog, monkeypatch):
    calls = Calls("verl")
    head, hidden, weight = fused_head(Theirs, calls), torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    ids, each = torch.tensor([0, 6, 3]), torch.ones(3, 1)
    logprobs, entropy = head()(hidden, weight, ids, 0.7)
    expected = ops.linear_logprobs(hidden, weight, ids, None, 0.7)
    assert torch.equal(logprobs, expected[0]) and torch.equal(entropy, expected[1])
    for _ in range(2):
        assert head()(hidden, weight, ids, each) == "theirs"
    assert head()(hidden.to("meta"), weight, ids) == "theirs"
    assert calls.answered == {"FusedLinearForPPO": 1} and list(calls.fallbacks.values()) == [2, 1]
    reason = "verl calls its own FusedLinearForPPO: the op takes one temperature for all tokens"
    assert caplog.messages[0] == reason and len(caplog.messages) == 2
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="RLHF_FAST_STRICT=1 and verl calls its own FusedLinearForPPO"):
        head()(hidden, weight, ids, each)
    with torch.no_grad():
        assert head()(hidden, weight, ids, each) == "theirs"
    assert str(calls).splitlines()[0] == "verl: answered by rlhf_fast: FusedLinearForPPO 1"


def test_an_installed_liger_kernel_answers_where_it_is_asked_for(monkeypatch):
    calls, hidden, weight = Calls("verl"), torch.randn(3, 4), torch.randn(7, 4)
    head, ids = fused_head(Theirs, calls), torch.tensor([0, 6, 3])
    assert head(impl_backend="liger")(hidden, weight, ids)[0].shape == (3,)
    monkeypatch.setitem(globals(), "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", object())
    assert head(impl_backend="liger")(hidden, weight, ids) == "theirs"
    assert head()(hidden, weight, ids)[0].shape == (3,)
    assert not calls.fallbacks


def test_weights_of_a_sum():
    mask = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    found = token_weights(lambda x: (x * mask).sum(1).div(mask.sum(1)).mean() * 3, mask)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.75, 0], [0, 0, 1.5]]))
    with torch.no_grad():
        assert torch.equal(token_weights(lambda x: x.sum(), mask), torch.ones(2, 3))
