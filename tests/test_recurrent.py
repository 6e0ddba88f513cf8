"""Rollouts of models with recurrent layers, on the path `transformers`: rows that end, prompts that come twice.

The padding of other rows must not reach a recurrent state: each row is compared with the training forward on it alone.
"""

import logging

import pytest
import torch
from architectures import END, RECURRENT, V, llama, prompts, sampling

from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import choose
from rlhf_fast.rollout.hf_batch import CachedBatch, WholeRows
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


def biased(make) -> Model:
    """Return the model with random biases, for those of a new module are 0 and hide padding that leaks. It has so many
    end tokens that rows end early."""
    module = make().eval()
    module.generation_config.eos_token_id = list(range(END, V, 4))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return Model(module)


def largest_gap(model: Model, found) -> float:
    """Return the largest difference in nats from the training forward on each row alone."""
    gap = 0.0
    for row in range(len(found.lengths)):
        alone = found.take([row])
        with torch.no_grad():
            ours, _ = model.logprobs(alone.tokens, alone.prompt_lengths, alone.lengths)
        gap = max(gap, float((ours - alone.logprobs).abs().max()))
    return gap


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.exhaustive(8)
def test_recurrent_models_are_sampled_from(name):
    """LFM2 and Falcon-H1 are known to have crashed; all others are members of the same kind."""
    model = biased(RECURRENT[name])
    rollout = Rollout(model, sampling(max_new_tokens=8, batch=7), seed=3)
    found = rollout.generate(prompts(1, 7, 3, 12), samples=3)
    assert rollout.decode_path == "transformers"
    assert len(set((found.lengths - found.prompt_lengths).tolist())) > 1, "no row leaves early"
    # Nemotron-H's scan and step bound the time step differently; the chosen bound makes that small
    assert largest_gap(model, found) < (5e-3 if name == "nemotron_h" else 5e-4)


@pytest.mark.parametrize(
    ("name", "make", "one_length"),
    [("jamba", CachedBatch, False), ("mamba2", CachedBatch, False), ("minimax", CachedBatch, True)],
)
def test_rows_are_padded_only_where_the_padding_stays_outside(name, make, one_length):
    """MiniMax's linear attention takes in the padding: samples of a padded batch were off by nats, without a word."""
    rollout = Rollout(biased(RECURRENT[name]), sampling())
    assert rollout._batch_kind == (make, one_length)


@pytest.mark.parametrize("name", ["zamba2", "rwkv"])
def test_a_cache_that_is_wrong_is_not_used(name, caplog, monkeypatch):
    """Zamba2 decodes with other time steps than it trains with; RWKV's step mixes the rows of a batch."""
    monkeypatch.setattr(choose, "_warned", set())
    model = biased(RECURRENT[name])
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        rollout = Rollout(model, sampling(max_new_tokens=5))
    assert rollout._batch_kind.make is WholeRows
    assert "every sampled token runs its whole row again, very slowly, because its" in caplog.text
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(UserError, match=r"RLHF_FAST_STRICT=1 and .*ForCausalLM"):
        Rollout(model, sampling())


def test_the_comparison_is_made_when_the_rollout_is_created():
    """Not after the first stage of a recipe. A sum over the row starts anew with each step, so no cache is right."""
    model = llama()
    layer = model.decoder.layers[0]
    layer.self_attn.register_forward_hook(lambda _module, _inputs, out: (out[0] + out[0].cumsum(1), *out[1:]))
    rollout = Rollout(model, sampling(), decode_path="transformers")
    assert rollout._batch_kind.make is WholeRows
    assert largest_gap(model, rollout.generate(prompts(2, 5, 3), samples=2)) < 1e-4


def test_rows_without_a_cache_leave_the_batch_and_come_twice():
    model = llama()
    batch = WholeRows(model, [[5, 6, 7], [8, 9], [5, 6, 7]])
    batch.append(torch.tensor([10, 11, 12]))
    batch.select(torch.tensor([2, 1, 1]))
    batch.append(torch.tensor([13, 14, 15]))
    assert batch.rows == [[5, 6, 7, 12, 13], [8, 9, 11, 14], [8, 9, 11, 15]]
    with torch.no_grad():
        for row, hidden in zip(batch.rows, batch.last_hidden, strict=True):
            torch.testing.assert_close(hidden, model.hidden(torch.tensor([row]))[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["minimax", "zamba2", "mamba"])
def test_half_precision_does_not_hide_a_wrong_cache(name):
    """Padding leaked by 4 nats in the median where the longest prompt, which has none, made the check pass."""
    model = biased(RECURRENT[name])
    model.module.to(torch.bfloat16)
    rollout = Rollout(model, sampling(max_new_tokens=4, batch=7), seed=3)
    assert rollout._batch_kind != (CachedBatch, False) and model.module.dtype == torch.bfloat16
    assert largest_gap(model, rollout.generate(prompts(1, 7, 3), samples=2)) < 0.25
