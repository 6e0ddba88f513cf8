"""The tasks of the paper's evaluation, in its order: preference, truth, toxicity, bias, alignment tax, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.errors import UserError, did_you_mean, listed
from rlhf_fast.eval import generation, likelihood
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.instructions import question_prompt
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.sets import SETS, find_set, read_set

Task = LikelihoodTask | GenerationTask
MANNERS = {"": "", "respectful": " after a respectful instruction", "biased": " after a biased instruction"}
ALL = "all"
SENTENCE_PAIRS = (
    (
        ("winogender", "of a pronoun", ("male", "female"), likelihood.winogender_measures),
        ("entropy", "prefers_male", "bls_correlation"),
    ),
    (
        ("crows_pairs", "between two groups", ("a", "b"), likelihood.crows_pairs_measures),
        ("entropy", "prefers_stereotype", "prefers_first"),
    ),
)
"""Set, choice, columns of the two sentences, measures and their names of the tasks on bias."""
VERDICTS = ("empty", "unjudged", "flips_*")
"""Measures of how answers were judged."""
REFUSALS = ("refusal_rate", "refusal_rate_*", *VERDICTS)
WIN_RATES = ("win_rate", "lc_win_rate", "longer_wins", "flips", "unjudged")
"""Measures of two models' answers."""


def _truth(name: str, summary: str, prompt: Callable[[Row], str]) -> GenerationTask:
    return GenerationTask(
        name,
        "truth",
        "truthfulqa",
        summary,
        prompt,
        ("truth", "informative"),
        generation.truth_measures,
        ("true", "informative", "true_and_informative", *VERDICTS),
        max_new_tokens=64,
        stop=("\n",),
        cut=generation.first_line,
        question=lambda row: row["question"],
    )


def _name(task: str, manner: str) -> str:
    return f"{task}_{manner}" if manner else task


TASK_LIST: tuple[Task, ...] = (
    GenerationTask(
        "preference",
        "preference",
        "prompts",
        "how often a model's answer is preferred to the baseline's",
        lambda row: row["prompt"],
        ("preference",),
        generation.length_measures,
        ("words", "empty", *WIN_RATES),
        max_new_tokens=256,
        is_dialog=True,
    ),
    _truth("truthfulqa", "true and informative answers after six example questions", question_prompt),
    _truth(
        "truthfulqa_instruction",
        "true and informative answers, told to have no comment unless certain",
        generation.literal_prompt,
    ),
    LikelihoodTask(
        "truthfulqa_mc",
        "truth",
        "truthfulqa",
        "mc1: the best answer is likelier than every false one (chance .23 on the whole set); mc2: probability of the"
        " true ones",
        likelihood.truthfulqa_requests,
        likelihood.truthfulqa_measures,
        ("mc1", "mc2"),
        likelihood.truthfulqa_chance,
    ),
    *(
        GenerationTask(
            _name("toxicity", manner),
            "toxicity",
            "toxicity_prompts",
            f"toxic continuations of a sentence{words}; of their mean score only differences mean something",
            generation.manner_prompt(manner),
            ("toxicity",),
            generation.toxicity_measures,
            ("toxic", "toxicity", "toxic_bin_*", *VERDICTS),
            max_new_tokens=20,
            is_continuation=True,
        )
        for manner, words in MANNERS.items()
    ),
    *(
        LikelihoodTask(
            _name(name, manner),
            "bias",
            name,
            f"entropy in bits of the choice {choice}{words} (1: no bias), and its direction",
            likelihood.pair_requests(*columns, manner),
            measures,
            names,
        )
        for (name, choice, columns, measures), names in SENTENCE_PAIRS
        for manner, words in MANNERS.items()
    ),
    LikelihoodTask(
        "hellaswag",
        "tax",
        "hellaswag",
        "the right ending is the likeliest: acc, acc_norm by character, acc_token by token, the paper's (chance .25)",
        likelihood.hellaswag_requests,
        likelihood.hellaswag_measures,
        ("acc", "acc_norm", "acc_token"),
        likelihood.hellaswag_chance,
    ),
    LikelihoodTask(
        "lambada",
        "tax",
        "lambada",
        "acc: the last word is the likeliest (chance 0); perplexity of a word",
        likelihood.lambada_requests,
        likelihood.lambada_measures,
        ("acc", "perplexity"),
    ),
    LikelihoodTask(
        "text",
        "tax",
        "text",
        "loss on held-out text in nats a token and bits a byte",
        likelihood.text_requests,
        likelihood.text_measures,
        ("nats_per_token", "bits_per_byte"),
    ),
    GenerationTask(
        "refusal",
        "refusal",
        "harmful_prompts",
        "refusals of harmful prompts, in all and by source",
        lambda row: row["prompt"],
        ("refusal",),
        generation.refusal_measures(higher_is_better=True),
        REFUSALS,
        max_new_tokens=128,
        is_dialog=True,
    ),
    GenerationTask(
        "over_refusal",
        "refusal",
        "safe_prompts",
        "refusals of safe prompts that look harmful",
        lambda row: row["prompt"],
        ("refusal",),
        generation.refusal_measures(higher_is_better=False),
        REFUSALS,
        max_new_tokens=128,
        is_dialog=True,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in TASK_LIST}
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task.name for task in TASK_LIST if task.group == group)
    for group in dict.fromkeys(task.group for task in TASK_LIST)
}


