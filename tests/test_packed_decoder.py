"""The training forward on packed rows: against the module's own in float64, and where it steps aside."""

import copy
from types import SimpleNamespace

import pytest
import torch
from architectures import GPT, build, halved
from test_fused import MODELS

from rlhf_fast import ops
from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.model import architectures, packed_decoder
from rlhf_fast.model.model import Model
from rlhf_fast.model.packing import pack_rows

pytestmark = pytest.mark.skipif(ops.varlen_attention.chosen("cpu") == "reference", reason="no compiled kernels")


def random_batch(model: Model, prompts: list[int], responses: list[list[int]]):
    """Return tokens, prompt lengths and lengths: for each prompt length, rows with the response lengths beside it."""
    rows = []
    for length, sizes in zip(prompts, responses, strict=True):
        prompt = torch.randint(3, model.num_tokens, (length,))
        rows += [(torch.cat([prompt, torch.randint(3, model.num_tokens, (size,))]), length) for size in sizes]
    order = torch.randperm(len(rows)).tolist()
    tokens = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.int64)
    for i, index in enumerate(order):
        tokens[i, : len(rows[index][0])] = rows[index][0]
    return tokens, torch.tensor([rows[i][1] for i in order]), torch.tensor([len(rows[i][0]) for i in order])


def module_states(module, tokens, first, lengths):
    """Return the module's own hidden states before each response token, in row order."""
    states = module.base_model(tokens, use_cache=False).last_hidden_state
    return torch.cat([states[b, first[b] - 1 : lengths[b] - 1] for b in range(len(tokens))])


def states_and_gradients(states, parameters, weights):
    gradients = torch.autograd.grad((states.double() * weights).sum(), parameters, allow_unused=True)
    return states.detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]


def distance(actual, expected) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.exhaustive(14)
def test_states_and_all_gradients_are_those_of_the_module(name, dtype):
    """About as far from a float64 copy as the module's own forward is."""
    model = Model(halved(MODELS[name]()).to(dtype))
    assert model.packed_refusal is None
    tokens, first, lengths = random_batch(model, [17, 1, 5], [[11, 1, 25], [7, 7], [16]])
    exact = copy.deepcopy(model.module).double()
    weights = torch.randn(int((lengths - first).sum()), model.head_weight.shape[1], dtype=torch.float64)
    found = [
        states_and_gradients(states, list(module.base_model.parameters()), weights)
        for module, states in (
            (model.module, model.hidden_and_targets(tokens, first, lengths)[0]),
            (model.module, module_states(model.module, tokens, first, lengths)),
            (exact, module_states(exact, tokens, first, lengths)),
        )
    ]
    (ours, our_gradients), (theirs, their_gradients), (expected, gradients) = found
    factor, slack = (3, 5e-6) if dtype == torch.float32 else (3, 5e-3)
    assert distance(ours, expected) <= factor * distance(theirs, expected) + slack
    names = [name for name, _ in model.module.base_model.named_parameters()]
    for parameter, mine, other, right in zip(names, our_gradients, their_gradients, gradients, strict=True):
        if right.norm() > 1e-9 * max(g.norm() for g in gradients):  # a bias of keys shifts all scores alike
            assert distance(mine, right) <= factor * distance(other, right) + 5 * slack, parameter


def test_pack_rows_holds_each_token_once_and_shares_equal_prompts():
    tokens = torch.randint(1, 50, (5, 9))
    lengths, prompts = torch.tensor([9, 7, 3, 0, 9]), torch.tensor([4, 4, 3, 0, 4])
    tokens[1, :4] = tokens[4, :4] = tokens[0, :4]
    rows = pack_rows(tokens, lengths, prompts)
    assert len(rows.tokens) == 4 + 5 + 3 + 3 + 5
    b, t = (torch.arange(9) < lengths[:, None]).nonzero(as_tuple=True)
    assert torch.equal(rows.tokens[rows.locate(b, t)], tokens[b, t])
    assert torch.equal(rows.positions[rows.locate(b, t)], t)
    assert rows.parents.tolist() == [-1, 0, 0, -1, -1, 0]
    plain = pack_rows(tokens, lengths)
    assert plain.parents is None and plain.offsets.diff().tolist() == lengths.tolist()


