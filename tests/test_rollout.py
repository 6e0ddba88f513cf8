"""Rollouts on every path: greedy decoding, log-probabilities against one forward pass, stop criteria, seeds, texts."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from architectures import END, SERVED, V, build, greedy, llama, prompts, prompts_without_ties, sampling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_fast import batches
from rlhf_fast.batches import LENGTH, STOP, Prompts
from rlhf_fast.config.checks import BadSetting
from rlhf_fast.config.fields import ModelConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.stop_criteria import StopCriteria

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"
SMOLLM2 = os.environ.get("RLHF_FAST_SMOLLM2", "")
"""A folder with the weights of SmolLM2-135M."""
PATHS = ["fused", "attention", "transformers"]
FUSED = ["llama", "gpt2", "mistral, sliding window", "qwen2", "qwen3"]
FAMILIES = [*FUSED, "gemma2, soft caps", "cohere"]
TOLERANCE = 4e-5
"""Nats, in float32: these models have large weights (0.3) and round by up to 2e-5; a trained one stays within 1e-5."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=PATHS)
def decode_path(request):
    return request.param


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_transformers_generate(name):
    """Prompts of different lengths in one batch, each against generate() alone, over transformers' own cache. The other
    paths are in test_fused.py and test_attention_path.py."""
    model = Model(SERVED[name]())
    batch = prompts_without_ties(model.module, 1, 7, 3, 12)
    found = Rollout(model, sampling(temperature=0.0), decode_path="transformers").generate(batch).response_ids()
    assert found == [greedy(model.module, tokens) for tokens in batch.tokens]


def padded_greedy(module, batch: Prompts, count: int) -> list[list[int]]:
    """Return transformers' own responses to a batch that is padded on the left, up to their end tokens."""
    width = max(map(len, batch.tokens))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in batch.tokens])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch.tokens])
    ends = module.generation_config.eos_token_id
    rows = module.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)[:, width:]
    return [row[: row.index(ends) + 1] if ends in row else row for row in rows.tolist()]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_that_of_a_batch_padded_on_the_left(name):
    """Prompts of different lengths in float32, on the fastest path that serves the family."""
    model = Model(SERVED[name]())
    batch = prompts_without_ties(model.module, 1, 7, 3, 12, 5)
    rollout = Rollout(model, sampling(temperature=0.0), decode_path="fused" if name in FUSED else "attention")
    assert rollout.generate(batch).response_ids() == padded_greedy(model.module, batch, 12)


@pytest.mark.skipif(not SMOLLM2, reason="RLHF_FAST_SMOLLM2 names no folder with SmolLM2-135M")
def test_greedy_smollm2_is_transformers_generate():
    """A real model in float32, each prompt against generate() alone and the batch against one padded on the left."""
    model = Model.load(ModelConfig(SMOLLM2))
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was a small", "2, 4, 6,"]
    batch = Prompts.from_texts(model.tokenizer, texts)
    rollout = Rollout(model, sampling(temperature=0.0, max_new_tokens=24))
    found = rollout.generate(texts).response_ids()
    assert rollout.decode_path == "fused"
    assert found == [greedy(model.module, tokens, 24) for tokens in batch.tokens]
    assert found == padded_greedy(model.module, batch, 24)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
def test_greedy_story_is_that_of_the_models_author(decode_path):
    model = Model.load(ModelConfig(str(STORIES)))
    golden = (STORIES / "golden_greedy.txt").read_text()
    story = Prompts([0], [[model.tokenizer.bos_token_id]], [""])
    settings = SamplingConfig(temperature=0.0, max_new_tokens=256)
    response = Rollout(model, settings, decode_path=decode_path).generate(story).response_ids()[0]
    text = model.tokenizer.decode(response).strip()
    assert len(response) > 100 and text[:600] == golden.strip()[:600]


