"""`rlhf-fast demo`: InstructGPT's experiment at the smallest scale. Every number of its table is measured in the run.

The base models come with the package (pretrain.py made them). Everything after them happens here: the demo writes data
files (data/*.jsonl) and runs the ordinary stages on them (sft/, reward/, ppo-ptx/ and ppo/ in `out`). The procedure is
the paper's with smaller sizes and larger learning rates. A demo that was stopped resumes in the same `out`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast.demo import report
from rlhf_fast.demo.labelers import Judgement, Pair, agreement, calibrate, judge, make_labelers
from rlhf_fast.demo.materials import (
    HELD_OUT,
    TRAINING,
    Materials,
    Plan,
    draw_materials,
    read_rows,
    write_materials,
    write_rows,
)
from rlhf_fast.demo.measure import load_model, sample_responses, text_loss, win_rate
from rlhf_fast.demo.recipes import ppo_config, reward_config, sft_config
from rlhf_fast.demo.tasks import CLOSED, Task
from rlhf_fast.errors import UserError, writing
from rlhf_fast.eval.estimates import Estimate, estimate_from, mean
from rlhf_fast.eval.reward_report import reward_accuracy
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.outputs import check_empty_folder, read_json, require_writable_folder
from rlhf_fast.stages import ppo, reward, sft

BASE_MODELS = Path(__file__).parent / "models"
MODELS = ("base", "large", "sft", "ppo", "ppo-ptx")
COMPARISONS = (("sft", "base"), ("ppo-ptx", "sft"), ("ppo-ptx", "base"), ("ppo-ptx", "large"), ("ppo", "sft"))
QUICK = Plan(
    demonstrations=64,
    texts=400,
    held_texts=20,
    ranked=24,
    ranked_held=12,
    prompts=100,
    held=20,
    questions=12,
    rude=6,
    batch=32,
    minibatch=16,
    batches=2,
)

VERSION = 2
"""Version of the files of results. 1: estimates were a mean and half the width of its interval."""

Results = Mapping[str, float | Estimate]


class Trial(NamedTuple):
    """One run of the demo."""

    out: Path
    seed: int
    plan: Plan
    materials: Materials

    @property
    def data(self) -> Path:
        return self.out / "data"

    def model(self, name: str) -> Path:
        return {"base": BASE_MODELS / "small", "large": BASE_MODELS / "large"}.get(name, self.out / name)

    def result_file(self, step: str) -> Path:
        return self.out / "steps" / f"{step}.json"

    def result(self, step: str) -> dict[str, Any]:
        """Return the results of a finished step."""
        return json.loads(self.result_file(step).read_text(encoding="utf-8"))


class Step(NamedTuple):
    name: str
    title: str
    cost: float  # share of the total time, for the time left
    run: Callable[[Trial], Results | None]


def run(out: str | Path = "runs/demo", seed: int = 0, quick: bool = False) -> list[report.Row]:
    """Run the unfinished steps in `out`, print the table and return its lines.

    Also writes table.txt, numbers.json and, with matplotlib, the curves of both PPO runs, ppo-ptx.png and ppo.png.
    """
    plan = QUICK if quick else Plan()
    trial = Trial(Path(out), seed, plan, draw_materials(plan, seed))
    prepare_folder(trial)
    with one_thread():
        run_steps(trial)
    return write_results(trial)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread. For models this small, more threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_folder(trial: Trial) -> None:
    """Create the folder, or check that it holds this demo. UserError if it holds another one."""
    path = trial.out / "demo.json"
    settings = {"seed": trial.seed, "plan": dataclasses.asdict(trial.plan), "version": VERSION}
    require_writable_folder(trial.out)
    saved = read_json(path)
    if saved == settings:
        return
    if isinstance(saved, dict) and {"seed", "plan"} <= saved.keys() and saved.get("version") != VERSION:
        raise UserError(f"{trial.out}: holds a demo of another version of rlhf-fast; choose another --out")
    if isinstance(saved, dict) and saved.keys() == settings.keys():
        raise UserError(f"{trial.out}: holds a demo with other settings (demo.json); choose another --out")
    may_hold = () if any((trial.out / "steps").glob("*")) else ("steps", "demo.json.tmp")
    check_empty_folder(trial.out, "demo", may_hold)
    with writing(trial.out):
        (trial.out / "steps").mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def run_steps(trial: Trial) -> None:
    """Run the unfinished steps and write the results of each to steps/<name>.json."""
    start, finished_cost = time.perf_counter(), 0.0
    for number, step in enumerate(STEPS, 1):
        if trial.result_file(step.name).exists():
            message(f"[{number}/{len(STEPS)}] {step.title}: done before")
            continue
        left = time_left(time.perf_counter() - start, finished_cost, number - 1)
        message(f"[{number}/{len(STEPS)}] {step.title}" + (f"  (about {left} to the table)" if left else ""))
        step_start = time.perf_counter()
        found = step.run(trial) or {}
        results = {name: value.fields() if isinstance(value, Estimate) else value for name, value in found.items()}
        write_json(trial.result_file(step.name), {**results, "seconds": time.perf_counter() - step_start})
        finished_cost += step.cost


def message(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


def time_left(elapsed: float, finished_cost: float, num_done: int) -> str:
    """Return m:ss for the steps after the first `num_done`; `finished_cost` of them ran in `elapsed` seconds."""
    if finished_cost < 5:  # too little to extrapolate from
        return ""
    left = round(elapsed / finished_cost * sum(step.cost for step in STEPS[num_done:]))
    return f"{left // 60}:{left % 60:02d}"


def prepare_data(trial: Trial) -> None:
    write_materials(trial.materials, trial.plan, trial.seed, trial.data)


def train_sft(trial: Trial) -> None:
    sft.run(sft_config(trial.plan, trial.model("base"), trial.data, trial.out / "sft", trial.seed))


def train_reward(trial: Trial) -> None:
    reward.run(reward_config(trial.plan, trial.out, trial.data, trial.out / "reward", trial.seed))


def train_ppo(trial: Trial) -> None:
    ppo.run(ppo_config(trial.plan, trial.out, trial.data, trial.out / "ppo", trial.seed, ptx=False))


def train_ppo_ptx(trial: Trial) -> None:
    ppo.run(ppo_config(trial.plan, trial.out, trial.data, trial.out / "ppo-ptx", trial.seed, ptx=True))


def rank(trial: Trial) -> Results:
    """Sample 4 to 9 responses to each prompt from the SFT model, and let one labeler rank those of each prompt.

    The training prompts' pairs first set the labelers' noise. Empty responses are left out.
    """
    rng = random.Random(f"ranking {trial.seed}")
    world = trial.materials.world
    model = load_model(trial.model("sft"))
    answers: dict[str, list[tuple[Task, list[str]]]] = {}
    for name, tasks in (("train", trial.materials.ranked), ("held", trial.materials.ranked_held)):
        counts = [rng.randint(4, 9) for _ in tasks]
        responses = sample_responses(model, tasks, trial.seed + len(name), counts)
        answers[name] = [(task, [text for text in texts if text]) for task, texts in zip(tasks, responses, strict=True)]
    noise = calibrate(TRAINING, trial.seed, draw_pairs(answers["train"], rng), world)
    groups = {
        "": make_labelers(TRAINING, trial.seed, noise),
        "_by_held_out": make_labelers(HELD_OUT, trial.seed, noise),
    }
    for name, group in (("train", ""), ("held", ""), ("held", "_by_held_out")):
        rows = []
        for task, texts in answers[name]:
            labeler = rng.choice(groups[group])
            ranks = labeler.ranks(task, texts, world)
            if len(set(ranks)) > 1:  # tied responses teach the reward model nothing
                rows.append({"prompt": task.prompt, "responses": texts, "ranks": ranks, "labeler": labeler.name})
        write_rows(trial.data / f"rankings_{name}{group}.jsonl", rows)
    new_pairs = draw_pairs(answers["held"], rng)
    return {
        "noise": noise,
        "agreement": agreement(groups[""], new_pairs, world),
        "agreement/held-out": agreement(groups["_by_held_out"], new_pairs, world),
    }


def draw_pairs(answers: list[tuple[Task, list[str]]], rng: random.Random) -> list[Pair]:
    """Draw two different responses to each prompt that has them."""
    pairs = []
    for task, texts in answers:
        if len(set(texts)) > 1:
            first, second = rng.sample(sorted(set(texts)), 2)
            pairs.append((task, first, second))
    return pairs


def respond(trial: Trial) -> Results:
    """Write every model's responses to the held-out prompts, with the same noise for all; return its text loss."""
    losses: dict[str, Estimate] = {}
    for name in MODELS:
        model = load_model(trial.model(name))
        rows = []
        for number, (probe, tasks) in enumerate(trial.materials.probes.items()):
            responses = sample_responses(model, tasks, trial.seed + 100 + number)
            for task, (response,) in zip(tasks, responses, strict=True):
                rows.append({"probe": probe, "prompt": task.prompt, "response": response})
        write_rows(trial.out / "answers" / f"{name}.jsonl", rows)
        losses[f"loss/{name}"] = text_loss(model, trial.data / "held_texts.jsonl")
    return losses


