"""Fixed results of an evaluation, as results.json holds them."""

from __future__ import annotations

import random

from rlhf_fast.eval.measures import Measure, difference_record, result_record

GROUPS = {
    "preference": ("preference",),
    "truth": ("truthfulqa", "truthfulqa_instruction", "truthfulqa_mc"),
    "toxicity": ("toxicity", "toxicity_respectful", "toxicity_biased"),
    "bias": tuple(f"{task}{end}" for task in ("winogender", "crows_pairs") for end in ("", "_respectful", "_biased")),
    "tax": ("hellaswag", "lambada", "text"),
    "refusal": ("refusal", "over_refusal"),
}
SHARES = {
    "truthfulqa": ("true", "informative", "true_and_informative"),
    "truthfulqa_instruction": ("true", "informative", "true_and_informative"),
    "truthfulqa_mc": ("mc1", "mc2"),
    "toxicity": ("toxic",),
    "toxicity_respectful": ("toxic",),
    "toxicity_biased": ("toxic",),
    "hellaswag": ("acc", "acc_norm", "acc_token"),
    "refusal": ("refusal_rate", "refusal_rate_advbench", "empty"),
    "over_refusal": ("refusal_rate", "empty"),
}
JUDGES = {
    "truth": {"name": "references", "threshold": 0.5, "validation": {
        "labels": "people, TruthfulQA", "n": 4564, "accuracy": 0.751, "recall": 0.69, "false_alarms": None,
        "auc": 0.828, "date": "2026-11-26", "note": "folds by question"}},
    "informative": {"name": "no comment", "threshold": 0.5, "validation": None},
    "toxicity": {"name": "letters", "threshold": 0.5, "validation": {
        "labels": "Perspective", "n": 3200, "accuracy": 0.776, "recall": 0.7, "false_alarms": 0.2, "auc": 0.844,
        "date": "", "note": ""}},
}  # fmt: skip


def make_results(models=("base", "sft", "ppo"), rows=200, groups=GROUPS, seed=0):
    """Return made-up results of some models; each is a little better than the one before."""
    draw = random.Random(seed)
    measures = {model: _measures(draw, 0.1 * i, rows) for i, model in enumerate(models)}
    known = {task for tasks in groups.values() for task in tasks}
    kept = {model: [pair for pair in found if pair[0] in known] for model, found in measures.items()}
    baseline = models[0]
    results = [result_record(model, task, measure, 1.5) for model, found in kept.items() for task, measure in found]
    differences = [
        difference_record(model, baseline, task, ours, theirs)
        for model in models[1:]
        for (task, ours), (_, theirs) in zip(kept[model], kept[baseline], strict=True)
    ]
    if "preference" in groups:
        for i, model in enumerate(models[1:], 1):
            votes = Measure("win_rate", tuple(_bits(draw, 0.5 + 0.1 * i, rows)), judge="runs/rm")
            results.append(result_record(model, "preference", votes))
    meta = {"limit": rows, "seed": seed, "template": "plain", "dtype": "float32", "versions": {"torch": "2.13"}}
    notes = ["Win rates are against base.", "skipped: text (no file)"]
    return {"results": results, "differences": differences, "judges": JUDGES, "notes": notes, "meta": meta}


def _bits(draw, share, rows):
    return [float(draw.random() < share) for _ in range(rows)]


def _measures(draw, better, rows):
    judge = {"truthfulqa": "references and no comment", "toxicity": "letters", "refusal": "stance"}
    found = [
        (task, Measure(name, tuple(_bits(draw, 0.3 + better, rows)), judge=judge.get(task, "")))
        for task, names in SHARES.items()
        for name in names
    ]
    scores = tuple(draw.random() for _ in range(rows))
    found.append(("toxicity", Measure("toxicity", scores, unit="score", judge="letters", higher_is_better=False)))
    for task in GROUPS["bias"]:
        bits = tuple(min(draw.random() + better, 1.0) for _ in range(rows // 2))
        found.append((task, Measure("entropy", bits, tuple(f"group {i // 4}" for i in range(rows // 2)), unit="bits")))
    found.append(("lambada", Measure("acc", tuple(_bits(draw, 0.4, rows)))))
    losses = tuple(draw.gauss(3.5 - better, 1.0) for _ in range(rows))
    found.append(("lambada", Measure("perplexity", losses, unit="perplexity", higher_is_better=False)))
    sizes = tuple(float(draw.randint(200, 900)) for _ in range(20))
    bits = tuple(size * draw.gauss(1.1 - better / 5, 0.1) for size in sizes)
    found.append(("text", Measure("bits_per_byte", bits, (), sizes, "bits/byte", higher_is_better=False)))
    return found
