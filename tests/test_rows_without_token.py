"""Ids that no token has are never sampled, and have no share in the probabilities of samples and scores. Every path."""

import copy
import itertools

import pytest
import torch
import toy
from architectures import GPT, SERVED, SMALL, V, build, prompts, sampling
from test_decode_graphs import device  # noqa: F401 (a fixture)
from tiny_llama import scorer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_fast.batches import Demonstrations
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import check_saving
from rlhf_fast.rollout import fused
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages import sft
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.losses import ppo_policy_loss, sft_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = 48
"""The tokenizers' last id; the embeddings have V = 61 rows."""
VOCABULARIES = {
    "a padded embedding": list(range(LAST + 1)),
    "reserved ids below the last token": [i for i in range(LAST + 1) if i % 5 != 3],
    "an id of its own far behind the others": [*range(30), V - 1],
}
SCALE = {"initializer_range": 0.1}  # larger weights enlarge the rounding of float32, a temperature of 0.02 does again
FAMILIES = {
    "llama": build("Llama", **SCALE),
    "gpt2, tied": build("GPT2", GPT, **SCALE),
    "phi, with a bias": build("Phi", **SCALE),
    "granite, scaled": build("Granite", logits_scaling=2.0, **SCALE),
}


class Words:
    """A tokenizer with these ids."""

    chat_template = None

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.eos_token_id = 2

    def get_vocab(self) -> dict[str, int]:
        return {f"word {i}": i for i in self.ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [f"word {i}" if i in self.ids else None for i in ids]

    def batch_decode(self, rows, **_) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def likely_without(make, ids: list[int]) -> Model:
    """Return a model whose rows without a token are far likelier than the others."""
    module = make().eval()
    missing = sorted(set(range(V)) - set(ids))
    head = module.get_output_embeddings()
    with torch.no_grad():
        head.weight[missing] *= 12
        if head.bias is not None:
            head.bias.normal_()
            head.bias[missing] += 5
    return Model(module, Words(ids))


def true_logprobs(model: Model, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log-probabilities (B, T, V) in float64, from the logits of a float64 copy of transformers' module, without
    the ids that have no token."""
    with torch.no_grad():
        logits = copy.deepcopy(model.module).double()(input_ids=tokens).logits / temperature
    missing = sorted(set(range(V)) - set(model.tokenizer.ids))
    return logits.index_fill(-1, torch.tensor(missing), -torch.inf).log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "vocabulary", "decode_path"),
    [case for case in itertools.product(FAMILIES, VOCABULARIES, ["fused", "op by op", "attention", "transformers"])
     if case[0] in ("llama", "gpt2, tied") or case[2] in ("attention", "transformers")],
)  # fmt: skip
@pytest.mark.exhaustive(1, by=("decode_path", "vocabulary"))
def test_ids_without_a_token_are_not_sampled(family, vocabulary, decode_path, monkeypatch):
    """A padded embedding is known to have been sampled from; reserved ids, and a head with a bias, are of that kind."""
    if decode_path == "op by op":
        monkeypatch.setattr(fused, "find_kernels", lambda _: None)
    path = "fused" if decode_path == "op by op" else decode_path
    ids = VOCABULARIES[vocabulary]
    model = likely_without(FAMILIES[family], ids)
    for settings in (
        {"temperature": 1.3},
        {"temperature": 3000.0},
        {"temperature": 0.02},
        {"temperature": 0.0},
        {"min_new_tokens": 6, "top_p": 0.9},
    ):
        found = Rollout(model, sampling(**settings), seed=4, decode_path=path).generate(prompts(3, 7, 5), samples=4)
        assert {token for row in found.response_ids() for token in row} <= set(ids)
        temperature = settings.get("temperature", 1.0) or 1.0
        atol = max(1e-4, 1e-5 / temperature)  # a low temperature enlarges the rounding of float32 logits
        rows = (found.tokens, found.prompt_lengths, found.lengths)
        ours, entropy = model.logprobs(*rows, temperature, sampled_tokens_only=True)
        torch.testing.assert_close(found.logprobs, ours, rtol=0, atol=atol)
        if settings.get("temperature", 1.0):
            torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=atol)
        for row, (start, end) in enumerate(zip(found.prompt_lengths.tolist(), found.lengths.tolist(), strict=True)):
            truth = true_logprobs(model, found.tokens[row : row + 1, :end], temperature)[0, start - 1 : end - 1]
            drawn = truth.gather(1, found.tokens[row, start:end, None])[:, 0]
            torch.testing.assert_close(found.logprobs[row, : end - start].double(), drawn, rtol=0, atol=atol)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_graphs_hold_the_head_of_the_tokens(vocabulary, device):  # noqa: F811
    """Another tokenizer needs new graphs: its head is at the same address, but has another size."""
    ids = VOCABULARIES[vocabulary]
    model = likely_without(SERVED["llama"], ids)
    model.module.to(device)
    rollout = Rollout(model, sampling(temperature=1.3), keep_cache=True, decode_path="fused")
    batch = prompts(3, 7)
    assert {token for row in rollout.generate(batch, samples=4).response_ids() for token in row} <= set(ids)
    first = rollout._graphs
    rollout.generate(batch, samples=4)
    assert first is not None and rollout._graphs is first and first.num_graphs
    model.tokenizer = Words(list(range(20)))
    again = Rollout(model, sampling(temperature=1.3), keep_cache=True, decode_path="fused")
    again._cache, again._graphs = rollout._cache, first
    found = again.generate(batch, samples=4).response_ids()
    assert max(token for row in found for token in row) < 20 and again._graphs is not first


def test_ids_that_share_a_name_are_tokens():
    """As parts of characters do in some tokenizers, whose `get_vocab` then names only one of them."""

    class Shared(Words):
        def get_vocab(self) -> dict[str, int]:
            return {"\ufffd" if i < 30 else f"word {i}": i for i in self.ids}

    model = Model(SERVED["llama"](), Shared(VOCABULARIES["reserved ids below the last token"]))
    assert model.vocabulary.unused == [i for i in range(LAST) if i % 5 == 3]

    class Failing(Words):
        def convert_ids_to_tokens(self, ids):
            raise IndexError("piece id is out of range")

    model = Model(SERVED["llama"](), Failing([0, 1, 2, 5]))
    assert model.vocabulary.unused == [3, 4]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_ratio_of_ppos_first_step_is_1(vocabulary):
    """The policy's padding is larger than its reference's, and likelier."""
    model = likely_without(FAMILIES["phi, with a bias"], VOCABULARIES[vocabulary])
    cfg = PPOConfig(sampling=sampling(temperature=1.2), batch=8, minibatch=8, policy=ModelConfig("toy"))
    responses = Rollout(model, cfg.sampling).generate(prompts(3, 5), samples=4)
    value = scorer()
    experience, stats = make_experience(responses, model, model, value, lambda r: torch.rand(len(r.lengths)), cfg)
    assert abs(stats["objective/kl"]) < 1e-3
    _, stats = ppo_policy_loss(model, experience, experience.num_items(), temperature=1.2, measure_gap=True)
    assert abs(float(stats["val/ratio"]) - 1) < 1e-4 and 0 <= float(stats["rollout/gap_max"]) < 1e-4


def test_their_gradient_is_zero():
    model = likely_without(FAMILIES["phi, with a bias"], VOCABULARIES["reserved ids below the last token"])
    head = model.head_layer
    tokens = torch.tensor([[4, 7, 9, 10, 5, 2]])
    logprobs, entropy = model.logprobs(tokens, torch.tensor([2]), torch.tensor([6]), sampled_tokens_only=True)
    (logprobs.sum() + entropy.sum()).backward()
    missing = torch.tensor(sorted(set(range(V)) - set(model.tokenizer.ids)))
    assert head.weight.grad.shape == head.weight.shape and head.bias.grad.shape == (V,)
    assert not head.weight.grad[missing].any() and not head.bias.grad[missing].any()
    assert head.weight.grad[model.tokenizer.ids].any(1).all()


@torch.no_grad()
def test_the_cross_entropy_is_over_all_rows():
    """As everywhere, so that it takes their probability away for other programs too."""
    model = likely_without(FAMILIES["llama"], VOCABULARIES["a padded embedding"])
    tokens = torch.tensor([[4, 7, 9, 10, 5, 2]])
    batch = Demonstrations(tokens, torch.tensor([2]), torch.tensor([6]))
    loss, _ = sft_loss(model, batch, batch.num_items())
    logprobs = model.module(input_ids=tokens).logits.double().log_softmax(-1)[0, 1:-1]
    torch.testing.assert_close(loss.double(), -logprobs.gather(1, tokens[0, 2:, None]).mean(), rtol=1e-5, atol=1e-6)
    row = (tokens, torch.tensor([2]), torch.tensor([6]))
    torch.testing.assert_close(loss, -model.logprobs(*row)[0].mean())
    assert loss > -model.logprobs(*row, sampled_tokens_only=True)[0].mean() + 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2, tied", "phi, with a bias"])
def test_logprobs_are_those_of_transformers(family):
    """Over all rows, at another temperature too, unless the sampled distribution is asked for by name."""
    model = likely_without(FAMILIES[family], VOCABULARIES["reserved ids below the last token"])
    tokens = torch.tensor([[4, 7, 9, 10, 5, 2]])
    for temperature in (1.0, 0.7):
        expected = (model.module(input_ids=tokens).logits.double() / temperature).log_softmax(-1)[:, 1:-1]
        logprobs, entropy = model.logprobs(tokens, torch.tensor([2]), torch.tensor([6]), temperature)
        torch.testing.assert_close(
            logprobs.double(), expected.gather(2, tokens[:, 2:, None])[..., 0], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_compared_over_all_rows(tmp_path):
    """transformers counts the rows without a token, so a comparison with its numbers does."""
    folder = toy.model(tmp_path / "model")
    module = AutoModelForCausalLM.from_pretrained(folder)
    module.resize_token_embeddings(64, mean_resizing=False)
    model = Model(module, toy.tokenizer())
    assert int(model.probe_tokens(8, 64).max()) < model.num_tokens
    check_saving(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_model_from_a_folder(kind, tmp_path):
    """The tokens of `added_tokens_decoder` count; a token that is added later has a row."""
    folder = toy.model(tmp_path, kind)
    module = AutoModelForCausalLM.from_pretrained(folder)
    module.resize_token_embeddings(64, mean_resizing=False)
    module.save_pretrained(folder)
    model = Model.load(ModelConfig(folder))
    size = len(model.tokenizer)
    assert model.num_tokens == size < model.num_rows == 64
    found = Rollout(model, sampling(max_new_tokens=30)).generate(["a b", "c"], samples=20)
    assert int(found.tokens.max()) < size
    model.tokenizer.add_tokens(["<one more>"])
    assert Model(model.module, model.tokenizer).num_tokens == size + 1
    model.tokenizer.add_tokens([f"<{i}>" for i in range(64)])
    with pytest.raises(
        UserError, match=f"its tokenizer's token '<63>' has the id {size + 64}, and its embedding only 64"
    ):
        Model(model.module, model.tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_image_token_without_a_row(kind, tmp_path):
    """Text-only variants of Gemma 3 have one. Text that spells it is text; a template that writes it is refused."""
    folder = toy.model(tmp_path / "model", kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert max(Encoder(tokenizer).text("a <image> b")) < num_rows
    cfg = toy.sft(tmp_path, epochs=1)
    sft.run(cfg)
    model = Model.load(ModelConfig(cfg.out))
    assert model.num_tokens == model.num_rows == num_rows and len(model.tokenizer) == num_rows + 1
    assert len(Rollout(model, sampling(max_new_tokens=3)).generate(["a"]).tokens) == 1
    for change in (
        {"chat_template": "{% for turn in messages %}<image>{{ turn.content }}{% endfor %}"},
        {"eos_token": "<image>"},
    ):
        written = AutoTokenizer.from_pretrained(folder, **change)
        with pytest.raises(UserError, match=f"its tokenizer's token '<image>' has the id {num_rows}"):
            Model(model.module, written)
        written.save_pretrained(folder)
        with pytest.raises(UserError, match=f"{num_rows} vocabulary rows, .* up to number {num_rows} \\('<image>'\\)"):
            sft.run(toy.sft(tmp_path, out="refused"))


def test_a_scorer_that_lacks_rows_is_refused():
    """Before a run begins, though its tokenizer is the policy's."""
    config = LlamaConfig(**{**SMALL, "vocab_size": 40}, num_labels=1)
    with pytest.raises(
        UserError, match="its tokenizer's token 'word 48' has the id 48, and its embedding only 40 rows"
    ):
        Model(LlamaForSequenceClassification(config), Words(VOCABULARIES["a padded embedding"]), head="scalar")


def test_without_a_tokenizer_every_row_counts():
    model = Model(SERVED["llama"]())
    assert model.num_tokens == V and model.head_weight is model.head_layer.weight and model.head_bias is None


def test_a_soft_cap_leaves_reserved_ids_some_probability():
    """So they are refused where they would be sampled."""
    ids = VOCABULARIES["reserved ids below the last token"]
    model = likely_without(build("Gemma2", head_dim=8, sliding_window=4), ids)
    with pytest.raises(UserError, match=r"ids have no token in its tokenizer, for instance 3, and could be sampled"):
        Rollout(model, sampling())


def test_an_end_token_that_does_not_exist_ends_nothing():
    model = likely_without(SERVED["llama"], VOCABULARIES["reserved ids below the last token"])
    model.module.generation_config.eos_token_id = [7, 3, V - 1]
    rollout = Rollout(model, sampling(min_new_tokens=2))
    assert rollout.stop_criteria.end_tokens == [2, 7]
    model.module.generation_config.eos_token_id = list(range(V))
    with pytest.raises(UserError, match=r"sampling.min_new_tokens: each of the model's .* tokens ends a response"):
        Rollout(model, sampling(min_new_tokens=2))
