"""The training forward is the evaluating one: noise of any name is found at load, kept quiet, or refused by name."""

import random

import numpy as np
import pytest
import torch
import transformers as t
from architectures import GPT, SMALL
from shrink import shrunken
from torch import nn

from rlhf_fast.batches import Demonstrations
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.training.losses import sft_loss

MOE = {**SMALL, "num_experts_per_tok": 2, "num_local_experts": 4}
TOKENS = torch.arange(3, 35).view(2, 16)
WHOLE = (TOKENS, torch.tensor([1, 1]), torch.tensor([16, 16]))


def llama(**changes):
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **changes}))


NOISY = {
    "dropout of attention": lambda: llama(attention_dropout=0.5),
    "router jitter, Mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**MOE, router_jitter_noise=0.3)),
    "router jitter, MiniMax M2": lambda: t.MiniMaxM2ForCausalLM(
        shrunken(t.MiniMaxM2Config, router_jitter_noise=0.3, rotary_dim=4)
    ),
    "sampled experts, PhiMoE": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**MOE)),
    "jitter of inputs, PhiMoE": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**MOE, input_jitter_noise=0.3)),
    "left-out layers, OPT": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, layerdrop=0.9,
            max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
        )
    ),
    "left-out layers, BioGPT": lambda: t.BioGptForCausalLM(shrunken(t.BioGptConfig, layerdrop=0.9)),
    "left-out layers, XGLM": lambda: t.XGLMForCausalLM(shrunken(t.XGLMConfig, layerdrop=0.9, num_layers=2)),
    "read from the config, Falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.4,
            attention_dropout=0.4, alibi=False,
        )
    ),
    "all of GPT-2's": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_no_architecture_has_noise_of_its_own(name):
    """Several forwards, and the gradients, are those of the evaluating mode, and random states are untouched."""
    model = Model(NOISY[name]())
    config = model.base.config.to_dict()
    expected, _ = model.logprobs(*WHOLE)
    states = torch.get_rng_state(), random.getstate()
    with model.train_mode(None):
        for _ in range(4):
            torch.testing.assert_close(model.logprobs(*WHOLE)[0], expected, rtol=1e-4, atol=1e-4)
        model.logprobs(*WHOLE)[0].sum().backward()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.module.parameters())
    assert model.base.config.to_dict() == config, "the config is saved with the model"


class Noise(nn.Module):
    """An MLP with a draw of the given kind."""

    def __init__(self, mlp, draw):
        super().__init__()
        self.mlp, self.draw = mlp, draw
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        return self.draw(self, self.mlp(x))


def sometimes(generator):
    """Drop the branch with a probability of one in a thousand: no two forwards show it."""
    return lambda self, y: y * float(generator() > 0.001) if self.training else y


QUIET = {
    "added": lambda self, y: y + torch.randn_like(y) if self.training else y,
    "rare": sometimes(lambda: float(torch.rand(()))),
    "rare, by numpy": sometimes(np.random.random),
    "rare, by Python": sometimes(random.random),
    "not random": lambda self, y: 0.5 * y if self.training else y,
    "batch norm": lambda self, y: y + self.norm(y.flatten(0, 1)).view_as(y),
}
"""Switched off by the evaluating mode of one module."""


@pytest.mark.parametrize("kind", QUIET)
@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_a_module_that_makes_noise_stays_in_evaluating_mode(kind, layers):
    module = llama()
    for layer in layers:
        module.model.layers[layer].mlp = Noise(module.model.layers[layer].mlp, QUIET[kind])
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    model = Model(module)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert states[1] == np.random.get_state()[2]
    expected = model.hidden(TOKENS)
    with model.train_mode(None):
        for _ in range(3):
            torch.testing.assert_close(model.hidden(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert module.model.layers[0].self_attn.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    with model.train_mode(0.5):
        assert not torch.allclose(model.hidden(TOKENS), expected, atol=1e-2), "residual dropout stays"


REFUSED = {
    "noise in both modes": (
        lambda _, y: y * (1 + 0.1 * torch.rand(y.shape[1], 1)),
        "NaN or infinity|adds noise|depends",
    ),
    "a call count": (None, "training mode"),
    "capacity of an expert": (
        lambda _, y: y * (torch.arange(y.shape[0] * y.shape[1]).view(*y.shape[:2], 1) < 9),
        "other rows",
    ),
    "norm over the batch": (lambda _, y: y - y.mean(0, keepdim=True), "other rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_noise_that_cannot_be_switched_off_is_refused(kind):
    module, (draw, words) = llama(), REFUSED[kind]
    if draw is None:
        calls = []
        draw = lambda self, y: y + (0.1 * len(calls) if self.root.training and not calls.append(1) else 0.0)  # noqa: E731
    noise = Noise(module.model.layers[1].mlp, draw)
    noise.__dict__["root"] = module.model.layers[0].self_attn
    module.model.layers[1].mlp = noise
    with pytest.raises(UserError, match=words):
        Model(module)


def test_a_draw_that_is_not_used_is_served():
    module = llama()
    module.model.layers[0].mlp = Noise(module.model.layers[0].mlp, lambda _, y: y + 0 * torch.rand(()))
    model = Model(module)
    with model.train_mode(None):
        model.hidden(TOKENS)


def test_packing_is_checked_without_dropout():
    """Its check runs within training, where residual dropout would make two forwards differ."""
    model = Model(llama())
    batch = Demonstrations(TOKENS[:, :12], torch.tensor([1, 2]), torch.tensor([12, 9]))
    modes = [module.training for module in model.module.modules()]
    with model.train_mode(0.3):
        sft_loss(model, batch, batch.num_items(), pack=True)[0].backward()
    assert [module.training for module in model.module.modules()] == modes
