"""The fused decoder: every family with odd shapes against the module's own forward; results that do not depend on the
batch, bit for bit; adapters; refused models."""

import copy
import ctypes
from dataclasses import replace

import pytest
import torch
from architectures import GPT, V, build, greedy, prompts, prompts_without_ties, sampling
from peak import peak_bytes

from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import _product
from rlhf_fast.kernels._backends import COMPILED, forcing
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._op import OPS
from rlhf_fast.model import architectures
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import compiled_step, fused
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.skipif(compiled_step.find_kernels() is None, reason="no compiled kernels for this processor")
ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def heads(q: int, kv: int, d: int) -> dict:
    return {"num_attention_heads": q, "num_key_value_heads": kv, "head_dim": d}


MODELS = {
    "llama 4/4 heads of 64": build("Llama", **heads(4, 4, 64)),
    "llama 3/1 heads of 80, tied": build("Llama", hidden_size=33, **heads(3, 1, 80), tie_word_embeddings=True),
    "llama 8/1 heads of 96, biases": build("Llama", **heads(8, 1, 96), attention_bias=True, mlp_bias=True),
    "llama 8/2 heads of 128": build("Llama", **heads(8, 2, 128)),
    "llama 5/1 heads of 10, llama3 rotation": build("Llama", hidden_size=40, **heads(5, 1, 10), rope_parameters=LLAMA3),
    "llama, yarn": build("Llama", rope_parameters=YARN),
    "llama, odd widths": build("Llama", hidden_size=39, intermediate_size=51, **heads(3, 3, 6)),
    "llama, gelu": build("Llama", hidden_act="gelu"),
    "mistral, window 5": build("Mistral", **heads(4, 2, 12), sliding_window=5),
    "qwen2, a window in some layers": build("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3 4/2 heads of 80": build("Qwen3", **heads(4, 2, 80)),
    "smollm3, layers without rotation": build("SmolLM3", num_hidden_layers=4),
    "gpt2": build("GPT2", GPT),
    "gpt2, odd widths": build("GPT2", GPT | {"n_embd": 36, "n_head": 3}, n_inner=50, activation_function="gelu"),
    "gpt2, scaled by layer": build("GPT2", GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox, a quarter rotated": build("GPTNeoX", rotary_pct=0.25),
    "gpt_neox, one after the other": build("GPTNeoX", use_parallel_residual=False, hidden_act="gelu_new"),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def hidden(decoder, rows: list[list[int]], calls: list[list[tuple[int, int]]], page: int = 4) -> list[torch.Tensor]:
    """Return the hidden states of each row, computed by the given calls of (row, position) pairs."""
    pages = -(-max(map(len, rows)) // page)
    cache = PagedKVCache(decoder.shapes, decoder.dtype, torch.device("cpu"), len(rows) * pages, len(rows), pages, page)
    cache.memory.fill_(torch.nan)
    order = torch.randperm(len(rows) * pages).tolist()
    for slot in range(len(rows)):
        cache.assign(slot, [order.pop() for _ in range(pages)])
    found = [torch.full((len(row), decoder.model.head_weight.shape[1]), torch.nan) for row in rows]
    with torch.no_grad(), decoder.session():
        for call in calls:
            tokens = torch.tensor([rows[row][position] for row, position in call])
            slots, positions = torch.tensor(call, dtype=torch.int32).unbind(1)
            batch = TokenBatch(tokens, positions.contiguous(), slots.contiguous(), cache.block_table)
            for (row, position), state in zip(call, decoder.hidden(cache, batch), strict=True):
                found[row][position] = state
    return found


def at_once(rows) -> list[list[tuple[int, int]]]:
    return [[(row, position) for row in range(len(rows)) for position in range(len(rows[row]))]]


def one_by_one(rows) -> list[list[tuple[int, int]]]:
    return [[(row, position)] for row in range(len(rows)) for position in range(len(rows[row]))]


def random_rows(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, V, (length,)).tolist() for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.exhaustive(14)
def test_hidden_states_are_as_accurate_as_the_modules(make, dtype):
    """Errors are against the module in float64, with the same weights.

    In float32 a random model amplifies the rounding of a few tokens, ours or the module's: the medians are compared
    closely, the sums less so.
    """
    module = make().to(dtype)
    lengths = (1, 40, 17)
    model, rows = Model(module), random_rows(*lengths)
    found = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows))).double()
    double = make()
    double.load_state_dict({name: value.double() for name, value in module.state_dict().items()}, assign=True)
    exact, theirs = (
        torch.cat([m.hidden(torch.tensor([row]))[0].double() for row in rows]) for m in (Model(double), model)
    )
    errors, allowed = (found - exact).norm(dim=-1), (theirs - exact).norm(dim=-1)
    for ours, module_error in zip(errors.split(lengths), allowed.split(lengths), strict=True):
        if len(ours) > 1:
            assert ours.median() <= 2 * module_error.median(), "median of a row"
    assert errors.norm() <= {torch.float32: 5, torch.bfloat16: 2}[dtype] * allowed.norm(), "all rows"
    assert allowed.norm() < 0.1 * exact.norm(), "the module itself is too inaccurate for this test"


@pytest.mark.parametrize("name", ["llama 3/1 heads of 80, tied", "qwen3 4/2 heads of 80", "gpt2", "mistral, window 5"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 products"])
def test_hidden_states_do_not_depend_on_the_batch(name, kind, monkeypatch):
    """Bit for bit: prefilled at once or token by token, in any batch, on any pages, with any number of threads."""
    monkeypatch.setattr(compiled_step, "MIN_NANOSECONDS_TO_THREAD", 0)  # always use threads
    if kind == "bfloat16 products":
        monkeypatch.setattr(_product, "BF16_DOT", 2)
    model = Model(MODELS[name]().to(torch.float32 if kind == "float32" else torch.bfloat16))
    decoder, rows, threads = FusedDecoder.make(model), random_rows(30, 1, 9, 64, 5), torch.get_num_threads()
    first = hidden(decoder, rows, at_once(rows))
    split = [part for call in at_once(rows) for part in (call[:7], call[7:50], call[50:])]
    steps = [[(row, t) for row in range(5) if t < len(rows[row])] for t in range(64)]
    try:
        for calls, page, count in [(split, 4, 1), (steps, 16, 3), (one_by_one(rows), 1, 1), (at_once(rows), 64, 2)]:
            torch.set_num_threads(count)
            for ours, theirs in zip(hidden(decoder, rows, calls, page), first, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    assert not any(state.isnan().any() for state in first), "unwritten memory was read"


@pytest.mark.parametrize("name", ["llama 8/1 heads of 96, biases", "gpt2, odd widths"])
def test_all_instruction_sets_agree(name, monkeypatch):
    model, rows = Model(MODELS[name]()), random_rows(11, 30)
    found = {}
    for backend in [backend for backend in COMPILED if backend.startswith("cpu:")]:
        monkeypatch.setattr(fused, "find_kernels", lambda _, backend=backend: COMPILED[backend])
        found[backend] = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows)))
    for ours in found.values():
        torch.testing.assert_close(ours, found["cpu:generic"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.exhaustive(14)
def test_the_op_step_is_the_compiled_step(make, dtype):
    """The op step runs on devices without a compiled one; here each op runs its reference."""
    model, rows = Model(make().to(dtype)), random_rows(1, 40, 17)
    compiled = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows)))
    split = [part for call in at_once(rows) for part in (call[:7], call[7:])]
    with forcing("reference"):
        decoder = FusedDecoder.make(model)
        op_step = torch.cat(hidden(decoder, rows, split))
    assert not torch.equal(op_step, compiled), "the compiled step ran"
    assert (op_step - compiled).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * compiled.norm()