@pytest.mark.parametrize(
    "name, decode_path",
    [(name, decode_path) for name in FAMILIES for decode_path in PATHS if decode_path != "fused" or name in FUSED],
)
@torch.no_grad()
def test_logprobs_are_those_of_one_forward_pass(name, decode_path):
    """The ratio of the first PPO step is 1: sampled in a batch, compared with the training forward."""
    model = Model(SERVED[name]())
    responses = Rollout(model, sampling(temperature=0.7, top_k=20), decode_path=decode_path).generate(
        prompts(1, 7, 3, 12), samples=3
    )
    for temperature, theirs in [(0.7, responses.logprobs), (1.0, responses.raw_logprobs)]:
        ours, entropy = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths, temperature)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)
        if temperature == 0.7:
            torch.testing.assert_close(responses.entropy, entropy, rtol=0, atol=TOLERANCE)
    assert (responses.kept_logprobs >= responses.logprobs - 1e-6).all()
    assert (responses.logprobs[~responses.mask] == 0).all() and (responses.logprobs[responses.mask] < 0).all()


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
@torch.no_grad()
def test_a_trained_models_logprobs_are_those_of_one_forward_pass(decode_path):
    model = Model.load(ModelConfig(str(STORIES)))
    batch = Prompts(list(range(8)), [[1, *range(300 + i, 300 + 3 * i)] for i in range(8)], [""] * 8)
    responses = Rollout(model, SamplingConfig(max_new_tokens=60), decode_path=decode_path).generate(batch)
    ours, _ = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths)
    torch.testing.assert_close(responses.logprobs, ours, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_bfloat16_logprobs_are_near_one_forward_pass(decode_path):
    """The head is float32 from the accumulator on, so only the layers round, by a few 1e-2 nats."""
    model = Model(SERVED["llama"]().bfloat16())
    responses = Rollout(model, sampling(), decode_path=decode_path).generate(prompts(1, 7, 3, 12), samples=8)
    ours, _ = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths)
    gap = (ours - responses.logprobs)[responses.mask].abs()
    assert gap.mean() < 0.03 and gap.max() < 0.5
    assert responses.logprobs.dtype == torch.float32


def test_a_sample_does_not_depend_on_its_batch(decode_path):
    """Batch sizes, refills and orders give the same tokens. Log-probabilities are the same on the fused path, and agree
    up to rounding on the others."""
    model, batch = llama(), prompts(2, 9, 5, 3, 6, 11, 4)
    near = {"rtol": 0, "atol": 0} if decode_path == "fused" else {"rtol": 0, "atol": TOLERANCE}
    whole = Rollout(model, sampling(batch=64), seed=5, decode_path=decode_path).generate(batch, samples=2)
    rows = whole.response_ids()
    for size in (1, 3, 7):
        found = Rollout(model, sampling(batch=size), seed=5, decode_path=decode_path).generate(batch, samples=2)
        assert found.response_ids() == rows
        torch.testing.assert_close(found.logprobs, whole.logprobs, **near)
    order = [4, 0, 6, 2, 1, 5, 3]
    shuffled = Rollout(model, sampling(), seed=5, decode_path=decode_path).generate(batch.take(order), samples=2)
    assert shuffled.response_ids() == [rows[2 * i + k] for i in order for k in (0, 1)]
    assert shuffled.uids.tolist() == [batch.uids[i] for i in order for _ in (0, 1)]
    index = torch.tensor([2 * i + k for i in order for k in (0, 1)])
    torch.testing.assert_close(shuffled.logprobs, whole.logprobs[index], **near)


def test_all_paths_sample_the_same_tokens():
    model, batch = llama(), prompts(2, 9, 5, 3)
    found = [
        Rollout(model, sampling(), seed=5, decode_path=decode_path).generate(batch, samples=2) for decode_path in PATHS
    ]
    assert all(other.response_ids() == found[0].response_ids() for other in found)


