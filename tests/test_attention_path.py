"""The attention decoder: equal to transformers, refused where it would be wrong, and without effect on training."""

import copy
import logging

import pytest
import torch
from architectures import REFUSED, SERVED, V, build, greedy, llama, prompts, prompts_without_ties, sampling

from rlhf_fast import ops
from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.errors import UserError
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import choose
from rlhf_fast.rollout.attention import AttentionDecoder
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import PAGE_SIZE, PagedKVCache
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


def nan_cache(decoder: AttentionDecoder, num_slots: int, length: int) -> PagedKVCache:
    """Return a cache of NaN whose slots all have pages for `length` positions."""
    pages = -(-length // 4)
    cache = PagedKVCache(
        decoder.shapes, decoder.dtype, torch.device("cpu"), num_slots * pages, num_slots, pages, page_size=4
    )
    cache.memory.fill_(torch.nan)
    for slot in range(num_slots):
        cache.assign(slot, cache.allocate(pages))
    return cache


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
@torch.no_grad()
@pytest.mark.exhaustive(12)
def test_equals_transformers(make, monkeypatch):
    """Greedy tokens of prompts of different lengths in one batch, on pages of 4. Small random models often repeat one
    token, so the hidden states of prefilled and decoded rows are compared too."""
    monkeypatch.setitem(PAGE_SIZE, "cpu", 4)
    model = Model(make())
    batch = prompts_without_ties(model.module, 1, 7, 3, 12)
    rollout = Rollout(model, sampling(temperature=0.0), decode_path="attention")
    found = rollout.generate(batch).response_ids()
    assert rollout.decode_path == "attention"
    for tokens, response in zip(batch.tokens, found, strict=True):
        assert response == greedy(model.module, tokens)

    decoder, rows = AttentionDecoder.make(model), torch.randint(3, V, (2, 11))
    cache, expected = nan_cache(decoder, 2, 11), model.hidden(rows)
    calls = [[(0, t) for t in range(9)] + [(1, 0)], *([(0, t), (1, t - 8)] for t in (9, 10)), [(1, 3), (1, 4)]]
    for call in calls:
        slots, positions = torch.tensor(call).unbind(1)
        tokens = TokenBatch(rows[slots, positions], positions.int(), slots.int(), cache.block_table)
        torch.testing.assert_close(decoder.hidden(cache, tokens), expected[slots, positions], rtol=1e-4, atol=2e-5)
    last = tokens._replace(logits_indices=torch.tensor([1]))
    torch.testing.assert_close(decoder.hidden(cache, last), expected[1, 4:5], rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(ops.decode_attention.chosen("cpu") == "reference", reason="no compiled kernels")
@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_an_unsupported_model_falls_back_with_a_reason(make, reason, monkeypatch, caplog):
    """GPT-J and BLOOM never call the interface, StableLM drops the keyword: both would give wrong tokens, no error."""
    model = Model(make())
    batch = prompts_without_ties(model.module, 1, 7, 3)
    name = model.module.config._attn_implementation
    monkeypatch.setattr(choose, "_warned", set())
    rollout = Rollout(model, sampling(temperature=0.0))
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        found = rollout.generate(batch).response_ids()
        Rollout(model, sampling()).generate(batch)
    assert rollout.decode_path == "transformers"
    warnings = [record.message for record in caplog.records if "transformers' own cache" in record.message]
    assert len(warnings) == 1 and reason in warnings[0]
    assert found == [greedy(model.module, tokens) for tokens in batch.tokens]
    assert model.module.config._attn_implementation == name and not model.module.training
    with pytest.raises(UserError, match="decode path 'attention' cannot serve it, because"):
        Rollout(model, sampling(), decode_path="attention").generate(batch)
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(UserError, match=r"RLHF_FAST_STRICT=1 and .*ForCausalLM: responses are sampled over"):
        Rollout(model, sampling()).generate(batch)


def test_auto_skips_the_path_without_a_kernel(monkeypatch, caplog):
    model = Model(build("Gemma", head_dim=8)())
    monkeypatch.setattr(choose, "_warned", set())
    monkeypatch.setitem(ops.decode_attention.preference, "cpu", ["reference"])
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        assert Rollout(model, sampling()).decode_path == "transformers"
    assert "slower, because decode_attention has no kernel here" in caplog.text


def test_wrong_hidden_states_are_refused():
    """A module whose output depends on the index in the row instead of the position."""
    model = llama()

    def add_index(_module, _inputs, output):
        return output[0] + 0.1 * torch.arange(output[0].shape[1])[None, :, None], *output[1:]

    model.decoder.layers[1].self_attn.register_forward_hook(add_index)
    with pytest.raises(Unsupported, match="its hidden states over our cache are off by"):
        AttentionDecoder.make(model)


def test_unknown_arguments_and_layers_are_refused():
    model = llama()
    attention = model.decoder.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    with pytest.raises(Unsupported, match="its attention asks for position_bias"):
        AttentionDecoder.make(model)
    model = Model(build("Mistral", sliding_window=4)())
    model.module.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(Unsupported, match="layer 1 is of the kind chunked_attention"):
        AttentionDecoder.make(model)
    for setting, reason in [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer 1 does not say how wide its window is"),
        ({"sliding_window": 8}, "its config has a sliding window that its layers do not ask for"),
    ]:
        model = llama()
        vars(model.module.config).update(setting)
        with pytest.raises(Unsupported, match=reason):
            AttentionDecoder.make(model)
    with pytest.raises(UserError, match="there is no decode path 'fast'"):
        Rollout(llama(), sampling(), decode_path="fast").generate(prompts(3))


def gradients(model: Model) -> list[torch.Tensor]:
    model.module.zero_grad()
    tokens = torch.arange(20).view(2, 10) % V
    with model.train_mode():
        logprobs, _ = model.logprobs(tokens, torch.tensor([3, 4]), torch.tensor([10, 8]))
        logprobs.sum().backward()
    return [logprobs.detach(), *(p.grad for p in model.module.parameters())]


@pytest.mark.parametrize(
    "name, decode_path",
    [("llama", "attention"), ("gpt2", "attention"), ("gemma2, soft caps", "attention"), ("llama", "fused"),
     ("gpt2", "fused"), ("qwen3", "fused")],
)  # fmt: skip
def test_training_is_not_affected(name, decode_path):
    """A training step has the same log-probabilities and gradients after a rollout as without one, bit for bit."""
    model = Model(SERVED[name]())
    twin = Model(copy.deepcopy(model.module))
    implementation = model.module.config._attn_implementation
    model.module.train()
    rollout = Rollout(model, sampling(), decode_path=decode_path)
    rollout.generate(prompts(3, 5))
    assert rollout.decode_path == decode_path and all(
        p.grad is None and p.requires_grad for p in model.module.parameters()
    )
    assert model.module.training and model.module.config._attn_implementation == implementation
    found, expected = gradients(model), gradients(twin)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(gradient.any() for gradient in found[1:] if gradient is not None)


def test_an_error_leaves_the_module_as_it_was():
    model = llama()
    rollout = Rollout(model, sampling(), decode_path="attention")
    assert rollout.decode_path == "attention"
    implementation = model.module.config._attn_implementation
    model.module.train()

    def fail(*_):
        raise ZeroDivisionError

    handle = model.decoder.layers[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        rollout.generate(prompts(3))
    handle.remove()
    assert model.module.training and model.module.config._attn_implementation == implementation
    assert rollout.generate(prompts(3)).lengths[0] > 3


@torch.no_grad()
def test_adapters_count_and_the_reference_has_none():
    pytest.importorskip("peft")
    model = llama(eos_token_id=None)
    model.module = lora.attach(model.module, LoraConfig(rank=2, alpha=4), "lm", 0)
    for name, p in model.module.named_parameters():
        if "lora_B" in name:
            p.normal_()
    batch = prompts(4, 9)
    policy, reference = (
        Rollout(m, sampling(), decode_path="attention").generate(batch) for m in (model, model.reference())
    )
    for sampled, found in ((model, policy), (model.reference(), reference)):
        ours, _ = sampled.logprobs(found.tokens, found.prompt_lengths, found.lengths)
        torch.testing.assert_close(found.logprobs, ours, rtol=0, atol=1e-4)
    assert policy.response_ids() != reference.response_ids()