STEP = [OPS[name] for name in ("rms_norm", "layer_norm", "swiglu", "gelu", "rope_store", "decode_attention")]
triton = pytest.mark.skipif(
    not all(op.can_run("triton", "cpu") for op in STEP), reason="Triton's kernels cannot be forced on the CPU here"
)


@triton
@pytest.mark.parametrize("name", ["qwen3 4/2 heads of 80", "gpt2", "mistral, window 5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.exhaustive(1)
def test_the_op_step_on_triton_is_the_compiled_step(name, dtype):
    """The step as a GPU runs it, one launch an op."""
    model, rows = Model(MODELS[name]().to(dtype)), random_rows(1, 11)
    compiled = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows)))
    with forcing("triton"):
        decoder = FusedDecoder.make(model)
        op_step = torch.cat(hidden(decoder, rows, at_once(rows)))
    assert not torch.equal(op_step, compiled), "the compiled step ran"
    assert (op_step - compiled).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * compiled.norm()


@triton
@pytest.mark.slow
def test_a_rollout_on_triton_samples_the_same_tokens(monkeypatch):
    sampler = OPS["linear_sample_tokens"]
    if not sampler.can_run("triton", "cpu"):  # the sampler then runs its reference
        monkeypatch.setitem(sampler.implementations, "triton", sampler.reference)
    batch, cfg = prompts(3, 5), sampling(max_new_tokens=4)
    model = Model(MODELS["llama 4/4 heads of 64"]())
    compiled = Rollout(model, cfg, 3, decode_path="fused").generate(batch, samples=2)
    with forcing("triton"):
        ours = Rollout(model, cfg, 3, decode_path="fused").generate(batch, samples=2)
    assert torch.equal(ours.tokens, compiled.tokens)
    torch.testing.assert_close(ours.logprobs, compiled.logprobs, rtol=1e-4, atol=1e-4)