def select_tasks(names: Iterable[str]) -> list[Task]:
    """Return the tasks of these names and groups, each once, in the paper's order.

    A name may hold several with commas, as lm-eval's. One that a task and its group share means the whole group.
    UserError for an unknown one, and for none.
    """
    wanted = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    selected: set[str] = set()
    if not wanted:
        raise UserError(f"tasks: no name is given; known are {listed([*GROUPS, ALL, *TASKS], 99)}")
    for name in wanted:
        if name != ALL and name not in TASKS and name not in GROUPS:
            known = list(dict.fromkeys([*GROUPS, ALL, *TASKS]))
            hint = did_you_mean(name, known, "", cutoff=0.4)
            raise UserError(
                f"tasks: there is no {name!r}; {hint}{' ' * bool(hint)}known are {listed(known, len(known))}"
            )
        selected.update(TASKS if name == ALL else GROUPS.get(name, (name,)))
    return [task for task in TASK_LIST if task.name in selected]


class Description(NamedTuple):
    """A task for `--list`."""

    task: str
    group: str
    file: str
    """File that is there, or the name that is looked for first."""
    rows: int | None
    """Number of rows in it; None = no file."""
    summary: str
    judges: tuple[str, ...]
    """Roles of the judges."""
    error: str = ""
    """Sentence on a file that cannot be read."""


def describe(folder: str | Path) -> list[Description]:
    """Return each task with the file of its set in a folder and the number of its rows."""
    counts: dict[str, tuple[str, int | None, str]] = {}
    for name, data in SETS.items():
        paths, count, error = find_set(name, folder), None, ""
        try:
            count = len(read_set(name, paths)) if paths else None
        except UserError as fault:
            error = str(fault)
        files = " + ".join(path.name for path in paths) or f"{data.stems[0]}.jsonl"
        counts[name] = (files, count, error)
    found = []
    for task in TASK_LIST:
        file, rows, error = counts[task.set]
        judges = task.judges if isinstance(task, GenerationTask) else ()
        found.append(Description(task.name, task.group, file, rows, task.summary + _as_group(task), judges, error))
    return found


def _as_group(task: Task) -> str:
    """Return what else a task's name runs, because it is that of its group; "" if it is not."""
    others = [name for name in GROUPS.get(task.name, ()) if name != task.name]
    return f"; --tasks {task.name} also runs {' and '.join(others)}" if others else ""
