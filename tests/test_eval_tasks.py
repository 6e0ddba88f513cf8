"""The evaluation's tasks: encodings, measures by hand, selection, and the sets of the demo's world."""

import json
import math
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
import torch
from test_eval_sets import read, write

from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.demo.eval_sets import draw_sets
from rlhf_fast.demo.materials import Plan, draw_materials, read_rows
from rlhf_fast.demo.pretrain import make_tokenizer
from rlhf_fast.errors import UserError
from rlhf_fast.eval import generation, likelihood, measures
from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.judges import Verdict
from rlhf_fast.eval.sets import DEMO_SETS, SETS
from rlhf_fast.eval.tasks import GROUPS, TASKS, WIN_RATES, describe, select_tasks

NAN = math.nan
pytestmark = pytest.mark.usefixtures("one_thread")


class Score(NamedTuple):
    logprob: float
    greedy: bool = False
    num_tokens: int = 1


class Judge(NamedTuple):
    name: str = "judge"
    threshold: float = 0.5


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def values(measures, name: str) -> tuple[float, ...]:
    return next(measure.values for measure in measures if measure.name == name)


def same(found, expected) -> bool:
    """Return whether values are equal, NaN to NaN."""
    pairs = zip(found, expected, strict=True)
    return all(math.isnan(b) if math.isnan(a) else a == pytest.approx(b, abs=1e-12) for a, b in pairs)


def test_accuracies_of_hellaswag_and_ties():
    rows = [{"endings": ["ab", "abcd"], "label": label} for label in (0, 1, 0, 1)]
    scores = [
        [Score(-2.0, num_tokens=1), Score(-2.0, num_tokens=2)],  # a tie: the first; by length the second
        [Score(-3.0, num_tokens=2), Score(-4.0, num_tokens=2)],
        [Score(-1.0, num_tokens=1), Score(-2.0, num_tokens=1)],  # a tie by characters
        [Score(-1.0, num_tokens=1), Score(-4.0, num_tokens=4)],  # a tie by tokens
    ]
    found = likelihood.hellaswag_measures(rows, scores)
    assert values(found, "acc") == (1, 0, 1, 0)
    assert values(found, "acc_norm") == (0, 1, 1, 0)
    assert values(found, "acc_token") == (0, 0, 1, 0)
    assert likelihood.hellaswag_chance(rows)["acc_norm"] == 0.5


def test_perplexity_of_two_words():
    scores = [[Score(-math.log(2), True, 3)], [Score(-math.log(8), False, 1)]]
    accuracy, perplexity = likelihood.lambada_measures([{}, {}], scores)
    assert accuracy.values == (1, 0) and perplexity.estimate().value == pytest.approx(4)


@pytest.mark.parametrize("bad", [NAN, -math.inf])
def test_scores_that_are_not_finite_give_no_figure(bad):
    """Neither as the right answer's nor as a wrong one's; the other rows keep theirs."""
    rows = [{"endings": ["a", "b"], "label": 0}] * 3
    scores = [[Score(bad), Score(-1)], [Score(-1), Score(bad)], [Score(-1), Score(-2)]]
    for measure in likelihood.hellaswag_measures(rows, scores):
        assert same(measure.values, (NAN, NAN, 1)) and measure.estimate().n == 1
    for measure in likelihood.lambada_measures([{}, {}], [[Score(bad)], [Score(0.0, True)]]):
        assert math.isnan(measure.values[0]) and measure.estimate().value == 1
    row = {"question": "q", "best_answer": "b", "correct_answers": ["b"], "incorrect_answers": ["d"]}
    scores = [[Score(-1)] * 3 for _ in range(3)] + [[Score(-1), Score(-1), Score(-1e4)]]
    for i in range(3):
        scores[i][i] = Score(bad)
    for measure in likelihood.truthfulqa_measures([row] * 4, scores):
        assert same(measure.values, (NAN, NAN, NAN, 1))
    jobs = [{"occupation": "a", "bls_pct_female": 5.0}] * 2
    for measure in likelihood.winogender_measures(jobs, [[Score(bad), Score(-1)], [Score(-1), Score(-2)]]):
        assert math.isnan(measure.values[0]) and measure.estimate().n == 1
    for measure in likelihood.text_measures([{"text": "a"}] * 2, [[Score(bad), Score(-1)], [Score(-1)]]):
        assert math.isnan(measure.values[0]) and measure.estimate().n == 1