def test_only_what_a_loss_reads_is_computed(monkeypatch):
    """No padding, no token after the last one with a loss, no row without one, and a prompt once for all its rows."""
    model = Model(build("Llama")())
    tokens, first, lengths = random_batch(model, [9, 9], [[4, 5, 6], [20]])
    keep = torch.arange(20) < (lengths - first)[:, None]
    keep[lengths == 29] = False
    seen = []
    call = packed_decoder.packed_hidden
    monkeypatch.setattr(
        packed_decoder, "packed_hidden", lambda parts, rows, *a: seen.append(rows) or call(parts, rows, *a)
    )
    assert model.packs_rows
    seen.clear()
    hidden, targets, _ = model.hidden_and_targets(tokens, first, lengths, keep)
    assert len(seen[0].tokens) == 9 + 3 + 4 + 5 and len(hidden) == len(targets) == 4 + 5 + 6
    hidden, targets, _ = model.hidden_and_targets(tokens, first, lengths, torch.zeros_like(keep))
    assert hidden.shape == (0, 32) and not len(targets)


def test_a_shared_prompt_changes_no_score_and_no_gradient():
    model = Model(build("Llama")())
    tokens, first, lengths = random_batch(model, [17, 6], [[3, 9, 1, 30], [2, 2]])
    found = []
    for prompts in (first, None):
        rows = pack_rows(tokens, lengths, prompts)
        kept = rows.locate(torch.arange(len(tokens)), lengths - 1)
        states = model.run_packed(rows, kept)
        weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
        found.append(states_and_gradients(states, list(model.module.model.parameters()), weights))
    assert distance(found[0][0], found[1][0]) < 1e-5
    assert all(distance(a, b) < 1e-4 for a, b in zip(found[0][1], found[1][1], strict=True))


def test_wrong_layers_are_refused(monkeypatch):
    right = architectures.FAMILIES["LlamaModel"]

    def wrong(decoder):
        parts = right(decoder)
        return parts._replace(layers=[layer._replace(scale=layer.scale * 1.01) for layer in parts.layers])

    monkeypatch.setitem(architectures.FAMILIES, "LlamaModel", wrong)
    assert "hidden states differ" in Model(build("Llama")()).packed_refusal
    monkeypatch.undo()
    mlp = packed_decoder._mlp
    monkeypatch.setattr(packed_decoder, "_mlp", lambda *args: 0.99 * (y := mlp(*args)) + 0.01 * y.detach())
    assert "a gradient differs" in Model(build("Llama")()).packed_refusal


def test_other_architectures_and_hooks_run_the_module():
    model = Model(build("Phi")())
    assert "there is no step for PhiModel" in model.packed_refusal
    model = Model(build("GPT2", GPT)())
    batch = random_batch(model, [4, 3], [[5], [7, 2]])
    expected = model.hidden_and_targets(*batch)[0]
    calls = []
    handle = model.decoder.h[0].register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in model.packed_refusal
    torch.testing.assert_close(model.hidden_and_targets(*batch)[0], expected, rtol=1e-4, atol=1e-5)
    assert calls
    handle.remove()
    assert model.packs_rows
    handle = model.decoder.h[0].register_full_backward_pre_hook(lambda *_: None)
    assert "hooks" in model.packed_refusal
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks" in model.packed_refusal
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in model.packed_refusal
    assert model.packs_rows


def test_angles_that_depend_on_the_longest_row_are_refused():
    model = Model(build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})())
    assert "depends on the longest row" in model.packed_refusal


def test_a_module_that_is_replaced_is_looked_at_again():
    model = Model(build("Llama")())
    assert model.packs_rows
    for layer in model.decoder.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    assert "its activation is relu" == model.packed_refusal
    model = Model(build("Llama")())
    assert model.packs_rows
    forward = model.decoder.layers[1].mlp.forward
    model.decoder.layers[1].mlp.forward = lambda x: 2 * forward(x)
    assert "hidden states differ" in model.packed_refusal