def test_the_noise_depends_on_seed_step_and_uid(decode_path):
    model, batch = llama(eos_token_id=None), prompts(4, 4)
    rows = Rollout(model, sampling(), seed=1, decode_path=decode_path).generate(batch, samples=2).response_ids()
    assert len({tuple(row) for row in rows}) == 4
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert Rollout(model, sampling(), seed=1, decode_path=decode_path).generate(batch, samples=2).response_ids() == rows
    assert torch.equal(torch.get_rng_state(), state)
    for seed, step, uids in [(2, 0, batch.uids), (1, 1, batch.uids), (1, 0, [7, 8])]:
        rollout = Rollout(model, sampling(), seed=seed, decode_path=decode_path)
        other = rollout.generate(batch._replace(uids=uids), samples=2, step=step)
        assert all(a != b for a, b in zip(other.response_ids(), rows, strict=True))


def always(token: int, **config) -> Model:
    """Return a model that samples `token` after any text."""
    model = llama(**config)
    with torch.no_grad():
        model.module.lm_head.weight.zero_()
        model.module.model.norm.weight.zero_()
        model.module.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
        model.module.lm_head.bias[token] = 50.0
    return model


def test_end_tokens(decode_path):
    """An end token in the prompt, several end tokens, one that is the padding token too; none is added at the limit."""
    batch = prompts(3, 5)
    batch.tokens[0][1] = END
    over = Rollout(always(END), sampling(), decode_path=decode_path).generate(batch)
    assert over.response_ids() == [[END], [END]] and over.finished.all()
    assert over.finish_reasons.tolist() == [batches.EOS] * 2 and over.finish_reasons.dtype == torch.uint8
    assert over.lengths.tolist() == [4, 6] and over.mask.shape == (2, 1)
    never = Rollout(always(9), sampling(), decode_path=decode_path).generate(batch)
    assert never.response_ids() == [[9] * 12] * 2 and not never.finished.any() and not never.finish_reasons.any()
    several = always(9)
    several.module.generation_config.eos_token_id = [7, 9]
    assert Rollout(several, sampling(), decode_path=decode_path).generate(batch).response_ids() == [[9], [9]]
    padding = always(END)
    padding.module.config.pad_token_id = END
    assert Rollout(padding, sampling(), decode_path=decode_path).generate(batch).response_ids() == [[END], [END]]


def test_an_end_token_as_the_last_allowed_token_counts(decode_path):
    late = Rollout(always(END), sampling(min_new_tokens=2, max_new_tokens=3), decode_path=decode_path).generate(
        prompts(3)
    )
    response = late.response_ids()[0]
    assert response[2] == END and END not in response[:2] and late.finish_reasons.tolist() == [batches.EOS]