def test_truthfulqa_closes_answers_and_stays_in_log_space(tokenizer):
    row = {"question": "q", "best_answer": "b", "correct_answers": ["b.", "b", "c"], "incorrect_answers": ["d", "e."]}
    assert likelihood.closed(["a", "a.", "b ."]) == ["a.", "b ."]
    assert len(likelihood.truthfulqa_requests(row, Encoder(tokenizer))) == 5
    scores = [[Score(x) for x in (-1e4, -1e4, -1e4 - 1, -1e4, -1e4 - 2)], [Score(x) for x in (-2, -2, 0, -1, -9)]]
    found = likelihood.truthfulqa_measures([row, row], scores)
    assert values(found, "mc1") == (1, 0)
    e = math.exp
    right = [(1 + e(-1)) / (1 + e(-1) + 1 + e(-2)), (e(-2) + 1) / (e(-2) + 1 + e(-1) + e(-9))]
    assert values(found, "mc2") == pytest.approx(right)
    assert likelihood.truthfulqa_chance([row]) == {"mc1": pytest.approx(1 / 3), "mc2": 0.5}


class Pairs:
    """An encoder that leaves texts as they are, since a tokenizer of words reads one space as it reads two."""

    def pair(self, context: str, continuation: str) -> tuple[str, str]:
        return context, continuation


def test_one_space_stands_between_context_and_continuation():
    hellaswag = {"ctx": "a man", "endings": ["sits.", "sings."]}
    truth = {"question": "why?", "best_answer": "no", "correct_answers": ["no"], "incorrect_answers": ["yes"]}
    words = {"male": "he", "female": "she", "instructions": {"respectful": "please", "biased": "rudely"}}
    requests = {
        "lambada": ({"context": "one", "target": "word"}, [("one", " word")]),
        "hellaswag": (hellaswag, [("a man", " sits."), ("a man", " sings.")]),
        "winogender": (words, [("", "he"), ("", "she")]),
        "winogender_biased": (words, [("rudely", " he"), ("rudely", " she")]),
    }
    for name, (row, expected) in requests.items():
        assert TASKS[name].requests(row, Pairs()) == expected
    asked = TASKS["truthfulqa_mc"].requests(truth, Pairs())
    assert [answer for _, answer in asked] == [" no.", " no.", " yes."] and asked[0][0].endswith("Q: why?\nA:")


LOWER, NEITHER = (
    {"perplexity", "nats_per_token", "bits_per_byte", "prefers_stereotype", "toxic", "toxicity", "toxic_bin_*",
     "empty", "unjudged", "flips_*"},
    {"prefers_male", "prefers_first", "bls_correlation", "words"},
)  # fmt: skip
"""Measures of which less is better, and those of which neither is. Of `over_refusal` fewer refusals are."""


def test_each_measure_has_one_of_the_tasks_names_and_a_direction():
    for task in TASKS.values():
        rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(read(task.set, DEMO_SETS))]
        if isinstance(task, GenerationTask):
            verdicts = [Verdict(0.9, flipped=float(i % 2)) for i, _ in enumerate(rows)]
            roles = [role for role in task.judges if role != "preference"]
            found = task.measures(
                rows, ["a b"] * len(rows), dict.fromkeys(roles, verdicts), dict.fromkeys(roles, Judge())
            )
        else:
            count = [len(task.requests(row, Pairs())) if task.name != "text" else 1 for row in rows]
            found = task.measures(rows, [[Score(-float(i))] * n for i, n in enumerate(count)])
        names = [[name for name in task.measure_names if fnmatchcase(measure.name, name)] for measure in found]
        assert all(len(own) == 1 or own[0] == "refusal_rate" for own in names), task.name
        for measure, (name, *_) in zip(found, names, strict=True):
            lower = name in LOWER or (task.name == "over_refusal" and name.startswith("refusal_rate"))
            expected = None if name in NEITHER else not lower
            assert measure.higher_is_better is expected, (task.name, name)
        given = {name for own in names for name in own}
        absent = set(task.measure_names) - given - set(WIN_RATES)
        assert absent <= {"prefers_stereotype", "prefers_first", "bls_correlation"}, (task.name, absent)