def test_float16_runs_the_op_step():
    model, rows = Model(build("Llama")().half()), random_rows(9)
    found = hidden(FusedDecoder.make(model), rows, at_once(rows))[0]
    with torch.no_grad():
        theirs = model.hidden(torch.tensor(rows))[0].float()
    assert (found - theirs).norm() <= 0.01 * theirs.norm()


def test_products_in_bfloat16_are_accurate(monkeypatch):
    model, rows = Model(MODELS["llama 8/2 heads of 128"]().bfloat16()), random_rows(20)
    decoder, found = FusedDecoder.make(model), []
    for how in (0, 2, 1):  # upcast to float32; emulated instruction; the processor's instruction if it has one
        monkeypatch.setattr(_product, "BF16_DOT", how)
        found.append(hidden(decoder, rows, at_once(rows))[0])
    upcast, emulated, native = found
    assert not torch.equal(upcast, emulated), "the emulation did not run"
    assert (upcast - emulated).norm() <= 0.02 * upcast.norm()  # of all elements: one alone depends on the draw
    assert torch.equal(native, emulated) or torch.equal(native, upcast), "the instruction differs from its emulation"


def test_greedy_is_transformers_generate(make):
    """Prompts of different lengths in one batch, each against generate() alone."""
    model = Model(make())
    batch = prompts_without_ties(model.module, 1, 7, 3, 12)
    rollout = Rollout(model, sampling(temperature=0.0), decode_path="fused")
    assert rollout.generate(batch).response_ids() == [greedy(model.module, tokens) for tokens in batch.tokens]
    assert rollout.decode_path == "fused"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_does_not_matter(dtype):
    model, batch = Model(build("Llama", hidden_size=256)()), prompts(*range(1, 20))
    before = Rollout(model, sampling(), decode_path="fused").generate(batch, samples=4)
    torch.set_default_dtype(dtype)
    try:
        again = Rollout(model, sampling(), decode_path="fused").generate(batch, samples=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before.tokens, again.tokens) and torch.equal(before.logprobs, again.logprobs)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"min_new_tokens": 3}], ids=["plain", "top-p", "ban"])
def test_samples_do_not_depend_on_the_batch(filters):
    """Bit for bit: batch 1, 7 and 64, shuffled prompts, refilled slots, a kept cache."""
    model, batch = Model(MODELS["qwen3 4/2 heads of 80"]()), prompts(*range(1, 18))
    settings = sampling(**filters)
    base = Rollout(model, settings, 3, decode_path="fused").generate(batch, samples=4)
    fields = ("logprobs", "raw_logprobs", "kept_logprobs", "entropy", "lengths", "finish_reasons", "tokens")
    shuffled = torch.randperm(17).tolist()
    for size, keep in [(1, False), (7, True), (64, False)]:
        rollout = Rollout(model, replace(settings, batch=size), 3, decode_path="fused", keep_cache=keep)
        for _ in range(1 + keep):
            again = rollout.generate(batch, samples=4)
            for name in fields:
                assert torch.equal(getattr(again, name), getattr(base, name)), f"{name} at batch {size}"
    mixed = Rollout(model, settings, 3, decode_path="fused").generate(batch.take(shuffled), samples=4)
    rows = [4 * shuffled.index(i) + k for i in range(17) for k in range(4)]
    assert torch.equal(mixed.logprobs[rows][:, : base.mask.shape[1]], base.logprobs)
    assert [mixed.response_ids()[row] for row in rows] == base.response_ids()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama 8/2 heads of 128", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_added_in_float32(name, dtype):
    """A LoRA's product is added in float32, and freed after the rollout; the reference model has none."""
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    module = MODELS[name]().to(dtype)
    plain, rows = Model(module), random_rows(20, 3)
    before = hidden(FusedDecoder.make(plain), rows, at_once(rows))
    model = Model(lora.attach(module, LoraConfig(rank=2), "lm", 0), cfg=ModelConfig())
    model.module.eval()
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    decoder = FusedDecoder.make(model)
    found = hidden(decoder, rows, at_once(rows))
    exact = copy.deepcopy(model)  # in bfloat16 the model itself is off by up to 4 %
    exact.module.float()
    for row, ours, without in zip(rows, found, before, strict=True):
        theirs = exact.hidden(torch.tensor([row]))[0]
        error, change = (ours - theirs).norm() / theirs.norm(), (without - theirs).norm() / theirs.norm()
        assert error <= (1e-5 if dtype == torch.float32 else 0.02) and change > 10 * error
    assert decoder._weights is None and decoder._step is None, (
        "the sums of weights are still in memory after the rollout"
    )
    for ours, theirs in zip(hidden(FusedDecoder.make(model.reference()), rows, at_once(rows)), before, strict=True):
        assert torch.equal(ours, theirs)