def measure(trial: Trial) -> Results:
    """Return all numbers of the table."""
    results: dict[str, Estimate] = {}
    held_out_responses: dict[str, list[str]] = {}
    for name in MODELS:
        rows = read_rows(trial.out / "answers" / f"{name}.jsonl")
        responses = {
            probe: [row["response"] for row in rows if row["probe"] == probe] for probe in trial.materials.probes
        }
        held_out_responses[name] = responses["held"]
        results |= {f"{statistic}/{name}": value for statistic, value in judge_responses(trial, responses).items()}
    noise = trial.result("rank")["noise"]
    for names, suffix in ((TRAINING, ""), (HELD_OUT, "/held-out")):
        labelers = make_labelers(names, trial.seed, noise)
        for ours, theirs in COMPARISONS:
            results[f"win/{ours}/{theirs}{suffix}"] = win_rate(
                labelers,
                trial.materials.held,
                held_out_responses[ours],
                held_out_responses[theirs],
                trial.materials.world,
            )
    reward_model = load_model(trial.out / "reward", "scalar")
    results["accuracy"] = reward_accuracy(reward_model, str(trial.data / "rankings_held.jsonl"))
    results["accuracy/held-out"] = reward_accuracy(reward_model, str(trial.data / "rankings_held_by_held_out.jsonl"))
    return results


