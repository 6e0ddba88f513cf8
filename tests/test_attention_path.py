"""Decoding by a module's own forward pass over our cache: equal to transformers, guarded, and gone without a trace."""

import copy
import logging

import pytest
import torch
from architectures import REFUSED, SERVED, V, build, greedy, llama, prompts, sampling

from rlhf_fast import ops
from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import choose
from rlhf_fast.rollout.attention import AttentionDecoder
from rlhf_fast.rollout.decoder import Packed, Unsupported
from rlhf_fast.rollout.kv_cache import PAGE, Arena
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


def arena_of(found: AttentionDecoder, slots: int, positions: int) -> Arena:
    """One with every slot seated, all its memory NaN."""
    pages = -(-positions // 4)
    arena = Arena(found.shapes, found.dtype, torch.device("cpu"), slots * pages, slots, pages, page=4)
    arena.memory.fill_(torch.nan)
    for slot in range(slots):
        arena.seat(slot, arena.take(pages))
    return arena


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
@torch.no_grad()
def test_equals_transformers(make, monkeypatch):
    """Greedy tokens, ragged prompts in one batch, pages of 4; and, since small random models like to repeat one token,
    the hidden states of rows prefilled and decoded, and the number of attention calls."""
    monkeypatch.setitem(PAGE, "cpu", 4)
    model, batch = Model(make()), prompts(1, 7, 3, 12)
    rollout = Rollout(model, sampling(temperature=0.0), path="attention")
    found = rollout.generate(batch).response_ids()
    assert rollout.path == "attention"
    for tokens, response in zip(batch.tokens, found, strict=True):
        assert response == greedy(model.module, tokens)

    decode, rows = AttentionDecoder.make(model), torch.randint(3, V, (2, 11))
    arena, wanted = arena_of(decode, 2, 11), model.hidden(rows)
    calls = [[(0, t) for t in range(9)] + [(1, 0)], *([(0, t), (1, t - 8)] for t in (9, 10)), [(1, 3), (1, 4)]]
    for call in calls:
        slots, positions = torch.tensor(call).unbind(1)
        packed = Packed(rows[slots, positions], positions.int(), slots.int(), arena.block_table)
        torch.testing.assert_close(decode.hidden(arena, packed), wanted[slots, positions], rtol=1e-4, atol=2e-5)
    last = packed._replace(wanted=torch.tensor([1]))
    torch.testing.assert_close(decode.hidden(arena, last), wanted[1, 4:5], rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(ops.decode_attention.chosen("cpu") == "reference", reason="no compiled kernels")
@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_serve_falls_back_with_a_reason(make, reason, monkeypatch, caplog):
    """GPT-J and BLOOM never call the interface, StableLM drops the keyword: wrong tokens without any error."""
    model, batch = Model(make()), prompts(1, 7, 3)
    name = model.module.config._attn_implementation
    monkeypatch.setattr(choose, "_told", set())
    rollout = Rollout(model, sampling(temperature=0.0))
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        found = rollout.generate(batch).response_ids()
        Rollout(model, sampling()).generate(batch)
    assert rollout.path == "transformers"
    said = [record.message for record in caplog.records if "transformers' own cache" in record.message]
    assert len(said) == 1 and reason in said[0]
    assert found == [greedy(model.module, tokens) for tokens in batch.tokens]
    assert model.module.config._attn_implementation == name and not model.module.training
    with pytest.raises(UserError, match="path 'attention' cannot decode it, because"):
        Rollout(model, sampling(), path="attention").generate(batch)
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(UserError, match="RLHF_FAST_STRICT=1 and .*ForCausalLM: responses are sampled over"):
        Rollout(model, sampling()).generate(batch)


def test_without_a_kernel_it_is_no_choice(monkeypatch, caplog):
    model = Model(build("Gemma", head_dim=8)())
    monkeypatch.setattr(choose, "_told", set())
    monkeypatch.setitem(ops.decode_attention.preference, "cpu", ["reference"])
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        assert Rollout(model, sampling()).path == "transformers"
    assert "slower, because decode_attention has no kernel here" in caplog.text


def test_wrong_numbers_are_noticed():
    """A module that tells its tokens apart by their place in the row, not by their positions."""
    model = llama()

    def by_place(module, inputs, output):
        return output[0] + 0.1 * torch.arange(output[0].shape[1])[None, :, None], *output[1:]

    model.decoder.layers[1].self_attn.register_forward_hook(by_place)
    with pytest.raises(Unsupported, match="its hidden states over our cache are off by"):
        AttentionDecoder.make(model)


def test_unknown_wishes_are_refused():
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
    with pytest.raises(UserError, match="there is no path 'fast'"):
        Rollout(llama(), sampling(), path="fast").generate(prompts(3))


def gradients(model: Model) -> list[torch.Tensor]:
    model.module.zero_grad()
    tokens = torch.arange(20).view(2, 10) % V
    with model.train_mode():
        logprobs, _ = model.logprobs(tokens, torch.tensor([3, 4]), torch.tensor([10, 8]))
        logprobs.sum().backward()
    return [logprobs.detach(), *(p.grad for p in model.module.parameters())]


@pytest.mark.parametrize(
    "name, path",
    [("llama", "attention"), ("gpt2", "attention"), ("gemma2, soft caps", "attention"), ("llama", "fused"),
     ("gpt2", "fused"), ("qwen3", "fused")],
)  # fmt: skip
def test_training_never_meets_it(name, path):
    """A training step's log-probabilities and gradients after a rollout are those without, bit for bit."""
    model = Model(SERVED[name]())
    twin = Model(copy.deepcopy(model.module))
    implementation = model.module.config._attn_implementation
    model.module.train()
    rollout = Rollout(model, sampling(), path=path)
    rollout.generate(prompts(3, 5))
    assert rollout.path == path and all(p.grad is None and p.requires_grad for p in model.module.parameters())
    assert model.module.training and model.module.config._attn_implementation == implementation
    found, wanted = gradients(model), gradients(twin)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(gradient.any() for gradient in found[1:] if gradient is not None)


def test_an_error_leaves_the_module_as_it_was():
    model = llama()
    rollout = Rollout(model, sampling(), path="attention")
    assert rollout.path == "attention"
    implementation = model.module.config._attn_implementation
    model.module.train()

    def stumble(*_):
        raise ZeroDivisionError

    handle = model.decoder.layers[1].register_forward_hook(stumble)
    with pytest.raises(ZeroDivisionError):
        rollout.generate(prompts(3))
    handle.remove()
    assert model.module.training and model.module.config._attn_implementation == implementation
    assert rollout.generate(prompts(3)).lengths[0] > 3


@torch.no_grad()
def test_adapters_are_seen_and_their_absence_too():
    pytest.importorskip("peft")
    model = llama(eos_token_id=None)
    model.module = lora.attach(model.module, LoraConfig(rank=2, alpha=4), "lm", 0)
    for name, p in model.module.named_parameters():
        if "lora_B" in name:
            p.normal_()
    batch = prompts(4, 9)
    policy, reference = (Rollout(m, sampling(), path="attention").generate(batch) for m in (model, model.reference()))
    for who, found in ((model, policy), (model.reference(), reference)):
        ours, _ = who.logprobs(found.tokens, found.prompt_lengths, found.lengths)
        torch.testing.assert_close(found.logprobs, ours, rtol=0, atol=1e-4)
    assert policy.response_ids() != reference.response_ids()
