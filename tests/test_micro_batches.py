"""A batch is split by a budget of tokens: counted with padding, or as a pass over packed rows computes them."""

from collections import Counter
from itertools import accumulate

import pytest
import torch

from rlhf_fast.batches import (
    Comparisons,
    Demonstrations,
    Responses,
    Texts,
    pad_rows,
    response_mask,
    shared_prompts,
)
from rlhf_fast.config.fields import OptimConfig
from rlhf_fast.model.packing import pack_rows
from rlhf_fast.training import micro_batches as micro_batches_module
from rlhf_fast.training.learner import Learner, evaluate
from rlhf_fast.training.micro_batches import micro_batches
from rlhf_fast.training.rewards import ModelReward


def log_normal(count, low=8, high=256):
    """Return lengths as of written texts: many short ones, few long ones."""
    return torch.empty(count).log_normal_(4.0, 0.9).long().clamp(low, high)


def demonstrations(prompts, sizes):
    """Return rows of these prompts, with random responses of these sizes."""
    rows = [prompt + torch.randint(3, 50, (size,)).tolist() for prompt, size in zip(prompts, sizes, strict=True)]
    tokens, lengths = pad_rows(rows)
    return Demonstrations(tokens, torch.tensor([len(prompt) for prompt in prompts]), lengths)


def random_prompts(sizes):
    return [torch.randint(3, 50, (int(size),)).tolist() for size in sizes]


def with_equal_prompts(groups=9, copies=4, shuffled=True):
    prompts = [prompt for prompt in random_prompts(log_normal(groups, 2, 60)) for _ in range(copies)]
    if shuffled:
        prompts = [prompts[i] for i in torch.randperm(len(prompts)).tolist()]
    return demonstrations(prompts, log_normal(len(prompts), 1, 40).tolist())


def comparisons(counts, prompt=20):
    prompts = [
        prompt
        for count, prompt in zip(counts, random_prompts([prompt] * len(counts)), strict=True)
        for _ in range(count)
    ]
    rows = demonstrations(prompts, log_normal(len(prompts), 1, 40).tolist())
    offsets = torch.tensor([0, *accumulate(counts)])
    return Comparisons(*rows[:3], offsets, torch.zeros(len(prompts)), torch.arange(len(counts)))


def computed(part):
    """Return the tokens of the part's packed rows."""
    return len(pack_rows(part.tokens, part.lengths, getattr(part, "prompt_lengths", None)).tokens)


def rows_of(batch, index):
    return [(row[:length].tolist()) for row, length in zip(batch.tokens[index], batch.lengths[index], strict=True)]


@pytest.mark.parametrize("budget", [1, 50, 300, 2048, 100_000])
@pytest.mark.parametrize("packed", [False, True])
def test_each_row_is_in_one_part_within_the_budget(budget, packed):
    texts = demonstrations(random_prompts(log_normal(32)), [0] * 32)
    for batch in (with_equal_prompts(), Texts(texts.tokens, texts.lengths)):
        parts = list(micro_batches(batch, budget, packed))
        assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(len(batch.lengths)))
        for index, part in parts:
            assert len(index) and rows_of(part, slice(None)) == rows_of(batch, index)
            assert len(index) == 1 or (computed(part) if packed else part.tokens.numel()) <= budget
        expected = {1: len(batch.lengths), 100_000: 1}
        assert budget not in expected or len(parts) == expected[budget]


@pytest.mark.parametrize("budget", [2048, 8192])
def test_parts_are_nearly_full_and_of_similar_sizes(budget):
    """With one part less, each part would be so full that it cannot take the longest row."""
    lengths = log_normal(256)
    longest = int(lengths.max())
    batch = Texts(torch.randint(3, 50, (256, longest)), lengths)
    sizes = [computed(part) for _, part in micro_batches(batch, budget, packed=True)]
    assert len(sizes) > 1 and (len(sizes) - 1) * (budget - longest) < sum(sizes) == int(lengths.sum())
    assert max(sizes) - min(sizes) <= longest and sizes == sorted(sizes, reverse=True)


def test_full_parts_are_filled_by_rows_that_do_not_fit_together():
    """Six rows of 6 tokens at a budget of 10 are six parts, and the small rows fill them."""
    batch = Texts(torch.ones(12, 6).long(), torch.tensor([6] * 6 + [2] * 6))
    assert [computed(part) for _, part in micro_batches(batch, 10, packed=True)] == [8] * 6


def test_a_row_beyond_the_budget_costs_no_other_part():
    batch = Texts(torch.ones(21, 500).long(), torch.tensor([500] + [10] * 20))
    assert [computed(part) for _, part in micro_batches(batch, 100, packed=True)] == [500, 100, 100]


def test_many_rows_that_fill_parts_badly_take_few_trials(monkeypatch):
    trials = []
    level = micro_batches_module._level
    monkeypatch.setattr(micro_batches_module, "_level", lambda *args: trials.append(1) or level(*args))
    batch = Texts(torch.ones(3000, 51).long(), torch.full((3000,), 51))
    assert len(list(micro_batches(batch, 100, packed=True))) == 3000 and len(trials) < 30


def test_one_part_is_the_batch_itself_unless_it_has_padding_to_cut():
    lengths = torch.tensor([7, 6])
    (_, part), *more = micro_batches(texts := Texts(torch.ones(2, 7).long(), lengths), 100)
    assert part is texts and not more
    ((_, part),) = micro_batches(Texts(torch.ones(2, 20).long(), lengths), 100)
    assert part.tokens.shape == (2, 7)
    padded = Demonstrations(torch.ones(2, 7).long(), torch.tensor([2, 2]), lengths, None, torch.ones(2, 18).bool())
    ((_, part),) = micro_batches(padded, 100)
    assert part.loss_mask.shape == (2, 5)


