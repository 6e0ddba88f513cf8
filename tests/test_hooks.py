"""A hook is looked up in a library's sources: what has moved is named, and nothing is imported."""

import sys

import pytest

from rlhf_fast.cli.main import main
from rlhf_fast.integrations import hooks, openrlhf, transformers_hooks, trl, verl
from rlhf_fast.integrations.hooks import Hook
from rlhf_fast.model.architectures import FAMILIES

SOURCE = """
raise RuntimeError("imported")
try:
    from elsewhere import Fast as _Fast
except ImportError:
    def late(x): ...

class Trainer:
    def step(self, batch, *, scale=1.0):
        if batch:
            return head(batch, fused=True)

async def sample(prompt): ...
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Return a function that makes a hook on the installed package `someones`."""
    (tmp_path / "someones" / "trainer").mkdir(parents=True)
    (tmp_path / "someones" / "__init__.py").write_text("raise RuntimeError\n")
    (tmp_path / "someones" / "trainer" / "step.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(hooks, "library_version", lambda name: "3.1" if name == "someones" else None)
    hooks._tree.cache_clear()
    yield lambda name, **rest: Hook("someones", "3.0", rest.pop("file", "someones/trainer/step.py"), name, **rest)
    hooks._tree.cache_clear()


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("_Fast", {}),
        ("late", {"arguments": ("x",)}),
        ("Trainer", {"contains": "fused=True"}),
        ("Trainer.step", {"arguments": ("self", "batch", "scale"), "contains": "head(batch, fused=True)"}),
        ("sample", {"arguments": ("prompt",)}),
    ],
)
def test_a_hook_stands(library, name, rest):
    assert hooks.moved(library(name, **rest)) == ""
    assert hooks.report([library(name, **rest)]) == "3.1, tested with 3.0: its hooks stand"
    assert "someones" not in sys.modules


@pytest.mark.parametrize(
    ("name", "rest", "sentence"),
    [
        ("Fast", {}, "someones/trainer/step.py has no Fast"),
        ("Trainer.stop", {}, "someones/trainer/step.py has no Trainer.stop"),
        ("head", {}, "someones/trainer/step.py has no head"),
        ("late", {"file": "someones/gone.py"}, "someones/gone.py does not exist"),
        ("late", {"arguments": ("x", "y")}, "someones/trainer/step.py: late takes (x), not (x, y)"),
        ("Trainer.step", {"contains": "fused=False"}, "someones/trainer/step.py: Trainer.step has no `fused=False`"),
    ],
)
def test_what_has_moved_is_named(library, name, rest, sentence):
    expected = f"someones 3.1: {sentence}; the integration was tested with someones 3.0"
    assert hooks.moved(library(name, **rest)) == expected
    both = [library("Trainer"), library(name, **rest), library("gone", optional=True)]
    assert hooks.report(both) == f"3.1, tested with 3.0: 1 of 2 hooks are gone: {expected}"


def test_a_library_that_is_not_installed():
    hook = Hook("no-such-library", "1.0", "no_such_library/file.py", "function")
    assert hooks.moved(hook) == "no-such-library is not installed"
    assert hooks.report([hook]) == "not installed"


@pytest.mark.parametrize("hook", transformers_hooks.HOOKS, ids=lambda hook: f"{hook.name} {hook.contains}")
def test_what_lazy_logits_and_layers_stand_on_in_transformers(hook):
    assert hooks.moved(hook) == ""


def test_each_family_of_our_layers_has_its_hooks():
    """A family that is added to model/architectures.py is looked up too: its decoder, its layers and its head."""
    decoders = {name.removesuffix("Model") for name in FAMILIES}
    assert {prefix for prefix, _ in transformers_hooks.LAYERS.values()} == decoders
    assert transformers_hooks.HEADS.keys() == transformers_hooks.LAYERS.keys()
    for prefix in decoders:
        names = [hook.name for hook in transformers_hooks.LAYER_HOOKS]
        for method in ("Model", "Attention", "MLP"):
            assert f"{prefix}{method}.forward" in names


def test_env_says_which_libraries_were_tested(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for integration in (transformers_hooks, trl, openrlhf, verl):
        library = integration.HOOKS[0].library
        (line,) = [line for line in lines if line.startswith(f"{library} ")]
        assert line == f"{library:<14} {hooks.report(integration.HOOKS)}"
