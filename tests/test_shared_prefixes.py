"""Prompts with a common prefix: it is computed once, no sample changes, and its pages are released in time."""

import random

import pytest
import torch
from architectures import V, llama, sampling
from test_kv_cache import equal, free_pages_are_nan, pages_of_4, recorded  # noqa: F401

from rlhf_fast.batches import Prompts
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.rollout.prompt_groups import waiting_queue
from rlhf_fast.rollout.response_buffer import Requests
from rlhf_fast.rollout.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread", "pages_of_4", "free_pages_are_nan")
PATHS = ["fused", "attention"]


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, V) for _ in range(count)]


def to_prompts(rows: list[list[int]]) -> Prompts:
    return Prompts(list(range(len(rows))), rows, [""] * len(rows))


def with_shared_prefixes(seed: int, shared: int = 9) -> Prompts:
    """Prompts of three kinds: with a long common prefix, with a part of it, and with none; one is a prefix of others,
    one there twice."""
    rng = random.Random(seed)
    head = draw(rng, shared)
    rows = [head + draw(rng, rng.randrange(1, 6)) for _ in range(4)]
    rows += [head[:4] + draw(rng, rng.randrange(1, 6)) for _ in range(3)]
    rows += [draw(rng, rng.randrange(1, 12)) for _ in range(3)]
    rows += [head, head[:8], list(rows[0])]
    rng.shuffle(rows)
    return to_prompts(rows)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("decode_path", PATHS)
@pytest.mark.exhaustive(1, by=("decode_path",))
def test_they_change_no_sample(decode_path, samples, batch):
    """Each prompt in a rollout of its own, against all together. Freed pages hold NaN."""
    model = llama()
    for seed in range(4):
        given = with_shared_prefixes(seed)
        rollout = Rollout(model, sampling(batch=batch), seed, decode_path=decode_path)
        together = rollout.generate(given, samples=samples)
        ids = together.response_ids()
        for i, tokens in enumerate(given.tokens):
            alone = Rollout(model, sampling(batch=1), seed, decode_path=decode_path)
            found = alone.generate(Prompts([i], [tokens], [""]), samples=samples)
            rows = list(range(i * samples, (i + 1) * samples))
            assert found.response_ids() == [ids[row] for row in rows]
            width = found.logprobs.shape[1]
            expected = together.logprobs[rows, :width]
            tolerance = 0 if decode_path == "fused" else 2e-5
            torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("decode_path", PATHS)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_prefix_is_computed_once(decode_path, batch):
    rng = random.Random(3)
    head = draw(rng, 13)  # three full pages of four
    rows = [[*head, 3 + i, *draw(rng, i % 3)] for i in range(10)] + [draw(rng, 7)]
    rollout, calls = recorded(llama(), decode_path, batch=batch, max_new_tokens=1)
    rollout.generate(to_prompts(rows))
    computed = sum(len(positions) for positions, _ in calls)
    assert computed == 12 + sum(len(row) - 12 for row in rows[:10]) + 7


def test_prefixes_within_prefixes_are_computed_once():
    rng = random.Random(4)
    outer, inner = draw(rng, 4), draw(rng, 8)
    rows = [outer + inner + draw(rng, 2) for _ in range(3)] + [outer + draw(rng, 3) for _ in range(3)]
    rollout, calls = recorded(llama(), "fused", batch=2, max_new_tokens=1)
    rollout.generate(to_prompts(rows))
    assert sum(len(positions) for positions, _ in calls) == 4 + 8 + 3 * 2 + 3 * 3


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_they_fit_the_smallest_cache(batch, monkeypatch):
    """The pages of the longest response alone; no prefix is kept that the next response does not use."""
    model = llama()
    for seed in range(6):
        given = with_shared_prefixes(seed, shared=17)
        cfg = sampling(batch=batch, max_new_tokens=3)
        longest = max(map(len, given.tokens)) + 3 - 1
        expected = Rollout(model, cfg, seed, decode_path="fused").generate(given, samples=2)
        with monkeypatch.context() as patch:
            patch.setattr("rlhf_fast.rollout.rollout.pages_needed", lambda *_, pages=-(-longest // 4): pages)
            found = Rollout(model, cfg, seed, decode_path="fused").generate(given, samples=2)
        assert equal(found, expected)


def test_the_queue_has_longest_prompts_first_and_common_prefixes_together():
    rng = random.Random(5)
    head = draw(rng, 8)
    rows = [[*head, 1], draw(rng, 30), head + draw(rng, 30), draw(rng, 12), head + draw(rng, 3)]
    requests = Requests.from_prompts(to_prompts(rows), 1)
    queue = waiting_queue(requests, 4, torch.device("cpu"))
    assert [response for response, _ in queue] == [2, 4, 0, 1, 3]
    assert [[(p.start, p.end) for p in group.prefixes] for _, group in queue] == [[(0, 8)]] * 3 + [[]] * 2
    # on a GPU the rest of a long prompt is faster as a whole prompt
    queue = waiting_queue(requests, 4, torch.device("cuda"))
    shared = {response: bool(group.prefixes) for response, group in queue}
    assert shared == {0: True, 1: False, 2: False, 3: False, 4: True}


def test_a_kept_cache_has_all_pages_free_afterwards():
    rollout = Rollout(llama(), sampling(batch=3), keep_cache=True, decode_path="fused")
    for seed in range(3):
        rollout.generate(with_shared_prefixes(seed))
        assert rollout._cache.num_free_pages == rollout._cache.num_pages


def test_a_greedy_rollout_of_one_token_after_equal_prompts():
    """Equal prompts are one group, and need no prefix of their own."""
    row = draw(random.Random(6), 9)
    cfg = SamplingConfig(temperature=0.0, max_new_tokens=1)
    found = Rollout(llama(), cfg, decode_path="fused").generate(to_prompts([row] * 5)).response_ids()
    assert found == [found[0]] * 5