def judge_responses(trial: Trial, responses: Mapping[str, list[str]]) -> dict[str, Estimate]:
    """Return one model's rates of true, false, invented, rude and helpful responses, and its mean length."""
    judged: dict[str, list[Judgement]] = {}
    for probe, tasks in trial.materials.probes.items():
        pairs = zip(tasks, responses[probe], strict=True)
        judged[probe] = [judge(task, response, trial.materials.world) for task, response in pairs]
    held = judged["held"]
    closed = [j for task, j in zip(trial.materials.held, held, strict=True) if task.category in CLOSED]
    return {
        "true": mean(j.truthful for j in judged["questions"]),
        "false": mean(j.false / (j.true + j.false) for j in held if j.true + j.false),
        "invented": mean(j.invented for j in closed),
        "impolite": mean(j.rude for j in held),
        "rude": mean(j.rude for j in judged["rude"]),
        "polite": mean(j.rude for j in judged["polite"]),
        "helpful": mean(j.helpful for j in held),
        "words": mean((j.words for j in held), bounded=False),
    }


STEPS = (
    Step("prepare", "the world's people write: raw text, demonstrations, prompts", 1, prepare_data),
    Step("sft", "supervised fine-tuning of the small base model", 8, train_sft),
    Step("rank", "4 to 9 responses to each prompt, ranked by five labelers", 32, rank),
    Step("reward", "the reward model", 67, train_reward),
    Step("ppo-ptx", "PPO with pretraining gradients (PPO-ptx)", 124, train_ppo_ptx),
    Step("ppo", "PPO without them, to see the alignment tax", 96, train_ppo),
    Step("respond", "five models answer the prompts kept apart", 40, respond),
    Step("measure", "the labelers judge", 7, measure),
)


def write_results(trial: Trial) -> list[report.Row]:
    """Print the table and notes on it, and write them to files."""
    results = [trial.result(step) for step in ("rank", "respond", "measure")]
    noise = results[0]["noise"]
    values = {name: value for found in results for name, value in found.items() if name not in ("noise", "seconds")}
    numbers = {name: estimate_from(fields) for name, fields in values.items()}
    seconds = sum(trial.result(step.name)["seconds"] for step in STEPS)
    notes = [
        "A quick run: too little of everything for these numbers to mean anything." if trial.plan == QUICK else "",
        "Intervals are over prompts. Responses are sampled at temperature 1; each pair is judged by five labelers.",
        f"The labelers' noise is {noise:.2f}, set so that two of them agree on 73 % of the training pairs.",
        "The 10x larger base model read a fifth of the small one's words; its loss on raw text is"
        f" {report.nats(numbers['loss/large'])}.",
        plot_curves(trial),
        f"Took {seconds / 60:.1f} minutes. All responses: {trial.out / 'answers'}; models, metrics: {trial.out}.",
        f"More on these models: {eval_command(trial)}",
    ]
    lines = report.print_table(numbers, notes)
    with writing(trial.out):
        text = "\n".join([report.plain_table(lines), report.LEGEND, *notes]) + "\n"
        (trial.out / "table.txt").write_text(text, encoding="utf-8")
    measured = {name: value.fields() for name, value in numbers.items() if value.n}
    write_json(trial.out / "numbers.json", measured)
    return lines


def eval_command(trial: Trial) -> str:
    """Return the command that evaluates the demo's models on the sets of its world, with its reward model as judge, and
    that reward model itself."""
    models = " ".join(f"{name}={trial.model(name)}" for name in ("base", "sft", "ppo", "ppo-ptx"))
    reward, out = trial.out / "reward", trial.out / "eval"
    return f"rlhf-fast eval --models {models} --judge.preference {reward} --reward {reward} --out {out}"


def plot_curves(trial: Trial) -> str:
    """Plot the curves of both PPO runs; return a sentence with their files, or the reason why there are none."""
    from rlhf_fast.run.plot import plot

    try:
        files = [plot(trial.out / name, trial.out / f"{name}.png") for name in ("ppo-ptx", "ppo")]
    except UserError as error:
        return f"No curves: {error}"
    return "Curves of reward, KL and length: " + ", ".join(map(str, files))