def test_min_new_tokens_leaves_the_reported_logprobs_alone(decode_path):
    """The trainer's forward has no ban, so the log-probabilities have none either; only the kept ones do."""
    model = always(END)
    with torch.no_grad():
        model.module.lm_head.bias.zero_()
    responses = Rollout(model, sampling(min_new_tokens=12), decode_path=decode_path).generate(prompts(3, 6))
    assert responses.mask.all() and responses.finish_reasons.tolist() == [LENGTH] * 2
    uniform, without_end = -torch.tensor(61.0).log(), -torch.tensor(60.0).log()
    torch.testing.assert_close(responses.logprobs, uniform.expand(2, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(responses.kept_logprobs, without_end.expand(2, 12), rtol=0, atol=1e-5)


def test_min_new_tokens_is_each_rows_own(decode_path):
    """Two slots, and rows that start at different times: only the first four tokens of each row are banned."""
    model = always(END)
    with torch.no_grad():
        model.module.lm_head.bias[END] = 3.0
    found = Rollout(model, sampling(min_new_tokens=4, batch=2), decode_path=decode_path).generate(
        prompts(2, 3, 4), samples=10
    )
    sizes, kept = found.mask.sum(1), found.kept_logprobs[:, :5]
    assert len(sizes.unique()) > 1 and (sizes >= 5).all()
    assert all(END not in row[:4] for row in found.response_ids())
    assert (kept[:, :4] - found.logprobs[:, :4] > 0.1).all()
    assert (kept[:, 4] == found.logprobs[:, 4]).all()


class Letters:
    """A tokenizer whose tokens are single letters."""

    eos_token_id = END

    def batch_decode(self, rows):
        return ["".join(chr(ord("a") + token % 26) for token in row) for row in rows]


def test_stop_text_ends_a_response_and_stays_in_it(decode_path):
    model = always(27)
    model.tokenizer = Letters()
    responses = Rollout(model, sampling(stop=("bbb",)), decode_path=decode_path).generate(prompts(3, 5))
    assert responses.response_ids() == [[27] * 3] * 2 and responses.finish_reasons.tolist() == [STOP] * 2
    assert responses.finished.all()
    assert not Rollout(model, sampling(stop=("bab",)), decode_path=decode_path).generate(prompts(3)).finished.any()
    late = Rollout(model, sampling(stop=("bb",), min_new_tokens=5), decode_path=decode_path).generate(prompts(3))
    assert late.response_ids() == [[27] * 5]


def test_stop_texts_are_looked_for_in_each_row_alone():
    """Rows that start and finish; a text over several tokens; an end token before a stop text, and both at once."""
    model = llama()
    model.tokenizer = Letters()
    criteria = StopCriteria(model, sampling(stop=("xyz", "cd"), max_new_tokens=6))
    criteria.reset(3)
    generated = {0: [23, 24, 25], 1: [2, 3], 2: [25, 24, 23, 24, 25]}  # xyz; c is the end token; zyxyz
    ends = {}
    for step in range(5):
        rows = [row for row in generated if row not in ends]
        if not rows:
            break
        tokens = np.array([generated[row][step] for row in rows])
        stops = criteria(tokens, np.array(rows), np.full(len(rows), step + 1))
        if stops is not None:
            ends |= {row: (step + 1, *why) for row, finished, *why in zip(rows, *stops, strict=True) if finished}
    assert ends == {0: (3, STOP, 0), 1: (1, batches.EOS, -1), 2: (5, STOP, 0)}


@pytest.mark.parametrize("stop", ["yz", "xyz", "wxyz", "vwxyz"])
def test_a_stop_text_completed_before_min_new_tokens_is_no_stop(stop):
    """Later tokens end the row only if they complete the stop text again."""
    model = llama()
    model.tokenizer = Letters()
    for min_new_tokens, end in [(5, 5), (6, 11), (9, 11), (11, 11), (12, None)]:
        criteria = StopCriteria(model, sampling(stop=(stop,), min_new_tokens=min_new_tokens, max_new_tokens=20))
        criteria.reset(1)
        ends = []
        for length, token in enumerate([21, 22, 23, 24, 25, 0, 21, 22, 23, 24, 25, 0, 1, 1], start=1):  # vwxyzavwxyzabb
            result = criteria(np.array([token]), np.array([0]), np.array([length]))
            if result is not None:
                ends.append((length, int(result[1][0])))
        assert ends[:1] == ([] if end is None else [(end, STOP)])


def ends_of(model: Model, tokens: list[int], **settings) -> tuple[int, int, int] | None:
    """Return the length, reason and stop text of a response of these tokens, or None if it goes on after them."""
    criteria = StopCriteria(model, sampling(**{"max_new_tokens": 20, **settings}))
    criteria.reset(1)
    for length, token in enumerate(tokens, start=1):
        stops = criteria(np.array([token]), np.array([0]), np.array([length]))
        if stops is not None:
            return length, int(stops.reasons[0]), int(stops.stop_indices[0])
    return None


def test_the_stop_text_that_ended_a_response_is_reported():
    """One that was there before min_new_tokens, longer ones that end later, several at once, and none at the limit."""
    model = llama()
    model.tokenizer = Letters()
    a, b, c, d = 26, 27, 28, 29
    for tokens, settings, expected in [
        ([a, b, c, d], {"stop": ("ab", "d"), "min_new_tokens": 3}, (4, STOP, 1)),
        ([a, b, a, b], {"stop": ("d", "ab"), "min_new_tokens": 3}, (4, STOP, 1)),
        ([a, b, c], {"stop": ("abcd", "bc", "c")}, (3, STOP, 1)),
        ([a, b, c], {"stop": ("c", "bc")}, (3, STOP, 0)),
        ([a, b, c], {"stop": ("bc",), "max_new_tokens": 3}, (3, STOP, 0)),
        ([a, b, c], {"stop": ("cd",), "max_new_tokens": 3}, (3, LENGTH, -1)),
        ([a, END, b], {"stop": ("ac", "cb")}, (2, batches.EOS, -1)),  # the end token is the letter c
        ([a, END, b], {"stop": ("cb",), "min_new_tokens": 3}, (3, STOP, 0)),
        ([b, c, d], {"stop": ("ab",)}, None),  # the prompt may end in a
    ]:
        assert ends_of(model, tokens, **settings) == expected


def byte_model(merges: list[tuple[str, str]] = ()) -> Model:
    """Return a model whose tokens are bytes, and these pairs of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(x + y for x, y in merges), "<end>"])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model = llama(vocab_size=len(vocabulary))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    return model


@pytest.mark.parametrize("min_new_tokens", [0, 2])
def test_stop_texts_of_several_bytes_and_across_tokens(min_new_tokens):
    """A character of three tokens, a text of two characters, a text that ends within a token."""
    model = byte_model()
    for text, stop, length in [
        ("a你好b", "你好", 7),
        ("a你好b", "好", 7),
        ("你好", "好", 6),
        ("éa", "é", 2),
        ("ab\n\nc", "\n\n", 4),
    ]:
        tokens = model.tokenizer(text)["input_ids"]
        expected = (length, STOP, 0)
        assert ends_of(model, tokens, stop=(stop,), min_new_tokens=min_new_tokens, max_new_tokens=40) == expected
    merged = byte_model([("a", "y"), ("b", "ay")])
    for text, stop, length in [("xayb", "y", 2), ("xbayb", "a", 2), ("xxbay", "xb", 3)]:
        tokens = merged.tokenizer(text)["input_ids"]
        assert len(tokens) < len(text)
        assert ends_of(merged, tokens, stop=(stop,), min_new_tokens=min_new_tokens) == (length, STOP, 0)


def test_several_end_tokens_and_no_other(decode_path):
    """As Llama 3 and Qwen list them; each is reported as the end, and the padding token is none of them."""
    model = always(9)
    model.module.generation_config.eos_token_id = [7, 9, V + 5]
    model.module.generation_config.pad_token_id = 4
    found = Rollout(model, sampling(stop=()), decode_path=decode_path).generate(prompts(3))
    assert found.response_ids() == [[9]] and found.finish_reasons.tolist() == [batches.EOS]
    assert found.stop_indices.tolist() == [-1]
    with torch.no_grad():
        model.module.lm_head.bias[9], model.module.lm_head.bias[4] = 0.0, 50.0
    found = Rollout(model, sampling(), decode_path=decode_path).generate(prompts(3))
    assert found.response_ids() == [[4] * 12] and found.finish_reasons.tolist() == [LENGTH]


def test_greedy_responses_report_the_logprobs_at_temperature_1(decode_path):
    model = llama()
    found = Rollout(model, sampling(temperature=0.0), decode_path=decode_path).generate(prompts(3, 5), samples=2)
    with torch.no_grad():
        ours, _ = model.logprobs(found.tokens, found.prompt_lengths, found.lengths)
    torch.testing.assert_close(found.logprobs, ours, rtol=0, atol=TOLERANCE)
    assert (found.logprobs[found.mask] < 0).all() and not found.kept_logprobs.any()


def test_progress_is_called_after_each_step(decode_path):
    steps = []
    rollout = Rollout(llama(), sampling(batch=3), decode_path=decode_path)
    found = rollout.generate(prompts(2, 9, 5, 3), samples=2, progress=lambda *step: steps.append(step))
    tokens, finished = (sum(part) for part in zip(*steps, strict=True))
    assert tokens == int(found.mask.sum()) and finished == 8 and max(step[0] for step in steps) <= 3


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory) -> Model:
    return Model.load(ModelConfig(toy.model(tmp_path_factory.mktemp("toy"))))


def test_prompts_may_be_texts(toy_model):
    """They are encoded as the tokenizer does it by default, with uids 0, 1, ..."""
    tokenizer, texts = toy_model.tokenizer, ["a b c", "d"]
    batch = Prompts.from_texts(tokenizer, texts)
    assert batch == Prompts([0, 1], tokenizer(texts)["input_ids"], texts)
    rollout = Rollout(toy_model, sampling(), seed=3)
    found, expected = rollout.generate(texts, samples=2), rollout.generate(batch, samples=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert rollout.generate(tuple(texts)).uids.tolist() == [0, 1]
    assert rollout.generate([]).response_ids() == []


def test_responses_as_texts_have_no_special_tokens(toy_model):
    tokenizer = toy_model.tokenizer
    tokens, lengths = batches.pad_rows([[3, 4, 5, tokenizer.eos_token_id], [3, 6]])
    prompt_lengths = torch.tensor([1, 1])
    mask = batches.response_mask(prompt_lengths, lengths)
    zeros = torch.zeros(mask.shape)
    found = batches.Responses(
        tokens, prompt_lengths, lengths, mask, zeros, zeros, zeros, zeros,
        finish_reasons=torch.zeros(2, dtype=torch.uint8), uids=torch.arange(2),
    )  # fmt: skip
    assert found.texts(tokenizer) == [tokenizer.decode([4, 5]), tokenizer.decode([6])]


def test_texts_without_a_tokenizer_are_an_error():
    with pytest.raises(UserError, match="LlamaForCausalLM has no tokenizer, which prompts given as texts need; give"):
        Rollout(llama(), sampling()).generate(["a b"])


def test_one_text_is_not_a_list_of_texts(toy_model):
    with pytest.raises(UserError, match="prompts is one text; give a list of texts"):
        Rollout(toy_model, sampling()).generate("a b")


@pytest.mark.parametrize(
    "given, words",
    [
        ([[1, 2, 3]], r"prompt 0 is of type list; give texts, or token ids as Prompts\(uids="),
        (torch.tensor([[1, 2]]), "prompt 0 is of type Tensor; give texts, or token ids"),
        (["a b", 3], "prompt 1 is of type int; give texts"),
        ([{"role": "user", "content": "a"}], r"prompt 0 is a chat message; give a text .*apply_chat_template\("),
        (["a", [{"role": "user", "content": "a"}]], "prompt 1 is a list of chat messages; give a text"),
        ({"input_ids": [[1]]}, "prompts are of type dict; give a list of texts, or Prompts"),
        (None, "prompts are of type NoneType; give a list of texts"),
    ],
)
def test_prompts_that_are_no_texts_are_named(toy_model, given, words):
    with pytest.raises(UserError, match=f"^rollout: {words}"):
        Rollout(toy_model, sampling()).generate(given)


def test_what_is_no_model_and_no_sampling_is_named(toy_model):
    for given, name in ((toy_model.module, "LlamaForCausalLM"), ("runs/sft", "str")):
        with pytest.raises(UserError, match=rf"^Rollout: model must be a Model, got {name}; Model.load\(path\) makes"):
            Rollout(given, sampling())
    for given, written in (({"max_new_tokens": 4}, "max_new_tokens=..."), (None, "...")):
        with pytest.raises(UserError, match=rf"^Rollout: sampling must be .* write SamplingConfig\({written}\), got"):
            Rollout(toy_model, given)


@pytest.mark.parametrize(
    "length, new, remedy",
    [
        (70, 4, "shorten the prompt to at most 60 tokens$"),
        (62, 4, "shorten the prompt to at most 60 tokens, or set max_new_tokens to at most 2$"),
        (3, 64, "set max_new_tokens to at most 61$"),
        (64, 70, "shorten the prompt and lower max_new_tokens$"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_what_helps(toy_model, length, new, remedy):
    """The remedies are tried: with each the prompt is answered."""
    rollout = Rollout(toy_model, SamplingConfig(max_new_tokens=new))
    words = rf"^prompt 1: {length} tokens and max_new_tokens {new} are more than the model's 64 positions; {remedy}"
    with pytest.raises(UserError, match=words):
        rollout.generate(Prompts([1], [[3] * length], [""]))
    for kept, allowed in ((60, 4), (62, 2), (3, 61)):
        found = Rollout(toy_model, SamplingConfig(max_new_tokens=allowed)).generate(Prompts([0], [[3] * kept], [""]))
        assert int(found.lengths[0]) > kept


def test_updated_weights_are_used_and_the_training_mode_is_kept(decode_path):
    model, batch = llama(eos_token_id=None), prompts(4)
    rollout = Rollout(model, sampling(temperature=0.0), decode_path=decode_path)
    model.module.train()
    before = rollout.generate(batch).response_ids()
    assert model.module.training and rollout.decode_path == decode_path
    tokens = torch.tensor(batch.tokens)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.3)
    model.module(tokens).logits.square().mean().backward()
    optimizer.step()
    after = rollout.generate(batch)
    assert after.response_ids() != before
    with torch.no_grad():
        ours, _ = model.logprobs(after.tokens, after.prompt_lengths, after.lengths)
    torch.testing.assert_close(after.raw_logprobs, ours, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_model_may_be_converted_between_rollouts(decode_path):
    model, batch = llama(eos_token_id=None), prompts(3, 7)
    rollout = Rollout(model, sampling(temperature=0.0), decode_path=decode_path, keep_cache=True)
    rollout.generate(batch)
    for dtype in (torch.bfloat16, torch.float32):
        model.module.to(dtype)
        found = rollout.generate(batch)
        ours, _ = model.logprobs(found.tokens, found.prompt_lengths, found.lengths)
        near = TOLERANCE if dtype == torch.float32 else 0.5
        torch.testing.assert_close(found.raw_logprobs, ours, rtol=0, atol=near)


def test_prompts_that_cannot_be_sampled_are_an_error():
    with pytest.raises(UserError, match="prompt 102: has no tokens"):
        Rollout(llama(), sampling()).generate(prompts(2, 3, 0))
    with pytest.raises(UserError, match="prompt 100: 60 tokens and max_new_tokens 12 are more than the model's 64"):
        Rollout(llama(), sampling()).generate(prompts(60))
    with pytest.raises(UserError, match="stop texts need a tokenizer"):
        Rollout(llama(), sampling(stop=("x",)))
    for samples in (0, -2):
        with pytest.raises(UserError, match=f"samples must be at least 1, not {samples}"):
            Rollout(llama(), sampling()).generate(prompts(3), samples=samples)
    with pytest.raises(UserError, match=f"prompt {2**62}: its uid times 2 samples does not fit 64 bits"):
        Rollout(llama(), sampling()).generate(prompts(2, 3, uids=[1, 2**62]), samples=2)
    assert len(Rollout(llama(), sampling()).generate(prompts(2, uids=[2**62 - 1]), samples=2).lengths) == 2
    for token in (-1, V, 2**40):
        batch = prompts(2, 3)
        batch.tokens[1][2] = token
        with pytest.raises(UserError, match=f"prompt 101: token {token} is not one of the model's 61, 0 to 60; use"):
            Rollout(llama(), sampling()).generate(batch)
    with pytest.raises(UserError, match="cache_mb: 1 MiB hold 0 rows: one of 1020 tokens needs"):
        big = Model(build("Llama", max_position_embeddings=2048, hidden_size=256, num_key_value_heads=4)())
        Rollout(big, sampling(max_new_tokens=1000, cache_mb=1), decode_path="attention").generate(prompts(21))


@pytest.mark.parametrize(
    "setting, rule",
    [
        ({"temperature": -0.1}, "sampling.temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": 13}, "must be at most max_new_tokens"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"cache_mb": -1}, "cache_mb must be at least 0"),
    ],
)
def test_settings_out_of_range(setting, rule):
    with pytest.raises(BadSetting) as error:
        sampling(**setting)
    assert rule.removeprefix("sampling.") in str(error.value)


def test_logits_that_are_not_finite_are_an_error(decode_path):
    model = llama()
    rollout = Rollout(model, sampling(), decode_path=decode_path)
    assert rollout.decode_path == decode_path
    with torch.no_grad():
        model.module.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="token 1 of the response to prompt 100: the model gives NaN"):
        rollout.generate(prompts(3, 4))


def test_a_ban_of_every_token_is_an_error():
    """The error is about the setting, not about the weights."""
    for config in ({"vocab_size": 1, "eos_token_id": 0, "bos_token_id": 0}, {"eos_token_id": list(range(V))}):
        model = llama(**config)
        size = len(model.head_weight)
        with pytest.raises(UserError, match=f"min_new_tokens: each of the model's {size} tokens ends a response"):
            Rollout(model, sampling(min_new_tokens=1))
        batch = Prompts([1], [[0, 0]], [""])
        assert Rollout(model, sampling()).generate(batch).mask.sum() == 1


def test_no_prompts_give_no_responses(decode_path):
    responses = Rollout(llama(), sampling(), decode_path=decode_path).generate(prompts())
    assert responses.tokens.shape == (0, 0) and responses.response_ids() == []


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 8.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LENGTH_DEPENDENT = {
    "longrope": build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16),
    "dynamic": build("Llama", rope_parameters=DYNAMIC),
    "dynamic in some layers": build(
        "Gemma3", head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": DYNAMIC},
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", LENGTH_DEPENDENT.values(), ids=LENGTH_DEPENDENT)
@torch.no_grad()
def test_length_dependent_rope_is_served_up_to_its_original_length(make, caplog, monkeypatch):
    """A text of 40 tokens goes first: state that the module keeps of it would change the samples."""
    monkeypatch.setattr("rlhf_fast.rollout.choose._warned", set())
    model, batch = Model(make()), prompts(4, 1, 3)
    model.hidden(torch.randint(3, V, (1, 40)))
    for decode_path in ("fused", "attention"):
        with pytest.raises(UserError, match=r"because its rotation .* depends on the length"):
            Rollout(model, sampling(), decode_path=decode_path).generate(batch)
    rollout = Rollout(model, sampling())
    found = rollout.generate(batch, samples=2)
    assert rollout.decode_path == "transformers" and "depends on the length of the text" in caplog.text
    for row in range(6):
        alone = [part[row : row + 1] for part in (found.tokens, found.prompt_lengths, found.lengths)]
        ours, _ = model.logprobs(*alone)
        torch.testing.assert_close(found.logprobs[row, : ours.shape[1]], ours[0], rtol=0, atol=TOLERANCE)
    for decode_path in ("auto", "transformers"):
        with pytest.raises(
            UserError,
            match=r"prompt 101: 5 tokens and max_new_tokens 12 .* original 16 positions, .* at most 4 .*in a stage: ",
        ):
            Rollout(model, sampling(), decode_path=decode_path).generate(prompts(4, 5))


@torch.no_grad()
def test_length_dependent_rope_makes_a_token_depend_on_its_batch():
    """The reason to refuse it: past the original length the same tokens get other hidden states."""
    model, tokens = Model(LENGTH_DEPENDENT["longrope"]()), torch.randint(3, V, (1, 17))
    gap = model.hidden(tokens)[:, :16] - model.hidden(tokens[:, :16])
    assert gap.abs().max() > 0.01
