"""Prefill of whole prompts by scaled_dot_product_attention: the results of decode_attention, token by token."""

import itertools

import pytest
import torch
from architectures import V, build, prompts, sampling
from test_fused import MODELS, heads
from torch.nn.attention import SDPBackend

from rlhf_fast.kernels._backends import forcing
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import prefill as prefill_module
from rlhf_fast.rollout import prompt_attention
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.prefill import prefill_passes
from rlhf_fast.rollout.prompt_attention import PromptAttention
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 4
FALLBACK = {
    "llama 5/1 heads of 10, llama3 rotation",
    "llama, odd widths",
    "mistral, window 5",
    "gpt2, odd widths",
}
"""Models all of whose layers need decode_attention: for their window, or for a width that no fast kernel has."""


@pytest.fixture
def served(monkeypatch) -> list[int]:
    """Return the numbers of groups of the calls of PromptAttention."""
    calls = []
    call = PromptAttention.__call__

    def counted(self, *args):
        calls.append(len(self.groups))
        return call(self, *args)

    monkeypatch.setattr(PromptAttention, "__call__", counted)
    return calls


@torch.no_grad()
def prefill(decoder: FusedDecoder, lengths: tuple[int, ...], whole: bool) -> list[torch.Tensor]:
    """Return the hidden states of the prompts' tokens, and of one decoded token of each."""
    pages, device = max(lengths) // PAGE + 1, decoder.model.device
    cache = PagedKVCache(decoder.shapes, decoder.dtype, device, len(lengths) * pages, len(lengths), pages, PAGE)
    cache.memory.fill_(torch.nan)
    order = torch.randperm(len(lengths) * pages, generator=torch.Generator().manual_seed(1)).tolist()
    for slot in range(len(lengths)):
        cache.assign(slot, [order.pop() for _ in range(pages)])
    tokens = torch.randint(3, V, (sum(lengths),), generator=torch.Generator().manual_seed(2)).to(device)
    positions = torch.cat([torch.arange(length, dtype=torch.int32, device=device) for length in lengths])
    slots = torch.arange(len(lengths), dtype=torch.int32, device=device)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    given = lengths if whole else None
    batch = TokenBatch(tokens, positions, slots.repeat_interleave(ends), cache.block_table, prompt_lengths=given)
    with decoder.session():
        return [
            decoder.hidden(cache, batch),
            decoder.hidden(cache, TokenBatch(tokens[: len(lengths)], ends, slots, cache.block_table)),
        ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(23, 17, 1), (30, 2, 2, 1, 1), (9, 9)], ids=str)
@pytest.mark.exhaustive(1, by=("name", "dtype"))
def test_whole_prompts_are_as_token_by_token(name, dtype, lengths, served):
    model = Model(MODELS[name]().to(dtype))
    with forcing("reference"):
        decoder = FusedDecoder.make(model)
        served.clear()
        expected = prefill(decoder, lengths, whole=False)
        assert not served
        found = prefill(decoder, lengths, whole=True)
    assert bool(served) == (name not in FALLBACK)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * theirs.norm()


def test_it_is_compared_with_the_models_own_forward(served, monkeypatch):
    call = PromptAttention.__call__
    monkeypatch.setattr(PromptAttention, "__call__", lambda self, *args: 1.1 * call(self, *args))
    with forcing("reference"), pytest.raises(Unsupported, match="off by"):
        FusedDecoder.make(Model(MODELS["llama 8/2 heads of 128"]()))
    assert served


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama 8/2 heads of 128", "llama 3/1 heads of 80, tied", "llama 4/4 heads of 64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(300, 17, 1), (40, 40)], ids=str)
def test_a_gpu_runs_the_fast_kernel(name, dtype, lengths, served, monkeypatch):
    """Flash attention in 16 bits; the memory-efficient kernel, which reads repeated keys, in float32."""
    fast = SDPBackend.EFFICIENT_ATTENTION if dtype == torch.float32 else SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(prompt_attention, "KERNELS", [fast])
    decoder = FusedDecoder.make(Model(MODELS[name]().to("cuda", dtype)))
    served.clear()
    expected, found = prefill(decoder, lengths, whole=False), prefill(decoder, lengths, whole=True)
    assert served
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= (1e-3 if dtype == torch.float32 else 0.05) * theirs.norm()


def test_repeated_keys_are_as_shared_ones(monkeypatch, served):
    """Kernels that do not know of heads that share keys read them repeated."""
    model = Model(MODELS["llama 8/2 heads of 128"]())
    with forcing("reference"):
        decoder = FusedDecoder.make(model)
        served.clear()
        shared = prefill(decoder, (12, 7), whole=True)
        monkeypatch.setattr(prompt_attention, "_reads_groups", lambda _: False)
        repeated = prefill(decoder, (12, 7), whole=True)
    assert len(served) == 4
    for ours, theirs in zip(repeated, shared, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 8])
def test_rollouts_are_those_of_the_compiled_step(monkeypatch, served, batch):
    """Prompts that are shared, refilled slots, and one prompt that is longer than a pass."""
    monkeypatch.setattr(prefill_module, "MAX_PREFILL_TOKENS", {"cpu": 16})
    model, given = Model(build("Llama", **heads(4, 2, 8))()), prompts(5, 21, 1, 7, 6)
    cfg = sampling(max_new_tokens=6, batch=batch)
    compiled = Rollout(model, cfg, 3, decode_path="fused").generate(given, samples=2)
    with forcing("reference"):
        rollout = Rollout(model, cfg, 3, decode_path="fused")
        assert rollout.decode_path == "fused"
        served.clear()
        ours = rollout.generate(given, samples=2)
    assert served
    assert torch.equal(ours.tokens, compiled.tokens)
    torch.testing.assert_close(ours.logprobs, compiled.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[20, 9, 7, 7, 2, 1], [16], [17], [1] * 40, [8, 8, 8], [50, 33, 16, 1]], ids=str)
def test_a_pass_is_whole_prompts_or_a_part_of_a_longer_one(lengths):
    passes = list(prefill_passes(lengths, 16))
    assert [part.start for part, _ in passes] == [0, *(part.stop for part, _ in passes[:-1])]
    assert passes[-1][0].stop == sum(lengths)
    assert all(part.stop - part.start <= 16 for part, _ in passes)
    whole = [length for _, given in passes for length in given or ()]
    assert whole == [length for length in lengths if length <= 16]
    assert all(sum(given) == part.stop - part.start for part, given in passes if given)
    for (_, one), (_, other) in itertools.pairwise(passes):
        assert not one or not other or sum(one) + other[0] > 16, "two passes would be one"


@pytest.mark.parametrize("lengths", [(100, 90, 80), (100, *[10] * 30), (1000, *[3] * 500), (7,), (4, 4)], ids=len)
def test_groups_have_little_padding(lengths):
    groups = prompt_attention._split(lengths)
    assert [length for group in groups for length in group] == list(lengths)
    assert all(len(group) * max(group) <= 2 * sum(group) for group in groups)
    assert len(groups) <= 3
