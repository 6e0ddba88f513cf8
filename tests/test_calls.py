"""One form of counts for all integrations: what rlhf_fast answered, and what was left to others' own functions."""

import pytest
import torch

from rlhf_fast.integrations.calls import Calls, need_grad


def test_a_fallback_is_counted_and_its_first_warned_of(caplog):
    calls = Calls("someones")
    for reason in ("too small", "too small", "too large"):
        calls.note_fallback("loss", reason)
    assert calls.fallbacks == {"loss: too small": 2, "loss: too large": 1}
    assert caplog.messages == ["someones calls its own loss: too small", "someones calls its own loss: too large"]


def test_the_first_of_training_is_warned_of_though_others_came_before(caplog):
    calls = Calls("Model")
    for with_grad in (False, False, True, True):
        calls.note_fallback("forward", "a cache", with_grad, warns=with_grad)
    assert calls.fallbacks == {"forward: a cache": 4} and caplog.messages == ["Model calls its own forward: a cache"]


def test_strict_makes_a_fallback_of_training_an_error(monkeypatch):
    calls = Calls("someones")
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"^RLHF_FAST_STRICT=1 and someones calls its own loss: too small$"):
        calls.note_fallback("loss", "too small", with_grad=True)
    assert not calls.fallbacks
    calls.note_fallback("loss", "too small")
    assert calls.fallbacks == {"loss: too small": 1}


def test_a_gradient_is_needed_of_a_tensor_that_has_one_where_it_is_enabled():
    one, other = torch.ones(2), torch.ones(2, requires_grad=True)
    assert need_grad(one, other) and not need_grad(one) and not need_grad()
    with torch.no_grad():
        assert not need_grad(one, other)


def test_the_text_names_functions_and_reasons():
    calls = Calls("someones")
    assert str(calls) == "someones: answered by rlhf_fast: none"
    calls.answered.update({"loss": 3, "gae": 1})
    calls.note_fallback("head", "it is split")
    assert str(calls).splitlines() == [
        "someones: answered by rlhf_fast: loss 3, gae 1", "  1 times its own head: it is split"
    ]  # fmt: skip