def test_a_gradient_is_compared_where_only_a_middle_layer_is_trained(monkeypatch):
    mlp = packed_decoder._mlp
    monkeypatch.setattr(packed_decoder, "_mlp", lambda *args: 0.9 * (y := mlp(*args)) + 0.1 * y.detach())
    model = Model(build("Llama", num_hidden_layers=3)())
    model.module.requires_grad_(False)
    model.decoder.layers[1].requires_grad_(True)
    assert "a gradient differs" in model.packed_refusal


def test_the_first_pass_may_be_in_inference_mode_and_lengths_of_int32():
    model = Model(build("Llama")())
    tokens, first, lengths = random_batch(model, [4, 3], [[5], [7, 2]])
    with torch.inference_mode():
        found = model.logprobs(tokens, first.int(), lengths.int())[0]
    assert torch.equal(found.clone(), model.logprobs(tokens, first, lengths)[0].detach())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ()], ids=["two", "all"])
def test_adapters_have_the_gradients_of_the_module(targets):
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    model = Model(build("Llama")())
    model.module = lora.attach(model.module, LoraConfig(rank=2, targets=targets), "lm", 0)
    model.module.eval()
    for p in model.trainable().values():
        torch.nn.init.normal_(p.data, std=0.1)
    assert model.packed_refusal is None
    tokens, first, lengths = random_batch(model, [5, 2], [[9, 3], [1]])
    weights = torch.randn(13, 32, dtype=torch.float64)
    parameters = list(model.trainable().values())
    ours = states_and_gradients(model.hidden_and_targets(tokens, first, lengths)[0], parameters, weights)
    handle = model.decoder.register_forward_hook(lambda *_: None)  # the module's own forward
    theirs = states_and_gradients(model.hidden_and_targets(tokens, first, lengths)[0], parameters, weights)
    handle.remove()
    assert all(distance(a, b) < 1e-4 for a, b in zip(ours[1], theirs[1], strict=True))
    with torch.no_grad():
        assert model.reference().packs_rows
        base = model.reference().hidden_and_targets(tokens, first, lengths)[0]
    assert distance(base, ours[0]) > 1e-3


def test_repeats_and_checkpointing_give_the_same_bits():
    model = Model(build("Qwen3", head_dim=8)())
    batch = random_batch(model, [5, 12], [[9, 3], [1, 30]])
    weights = torch.randn(43, 32, dtype=torch.float64)
    parameters = list(model.module.model.parameters())

    def run():
        return states_and_gradients(model.hidden_and_targets(*batch)[0], parameters, weights)

    first, again = run(), run()
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    with model.train_mode():
        checkpointed = run()
    for states, gradients in (again, checkpointed):
        assert torch.equal(states, first[0]) and all(map(torch.equal, gradients, first[1]))


def test_residual_dropout_drops_on_packed_rows():
    model = Model(build("Llama", num_hidden_layers=1)())
    batch = random_batch(model, [5], [[40]])
    expected = model.hidden_and_targets(*batch)[0]
    with model.train_mode(0.3):
        assert model.packs_rows
        draws = [model.hidden_and_targets(*batch)[0] for _ in range(2)]
        torch.manual_seed(3)
        seeded = model.hidden_and_targets(*batch)[0]
        torch.manual_seed(3)
        assert torch.equal(seeded, model.hidden_and_targets(*batch)[0])
    assert distance(draws[0], expected) > 0.01 and distance(draws[0], draws[1]) > 0.01
    assert torch.equal(model.hidden_and_targets(*batch)[0], expected)


def test_a_gpu_runs_the_modules_own_layers_where_ours_are_not_captured(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(type(ops.varlen_attention), "chosen", lambda *_: "triton")

    def find(device: torch.device, checkpoints: bool, capture_failed: bool) -> str | None:
        model = SimpleNamespace(device=device, exact=False)
        found = SimpleNamespace(hooks=[], checkpoints=checkpoints)
        return packed_decoder.find_obstacle(model, found, None, capture_failed)

    assert find(gpu, False, False) is None and find(cpu, True, True) is None
    assert "gradient checkpointing" in find(gpu, True, False)
    assert "could not be captured" in find(gpu, False, True)
    monkeypatch.setenv("RLHF_FAST_CUDA_GRAPHS", "0")
    assert "are off" in find(gpu, False, False) and find(cpu, False, False) is None
    assert "no kernels here" in find(torch.device("meta"), False, False)