def test_entropies():
    assert likelihood.entropy_bits(0.0) == pytest.approx(1)
    assert likelihood.entropy_bits(math.log(3)) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert likelihood.entropy_bits(40.0) == pytest.approx(41 * math.exp(-40) / math.log(2))
    for certain in (800.0, -800.0, 1e9, math.inf):
        assert likelihood.entropy_bits(certain) == 0
    assert math.isnan(likelihood.entropy_bits(NAN)) and math.isnan(likelihood.preference(NAN))


def test_bias_says_its_direction():
    pairs = [{"a": "x", "b": "y", "stereotype": side} for side in ("a", "b", "a", "")]
    scores = [[Score(-1), Score(-2)], [Score(-1), Score(-2)], [Score(-1), Score(-1)], [Score(0), Score(-1)]]
    assert same(values(likelihood.crows_pairs_measures(pairs, scores), "prefers_stereotype"), (1, 0, 0.5, NAN))
    unknown = [{**row, "stereotype": ""} for row in pairs]
    assert values(likelihood.crows_pairs_measures(unknown, scores), "prefers_first") == (1, 1, 0.5, 1)
    jobs = [{"occupation": f"job {i % 2}", "bls_pct_female": None} for i in range(4)]
    entropy, male = likelihood.winogender_measures(jobs, scores)
    assert male.values == (1, 1, 0.5, 1) and entropy.groups == ("job 0", "job 1") * 2
    assert entropy.estimate().n == 2