def test_updated_and_moved_weights_are_used():
    model, rows = Model(MODELS["llama 4/4 heads of 64"]()), random_rows(12)
    decoder = FusedDecoder.make(model)
    for change in (lambda p: p.add_(0.05 * torch.randn_like(p)), lambda p: setattr(p, "data", 1.1 * p.data)):
        with torch.no_grad():
            for parameter in model.module.parameters():
                change(parameter)
            theirs = model.hidden(torch.tensor(rows))[0]
        ours = hidden(decoder, rows, at_once(rows))[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}], ids=["plain", "top-p"])
def test_peak_memory_is_little_more_than_weights_and_cache(filters):
    """The rest is at most 5 % of the weights, and with a filter also one row of logits a response."""
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 16384}
    model, batch = Model(build("Llama", **large)()), prompts(3, 30, 17, 9, 1, 12, 8, 5)
    rollout = Rollout(model, sampling(**filters), decode_path="fused", keep_cache=True)
    rollout.generate(batch)
    cache = rollout._cache.memory.nbytes
    rollout._cache = None
    weights = sum(p.nbytes for p in model.module.parameters())
    logits = len(batch.uids) * 16384 * 4 if filters else 0
    assert peak_bytes(lambda: rollout.generate(batch)) <= cache + logits + 0.05 * weights


def test_a_wrong_family_table_is_refused(monkeypatch):
    """verify_decoder refuses a family whose function reads one number wrong."""
    right = architectures.FAMILIES["LlamaModel"]

    def wrong(decoder):
        parts = right(decoder)
        return parts._replace(layers=[layer._replace(scale=layer.scale * 1.2) for layer in parts.layers])

    monkeypatch.setitem(architectures.FAMILIES, "LlamaModel", wrong)
    with pytest.raises(Unsupported, match="hidden states over our cache are off by"):
        FusedDecoder.make(Model(MODELS["llama 4/4 heads of 64"]()))


def adapted(*targets: str) -> Model:
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    return Model(lora.attach(build("Llama")(), LoraConfig(rank=2, targets=targets), "lm", 0))


def changed_llama(change):
    """Return a function that makes a llama and changes it in place."""

    def make():
        module = build("Llama", attention_bias=True)()
        change(module.model)
        return module

    return make


def widen(decoder):
    layer = decoder.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(layer, name, torch.nn.Linear(32, 64, bias=False))
    layer.down_proj = torch.nn.Linear(64, 32, bias=False)


def test_an_adapter_on_the_embedding_is_refused():
    """Its weight is without the adapter. A new adapter adds 0, so that comparing hidden states would not notice."""
    with pytest.raises(Unsupported, match="its embedding is a "):
        FusedDecoder.make(adapted("q_proj", "embed_tokens"))


def test_weights_that_change_their_dtype_between_rollouts_are_refused():
    model = Model(build("Llama")())
    rollout, batch = Rollout(model, sampling(), decode_path="fused"), prompts(3, 5)
    rollout.generate(batch)
    model.decoder.layers[0].mlp.double()
    with pytest.raises(UserError, match=r"can no longer be decoded, because a weight is torch\.float64"):
        rollout.generate(batch)


def test_tokens_and_positions_out_of_range_are_refused():
    decoder = FusedDecoder.make(Model(build("Llama")()))
    for rows, message in (([[3, V]], "a token is not one of the embedding's"), ([[-1]], "a token is not one")):
        with pytest.raises(RuntimeError, match=message):
            hidden(decoder, rows, at_once(rows))
    cache = PagedKVCache(decoder.shapes, decoder.dtype, torch.device("cpu"), 2, 1, 2, 4)
    cache.assign(0, cache.allocate(2))
    one = torch.tensor([8], dtype=torch.int32)
    with decoder.session(), pytest.raises(RuntimeError, match="a position is beyond the block table"):
        decoder.hidden(cache, TokenBatch(torch.tensor([3]), one, 0 * one, cache.block_table))


@pytest.mark.parametrize(
    "make, reason",
    [
        (changed_llama(widen), "its layers differ in width"),
        (build("Gemma", head_dim=8), "there is no step for GemmaModel"),
        (build("Llama", hidden_act="relu"), "its activation is relu"),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused(make, reason):
    with pytest.raises(Unsupported, match=reason):
        FusedDecoder.make(Model(make()))


def test_structures_of_another_build_are_refused():
    with pytest.raises(RuntimeError, match="describe a decoder differently; install rlhf-fast again"):
        compiled_step.find_kernels().decode_step_workspace(0, 1, ctypes.sizeof(compiled_step._Layer), 1, 0, 1, 0)
