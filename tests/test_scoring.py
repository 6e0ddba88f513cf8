"""Scoring of continuations: against a float64 pass of each request alone, over all paths, and what is read once."""

import random

import pytest
import torch
from architectures import GPT, V, build
from test_rollout import STORIES
from tiny_llama import scorer as tiny_scorer

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import kv_cache
from rlhf_fast.rollout.prefix_tree import build_prefix_tree
from rlhf_fast.scoring import PAGE_SIZES, Score, Scorer

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = ["attention", "fused", "transformers"]
Request = tuple[list[int], list[int]]


@torch.no_grad()
def by_row(module, requests: list[Request]) -> list[Score]:
    """Score each request by a pass of its own in float64."""
    scores = []
    for context, continuation in requests:
        logits = module(input_ids=torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0]
        found = logits[len(context) - 1 :].double().log_softmax(-1)
        rows = torch.arange(len(continuation))
        greedy = bool((found.argmax(-1) == torch.tensor(continuation)).all())
        scores.append(Score(float(found[rows, continuation].sum()), greedy, len(continuation)))
    return scores


def double(model: Model) -> torch.nn.Module:
    """Return a copy of the module in float64."""
    module = type(model.module)(model.module.config).double().eval()
    module.load_state_dict({name: x.double() for name, x in model.module.state_dict().items()})
    return module


def draw_requests(rng: random.Random, vocab_size: int, longest: int = 70) -> list[Request]:
    """Requests whose contexts share prefixes that end within and at the ends of pages; equal ones; one-token ones."""

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    shared = draw(longest)
    requests = []
    for _ in range(30):
        context = shared[: rng.choice([1, 3, 5, 31, 32, 33, 64, longest])] + draw(rng.choice([0, 1, 9, 30]))
        requests += [(context, draw(rng.randrange(1, 12))) for _ in range(rng.randrange(1, 4))]
    requests += [(shared[:k], shared[k : k + 1]) for k in range(1, longest)]  # inputs that are prefixes of others
    requests += [(shared[:1], shared[1:]), *requests[:5]]
    rng.shuffle(requests)
    return requests