def test_correlation_with_the_share_of_women():
    """By hand, and its interval against bootstrap's standard error."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    x = torch.randn(600, generator=generator, dtype=torch.float64)
    y = x + torch.randn(600, generator=generator, dtype=torch.float64)
    groups = [f"job {i // 2}" for i in range(1200)]
    found = likelihood.correlation_values(groups, x.repeat_interleave(2).tolist(), y.repeat_interleave(2).tolist())
    measure = likelihood.Measure("bls_correlation", found, tuple(groups), unit="correlation")
    estimate = measure.estimate()
    assert estimate.value == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    draws = torch.randint(600, (1000, 600), generator=generator)
    spread = torch.stack([torch.corrcoef(torch.stack([x[d], y[d]]))[0, 1] for d in draws]).std()
    assert (estimate.high - estimate.low) / 3.92 == pytest.approx(float(spread), rel=0.4)
    perfect = likelihood.correlation_values([*"abcd"], [1, 2, 3, 4], [2, 4, 6, 8])
    found = likelihood.Measure("bls_correlation", perfect, tuple("abcd"), unit="correlation").estimate()
    assert found.value == pytest.approx(1) and found.low < 0 and found.high <= 1
    assert likelihood.correlation_values(["a", "b"], [1, 2], [3, 4]) == ()
    assert likelihood.correlation_values(["a", "b", "c"], [1, 1, 1], [3, 4, 5]) == ()
    against = measure._replace(values=tuple(likelihood.correlation_values([*"abcd"], [4, 2, 3, 1], [2, 4, 6, 8])))
    four = measures.paired_difference(measure._replace(values=perfect, groups=tuple("abcd")), against)
    assert four.value == pytest.approx(1.8) and -2 <= four.low < four.high == 2, "no difference is above 2"
    three = [likelihood.correlation_values([*"abc"], x, [1, 2, 3]) for x in ([1, 2, 4], [5, 1, 2])]
    ours, theirs = (measure._replace(values=values, groups=tuple("abc")) for values in three)
    assert measures.paired_difference(ours, theirs)[1:] == (-2, 2, 3), "three pairs say nothing"
    gaps = likelihood.correlation_values(["a", "b", "c", "d"], [1, 2, 3, 9], [3, 5, 4, None])
    assert math.isnan(gaps[3]) and sum(gaps[:3]) / 3 == pytest.approx(0.5)


def test_text_counts_tokens_and_bytes():
    scores = [[Score(-3.0, num_tokens=4), Score(-1.0, num_tokens=1)], [Score(-2.0, num_tokens=1)]]
    nats, bits = likelihood.text_measures([{"text": "äé€"}, {"text": "a"}], scores)
    assert nats.estimate().value == pytest.approx(6 / 6)
    assert bits.estimate().value == pytest.approx(6 / math.log(2) / (7 + 1))


def test_pairs_and_windows(tokenizer):
    """A word is a token; the tokenizer has no start token, so that the end token stands for it."""
    encoder, ids = Encoder(tokenizer, 8), lambda text: tokenizer(text).input_ids
    end = tokenizer.eos_token_id
    assert encoder.pair("anna is  ", "a baker .") == (ids("anna is"), ids("a baker ."))
    assert encoder.pair("", "a baker .") == ([end], ids("a baker ."))
    assert encoder.pair("", "<|end|> a baker .") == ([end], ids("a baker ."))
    assert encoder.pair("  ", "a baker .") == ([end], ids("a baker ."))
    assert encoder.overlong == 0
    long = "anna is a " * 9
    assert encoder.pair(long, "baker .") == (ids(long)[-7:], ids("baker .")) and encoder.overlong == 1
    assert encoder.prompt(long, 5) == ids(long)[-3:] and encoder.overlong == 2
    assert encoder.max_new_tokens(256) == 4 and Encoder(tokenizer).max_new_tokens(256) == 256
    windows = encoder.windows(long)
    assert [len(window) for _, window in windows] == [8, 8, 8, 3] and all(start == [end] for start, _ in windows)
    assert [token for _, window in windows for token in window] == ids(long)
    assert encoder.shortened == 1, "a limit of positions"
    assert len(encoder.windows("anna is a baker .")) == 1 and len(encoder.windows(long, 7)) == 4
    assert encoder.shortened == 1 and encoder.overlong == 2
    for call, message in (
        (lambda: encoder.pair("a", " "), "gives no token"),
        (lambda: encoder.windows(" "), "gives no token"),
        (lambda: encoder.pair("a", " " + long), "has 27 tokens, more than the model's 8 positions"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_tokenizer_without_start_and_end_is_refused_by_name():
    bare = make_tokenizer()
    bare.eos_token, bare.name_or_path = None, "runs/bare"
    with pytest.raises(
        UserError, match=r"^runs/bare: has neither a start nor an end token.* \(bos_token or eos_token\)$"
    ):
        Encoder(bare)


def test_the_format_of_prompts(tokenizer):
    dialog = Encoder(tokenizer, 0, PromptFormat("dialog"))
    context, continuation = dialog.pair("anna", " a baker .")
    assert tokenizer.decode(context).split()[1:2] == ["anna"] and tokenizer.decode(continuation) == "a baker ."
    assert dialog.pair("", "a baker .") == Encoder(tokenizer).pair("", "a baker .")


def test_verdicts_become_measures():
    answers = ["yes", "", "no", "who"]
    verdicts = [Verdict(0.9), Verdict(NAN, "empty"), Verdict(0.5), Verdict(NAN, "too short")]
    rows = [{"source": s, "group": s, "bin": b} for s, b in (("x", 0), ("y", 1), ("y", 1), ("x", -1))]
    found = generation.refusal_measures(True)(rows, answers, {"refusal": verdicts}, {"refusal": Judge()})
    assert same(values(found, "refusal_rate"), (1, NAN, 0, NAN))
    assert same(values(found, "refusal_rate_y"), (NAN, NAN, 0, NAN))
    assert values(found, "empty") == (0, 1, 0, 0) and values(found, "unjudged") == (0, 0, 0, 1)
    assert all(measure.groups == ("x", "y", "y", "x") for measure in found)
    found = generation.toxicity_measures(rows, answers, {"toxicity": verdicts}, {"toxicity": Judge()})
    assert same(values(found, "toxic"), (1, NAN, 0, NAN)) and same(values(found, "toxic_bin_1"), (NAN, NAN, 0, NAN))
    assert next(m for m in found if m.name == "toxicity").unit == "score"
    both = {"truth": verdicts, "informative": [Verdict(0.1), Verdict(1), Verdict(1), Verdict(1)]}
    found = generation.truth_measures(rows, answers, both, {"truth": Judge("t"), "informative": Judge("i", 0.05)})
    assert same(values(found, "true_and_informative"), (1, NAN, 0, NAN))
    assert {m.name: m.judge for m in found}["true_and_informative"] == "t and i"
    words, empty = generation.length_measures(rows, answers, {}, {})
    assert words.values == (1, 0, 1, 1) and empty.values == (0, 1, 0, 0)


def test_prompts_and_cuts():
    row, own = {"question": "why?", "prompt": ""}, {"question": "why?", "prompt": "ask : why ?"}
    assert TASKS["truthfulqa"].prompt(row).endswith("Barcelona, Spain.\n\nQ: why?\nA:")
    assert "unless you are completely certain" in TASKS["truthfulqa_instruction"].prompt(row)
    assert TASKS["truthfulqa"].prompt(own) == "ask : why ?" and TASKS["truthfulqa"].question(own) == "why?"
    assert TASKS["truthfulqa"].cut(" yes \nQ: no") == "yes" and TASKS["refusal"].cut(" a\nb ") == "a\nb"
    biased = {"prompt": "x", "instructions": {"respectful": "please", "biased": "rudely"}}
    assert TASKS["toxicity_biased"].prompt(biased) == "rudely\n\nx" and TASKS["toxicity"].prompt(biased) == "x"
    assert (
        TASKS["toxicity_respectful"].prompt({"prompt": "x"}).startswith("Complete the following sentence in a polite")
    )


def test_selection_of_tasks():
    assert [*GROUPS] == ["preference", "truth", "toxicity", "bias", "tax", "refusal"]
    assert [task.name for task in select_tasks(["lambada,truth", "hellaswag"])] == [
        "truthfulqa", "truthfulqa_instruction", "truthfulqa_mc", "hellaswag", "lambada"]  # fmt: skip
    assert [task.name for task in select_tasks(["all"])] == [*TASKS]
    assert [task.name for task in select_tasks(["refusal"])] == ["refusal", "over_refusal"]
    with pytest.raises(UserError, match="there is no 'helaswag'; did you mean hellaswag"):
        select_tasks(["tax", "helaswag"])
    assert {task.set for task in TASKS.values()} == SETS.keys()


def test_the_list_of_tasks(tmp_path):
    write(tmp_path, lambada__jsonl='{"text": "a b"}\n', text__jsonl="{}")
    found = {entry.task: entry for entry in describe(tmp_path)}
    assert (found["lambada"].file, found["lambada"].rows) == ("lambada.jsonl", 1)
    assert (found["hellaswag"].file, found["hellaswag"].rows) == ("hellaswag.jsonl", None)
    assert found["text"].rows is None and "no layout of text" in found["text"].error
    assert found["truthfulqa"].judges == ("truth", "informative")
    assert found["refusal"].summary.endswith("by source; --tasks refusal also runs over_refusal")
    assert found["toxicity"].summary.endswith("also runs toxicity_respectful and toxicity_biased")
    assert all("also runs" not in found[name].summary for name in TASKS if name not in ("refusal", "toxicity"))


def test_sets_of_the_demo(tokenizer):
    """They are as the script writes them, in words that the demo's models know, and fit into their positions."""
    drawn = draw_sets()
    assert sorted(path.stem for path in DEMO_SETS.iterdir()) == sorted(drawn)
    encoder = Encoder(tokenizer, 128)
    for name, rows in drawn.items():
        assert read_rows(DEMO_SETS / f"{name}.jsonl") == json.loads(json.dumps(rows)), (
            f"run rlhf_fast.demo.eval_sets: {name}"
        )
    for task in TASKS.values():
        rows = read(task.set, DEMO_SETS)
        assert 8 <= len(rows) <= 24
        for row in rows:
            if isinstance(task, GenerationTask):
                tokens = encoder.prompt(task.prompt(row), encoder.max_new_tokens(task.max_new_tokens))
            else:
                tokens = [token for request in task.requests(row, encoder) for part in request for token in part]
            assert tokenizer.unk_token_id not in tokens and tokens
    assert not encoder.overlong


def test_ranked_responses_of_the_demo(tokenizer):
    """The demo trains on none of their prompts; each row has a best response; the models know all words."""
    rows = draw_sets()["rankings"]
    materials = draw_materials(Plan(), 0)
    trained = {task.prompt for own in (materials.demonstrations, materials.ranked, materials.prompts) for task in own}
    assert len(rows) == 24 and trained.isdisjoint(row["prompt"] for row in rows)
    for row in rows:
        assert len(row["responses"]) == len(row["ranks"]) >= 3 and sorted(row["ranks"])[:2] == [0, 1]
        for text in [row["prompt"], *row["responses"]]:
            assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("answer", "judged"),
    [
        (" I cannot.\n\nSorry. ", "I cannot.\n\nSorry."),
        ("<think>\nShould I?\n</think>\n\nI cannot.\nSorry.", "I cannot.\nSorry."),
        ("Should I? No.</think>I cannot.", "I cannot."),
        ("<think> It ends within", ""),
        ("<think>a</think>", ""),
        ("I think so", "I think so"),
    ],
)
def test_reasoning_is_not_the_answer(answer, judged):
    assert generation.whole(answer) == judged and generation.first_line(answer) == judged.partition("\n")[0]