def test_rows_with_equal_prompts_are_in_the_same_part():
    """At a budget that holds each prompt with its rows, every prompt is computed once."""
    batch = with_equal_prompts(groups=12, copies=5)
    parts = list(micro_batches(batch, 500, packed=True))
    assert len(parts) > 1
    prompts = zip(rows_of(batch, slice(None)), batch.prompt_lengths.tolist(), strict=True)
    once = sum(len(prompt) for prompt in {tuple(row[:size]) for row, size in prompts})
    assert sum(computed(part) for _, part in parts) == once + int((batch.lengths - batch.prompt_lengths).sum())


def test_rows_with_equal_prompts_are_divided_where_the_budget_is_too_small():
    prompts = random_prompts([30]) * 10 + random_prompts([5])
    batch = demonstrations(prompts, [10] * 11)
    parts = [(sorted(index.tolist()), computed(part)) for index, part in micro_batches(batch, 80, packed=True)]
    assert len(parts) == 3 and max(size for _, size in parts) <= 80
    assert sorted(row for rows, _ in parts for row in rows) == list(range(11))
    # five rows of the prompt in two parts each, and the other row beside neither
    assert Counter(size for _, size in parts) == {80: 2, 15: 1}


def test_prompts_of_one_token_are_not_shared():
    """As pack_rows does it; a budget that counted them as shared would be passed."""
    batch = demonstrations([[7]] * 6, [3] * 6)
    assert shared_prompts(batch.tokens, batch.prompt_lengths) == {}
    assert [computed(part) for _, part in micro_batches(batch, 8, packed=True)] == [8, 8, 8]


def test_shared_prompts_are_equal_in_length_and_tokens():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 9, 4], [1, 2, 3, 4], [5, 6, 7, 8]])
    assert shared_prompts(tokens, torch.tensor([3, 3, 2, 2, 2])) == {0: 0, 1: 0, 2: 2, 3: 2}


@pytest.mark.parametrize("packed", [False, True])
def test_groups_of_comparisons_stay_whole(packed):
    """Also one that is longer than the budget, and one without responses."""
    counts = [2, 9, 4, 0, 3, 9, 0]
    batch = comparisons(counts)
    parts = list(micro_batches(batch, 150, packed))
    assert len(parts) > 2
    for index, part in parts:
        assert part.group_offsets.diff().tolist() == [counts[g] for g in index.tolist()]
        size = computed(part) if packed else part.tokens.numel()
        assert size <= 150 or len(part.group_offsets.diff().nonzero()) == 1
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(len(counts)))


def test_comparisons_of_one_prompt_share_a_part():
    first, second = comparisons([3, 3]), comparisons([3, 3])
    tokens, lengths = pad_rows([*rows_of(first, slice(None)), *rows_of(second, slice(None))])
    tokens[6:9, :20] = tokens[0, :20]  # the third group has the first one's prompt
    whole = Comparisons(
        tokens, torch.full((12,), 20), lengths, torch.tensor([0, 3, 6, 9, 12]), torch.zeros(12), torch.arange(4)
    )
    budget = int(lengths.sum()) - 12 * 20 + 3 * 20 - 1
    for index, _ in micro_batches(whole, budget, packed=True):
        assert (0 in index) == (2 in index)


def test_a_batch_without_rows_has_no_parts():
    empty = Texts(torch.zeros(0, 0).long(), torch.zeros(0).long())
    assert list(micro_batches(empty, 10)) == list(micro_batches(empty, 10, packed=True)) == []


class Recording:
    """A model with one parameter that notes the padded sizes of the parts that it is given."""

    name = "recording"

    def __init__(self, packs_rows):
        self.packs_rows, self.sizes = packs_rows, []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def prepare_training(self):
        pass

    def trainable(self):
        return {"weight": self.weight}

    def train_mode(self, _dropout):
        return torch.enable_grad()

    def loss(self, _model, batch, num_items):
        self.sizes.append((batch.tokens.numel(), computed(batch)))
        return self.weight * batch.num_items() / num_items, {}

    def last_scores(self, tokens, lengths, prompt_lengths):
        self.loss(self, Demonstrations(tokens, prompt_lengths, lengths), 1)
        return torch.zeros(len(lengths))


@pytest.mark.parametrize("packs_rows", [False, True])
def test_a_model_that_does_not_pack_rows_has_padding_counted(packs_rows):
    """In training, in evaluation and in a reward model's scoring."""
    batch, budget = with_equal_prompts(), 400
    mask = response_mask(batch.prompt_lengths, batch.lengths)
    responses = Responses(*batch[:3], mask, *[mask.float()] * 4, *[torch.arange(len(mask))] * 2)
    passes = {
        "train": lambda model: Learner(model, OptimConfig(micro_batch_tokens=budget), 1).step([(model.loss, batch, 1)]),
        "evaluate": lambda model: evaluate(model, model.loss, [batch], budget),
        "score": lambda model: ModelReward(model, budget)(responses),
    }
    for name, run in passes.items():
        model = Recording(packs_rows)
        run(model)
        padded, packed = map(list, zip(*model.sizes, strict=True))
        assert len(padded) > 1 and max(packed) <= budget, name
        assert (max(padded) > budget) == packs_rows, name