@torch.no_grad()
def with_greedy(module, requests: list[Request], count: int = 8) -> list[Request]:
    """Add the greedy continuations of some contexts."""
    added = []
    for context, _ in requests[:count]:
        tokens = list(context)
        for _ in range(3):
            tokens.append(int(module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        added.append((list(context), tokens[len(context) :]))
    return requests + added


def assert_equal_scores(found: list[Score], expected: list[Score], tolerance: float = 1e-4) -> None:
    assert [score.greedy for score in found] == [score.greedy for score in expected]
    assert [score.num_tokens for score in found] == [score.num_tokens for score in expected]
    errors = [abs(a.logprob - b.logprob) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= tolerance


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES}")
    model = Model.load(ModelConfig(str(STORIES)))
    reference = double(model)
    requests = with_greedy(reference, draw_requests(random.Random(1), 512))
    return model, requests, by_row(reference, requests)


@pytest.mark.parametrize("max_tokens", [64, 300, 4096])
@pytest.mark.parametrize("path", PATHS)
def test_scores_are_those_of_each_row_alone(stories, path, max_tokens):
    model, requests, expected = stories
    scorer = Scorer(model, decode_path=path, max_tokens=max_tokens)
    assert scorer.decode_path == path
    assert_equal_scores(scorer(requests), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_families(name, path):
    """Biases, positions that are learned, a soft cap of the logits: no path needs a family of its own."""
    model = Model(build(name)())
    if path == "fused" and name == "Gemma2":
        path = "auto"
    reference = double(model)
    requests = with_greedy(reference, draw_requests(random.Random(name), V, 12))
    requests = [(context[:8], continuation[:4]) for context, continuation in requests]
    scorer = Scorer(model, decode_path=path)
    assert_equal_scores(scorer(requests), by_row(reference, requests))


def test_an_exact_scorer_path_gives_equal_bits_whatever_the_order_and_the_chunk(stories):
    model, requests, _ = stories
    expected = Scorer(model, decode_path="fused")(requests)
    order = random.Random(2).sample(range(len(requests)), len(requests))
    for max_tokens in (64, 700, 4096):
        found = Scorer(model, decode_path="fused", max_tokens=max_tokens)([requests[i] for i in order])
        assert found == [expected[i] for i in order]


def test_each_prefix_is_read_once(stories):
    model, _, _ = stories
    head = list(range(10, 50))
    requests = [([*head, 60 + i], [5, 6, 70 + i]) for i in range(20)]
    scorer = Scorer(model)
    found = scorer(requests)
    assert scorer.tokens_read == len(head) + 20 * 3  # the last token of a continuation is not read
    assert len(found) == 20
    scorer = Scorer(model)
    scorer(requests * 3)
    assert scorer.tokens_read == len(head) + 20 * 3
    scorer = Scorer(model)
    scorer([(head[:k], head[k : k + 1]) for k in range(1, len(head))])
    assert scorer.tokens_read == len(head) - 1


def test_memory_does_not_grow_with_the_number_of_requests(stories, monkeypatch):
    model, requests, _ = stories
    sizes = []
    init = kv_cache.PagedKVCache.__init__

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        sizes.append(self.num_pages * self.page_size)

    monkeypatch.setattr(kv_cache.PagedKVCache, "__init__", counted)
    many = requests + draw_requests(random.Random(3), 512) + draw_requests(random.Random(4), 512)
    scorer = Scorer(model, decode_path="fused", max_tokens=300)
    sizes.clear()
    scorer(many)
    assert len(sizes) > 4
    # each node's last page may be its own, filled by one token
    assert max(sizes) <= 300 * PAGE_SIZES["cpu"]


def test_half_precision(stories):
    """bfloat16 scores are near those of float32; equal requests are equal."""
    model, requests, expected = stories
    half = Model.load(ModelConfig(str(STORIES), dtype="bfloat16"))
    found = Scorer(half)(requests)
    errors = [abs(a.logprob - b.logprob) / b.num_tokens for a, b in zip(found, expected, strict=True)]
    assert sum(errors) / len(errors) < 0.05
    assert model.head_weight.dtype == torch.float32


def test_what_auto_takes(stories):
    model, _, _ = stories
    assert Scorer(model).decode_path == "fused"
    assert Scorer(Model(build("Mamba")())).decode_path == "transformers"


@pytest.mark.parametrize(
    "requests, sentence",
    [
        ([([1, 2], [3]), ([], [3])], "request 1 has no context; give it at least one token"),
        ([([1, 2], [])], "request 0 has no continuation; give it at least one token"),
        ([([1, 99999], [3])], "request 0: token 99999 is not one of the model's"),
        ([([1, -1], [3])], "request 0: token -1 is not one of the model's"),
        ([([1] * 600, [3])], "request 0: 601 tokens are more than the model's 512 positions and one"),
        ([([1], [3]), ("a", "b")], "request 1 has text; give pairs of token lists, .*tokenizer.context.*input_ids"),
        ([(["a"], [3])], "request 0 has text; give pairs of token lists"),
        ([([1.5], [3])], "request 0 has tokens of type float; give pairs"),
        ([[1, 2, 3]], "request 0 is .1, 2, 3.; give pairs of token lists, .context, continuation"),
        ([([1, 2], 3)], "request 0 is .*; give pairs of token lists"),
        ("ab", "requests are of type str; give a list of pairs"),
    ],
)
def test_bad_requests(stories, requests, sentence):
    with pytest.raises(UserError, match=sentence.replace("'", ".")):
        Scorer(stories[0])(requests)


def test_what_is_no_model_is_named(stories):
    with pytest.raises(UserError, match=r"^Scorer: model must be a Model, got LlamaForCausalLM; Model.load\(path\)"):
        Scorer(stories[0].module)


FULL = {
    "Llama": build("Llama"),
    "GPT2": build("GPT2", GPT),
    "GPTNeo": build("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "GPTJ": build("GPTJ", GPT, rotary_dim=4),
    "OpenAIGPT": build("OpenAIGPT", GPT),
    "OPT": build("OPT"),
    "GPTBigCode": build("GPTBigCode", GPT),
}
"""Positions that are computed, learned or looked up; some models no decoder serves."""


@pytest.mark.parametrize("path", ["auto", "transformers"])
@pytest.mark.parametrize("name", FULL)
def test_a_request_may_fill_all_positions(name, path):
    """Its last token is read by no layer, so there is one more; a shorter row is beside it."""
    model, rng = Model(FULL[name]()), random.Random(name)
    tokens = [rng.randrange(3, V) for _ in range(model.max_positions + 1)]
    assert len(tokens) == 65
    requests = [(tokens[:1], tokens[1:]), (tokens[:-1], tokens[-1:]), (tokens[5:30], tokens[1:9])]
    scorer = Scorer(model, decode_path=path)
    assert scorer.decode_path == "transformers" or path == "auto"
    reference = double(model)
    assert_equal_scores(scorer(requests), by_row(reference, requests), 2e-3)
    with pytest.raises(UserError, match="66 tokens are more than the model's 64 positions and one"):
        scorer([(tokens, tokens[:1])])


def test_no_requests(stories):
    assert Scorer(stories[0])([]) == []


def test_a_model_without_a_language_head_is_refused():
    with pytest.raises(UserError, match="has no language-model head"):
        Scorer(tiny_scorer())


def test_the_tree_has_each_shared_prefix_once():
    rng = random.Random(6)
    for trial in range(200):
        words = {tuple(rng.randrange(2) for _ in range(rng.randrange(0, 9))) for _ in range(rng.randrange(1, 20))}
        sequences = sorted(words)
        min_shared, multiple = rng.choice([(1, 1), (2, 1), (4, 1), (1, 2), (4, 4)])
        ends = build_prefix_tree(sequences, min_shared, multiple)
        nodes = set()
        for sequence, end in zip(sequences, ends, strict=True):
            path = [] if end is None else end.path()
            assert tuple(token for node in path for token in node.tokens) == sequence, trial
            assert [node.level for node in path] == list(range(len(path)))
            assert all(node.end % multiple == 0 and len(node.tokens) >= min_shared for node in path[:-1])
            nodes |= set(path)
        if (min_shared, multiple) == (1, 1):
            prefixes = {sequence[:k] for sequence in sequences for k in range(1, len(sequence) + 1)}
            assert sum(len(node.tokens) for node in nodes) == len(prefixes)
