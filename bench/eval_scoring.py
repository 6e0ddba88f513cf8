"""Scoring of the evaluation's log-probability tasks beside lm-eval's HFLM, on the same requests, in turns.

    OMP_NUM_THREADS=1 python -m rlhf_fast.bench.eval_scoring MODEL SETS [--rows 16] [--tasks hellaswag lambada]

MODEL is a folder with a language model, SETS one with the benchmarks' files (`rlhf-fast eval --list`). The times are
CPU seconds of the process, the least of the repeats, in float32. "torch products" is the tree of prefixes: its tokens
times all matrices of the layers, and the scored tokens times the head, at the rate of one bare product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.run_task import read_scores, score_rows
from rlhf_fast.eval.sets import read_set, require_set
from rlhf_fast.eval.tasks import TASKS
from rlhf_fast.model.model import Model
from rlhf_fast.scoring import Request, Score, Scorer

BATCH = 16
"""HFLM's batch; its own default is 1."""
DEFAULT_TASKS = ("hellaswag", "lambada", "truthfulqa_mc", "winogender", "crows_pairs")
PRODUCT = (1024, 1536)
"""Rows, and the least output width, of the bare product."""


class Result(NamedTuple):
    """Scores of a task's requests by both, and the CPU seconds of each."""

    task: LikelihoodTask
    rows: Sequence[dict[str, Any]]
    requests: list[list[Request]]
    ours: list[Score]
    theirs: list[Score]
    our_seconds: float
    their_seconds: float
    product_seconds: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        n = len(self.rows)
        gap = max(abs(a.logprob - b.logprob) for a, b in zip(self.ours, self.theirs, strict=True))
        flags = sum(a.greedy == b.greedy for a, b in zip(self.ours, self.theirs, strict=True))
        ours, theirs = (self.task.measures(self.rows, self._by_row(scores)) for scores in (self.ours, self.theirs))
        decided = [
            sum(x == y for x, y in zip(a.values, b.values, strict=True))
            for a, b in zip(ours, theirs, strict=True)
            if set(a.values) | set(b.values) <= {0.0, 0.5, 1.0}
        ]
        decisions = f"{sum(decided)} of {n * len(decided)}" if decided else "-"
        return [
            self.task.name,
            str(n),
            f"{self.their_seconds / n:.4f}",
            f"{self.our_seconds / n:.4f}",
            f"{self.their_seconds / self.our_seconds:.2f}",
            f"{self.our_seconds / self.product_seconds:.2f}",
            f"{gap:.1e}",
            f"{flags} of {len(self.ours)}",
            decisions,
        ]

    def _by_row(self, scores: Sequence[Score]) -> list[list[Score]]:
        left = iter(scores)
        return [[next(left) for _ in found] for found in self.requests]


HEADER = [
    *("task", "rows", "HFLM s/row", "ours s/row", "HFLM / ours", "ours / torch products"),
    *("gap, nats", "greedy flags equal", "decisions equal"),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sets")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS)
    options = parser.parse_args(argv)
    theirs = make_hflm(options.model)
    model = Model.load(ModelConfig(path=options.model))
    rate = product_rate(model)
    print(f"{torch.get_num_threads()} threads; a bare product {rate / 1e9:.0f} GF/s; {options.rows} rows, float32")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|", flush=True)
    for name in options.tasks:
        result = compare(TASKS[name], model, theirs, options.sets, options.rows, options.repeats, rate)
        print("| " + " | ".join(result.cells()) + " |", flush=True)


def compare(
    task: Any, model: Model, theirs: Callable[[list[Request]], list[Score]], sets: str, rows: int, repeats: int,
    rate: float,
) -> Result:  # fmt: skip
    """Score the first rows of a task by both, in turns."""
    if not isinstance(task, LikelihoodTask):
        raise UserError(f"{task.name} is no task of log-probabilities")
    found = read_set(task.set, require_set(task.set, sets), rows)
    encoder = Encoder(model.tokenizer, model.max_positions)
    requests = [task.requests(row, encoder) for row in found]
    flat = [request for own in requests for request in own]
    times: tuple[list[float], list[float]] = ([], [])
    scorer = Scorer(model)
    for _ in range(repeats):
        scorer.tokens_read = 0
        ours = timed(lambda: scorer(flat), times[0])
        others = timed(lambda: theirs(flat), times[1])
    assert ours == [score for record in score_rows(model, task, found, encoder) for score in read_scores(record)]
    scored = sum(len(y) for _, y in {(tuple(x), tuple(y)) for x, y in flat})
    products = (scorer.tokens_read * layer_flops(model) + scored * 2 * model.head_weight.numel()) / rate
    return Result(task, found, requests, ours, others, min(times[0]), min(times[1]), products)


def timed(call: Callable[[], Any], times: list[float]) -> Any:
    """Return what `call` returns; append the CPU seconds that it takes."""
    start = time.process_time()
    result = call()
    times.append(time.process_time() - start)
    return result


def layer_flops(model: Model) -> int:
    """Return the operations of one token in the matrices of all layers, attention's products with keys left out."""
    return sum(2 * p.numel() for name, p in model.decoder.named_parameters() if p.ndim == 2 and "embed" not in name)


def product_rate(model: Model) -> float:
    """Return the operations in a CPU second of one product as wide as the model's."""
    width = model.head_weight.shape[1]
    x, weight = torch.randn(PRODUCT[0], width), torch.randn(max(PRODUCT[1], 2 * width), width)
    times: list[float] = []
    for _ in range(30):
        timed(lambda: torch.nn.functional.linear(x, weight), times)
    return 2 * x.numel() * weight.shape[0] / min(times)


def make_hflm(path: str) -> Callable[[list[Request]], list[Score]]:
    """Return a function that scores requests by lm-eval's HFLM."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}); pip install lm_eval") from error
    lm = HFLM(pretrained=str(Path(path)), dtype="float32", batch_size=BATCH, device="cpu")

    def score(requests: list[Request]) -> list[Score]:
        named = [((str(i), ""), list(x), list(y)) for i, (x, y) in enumerate(requests)]
        found = lm._loglikelihood_tokens(named, disable_tqdm=True)
        return [
            Score(float(logprob), bool(greedy), len(y))
            for (logprob, greedy), (_, y) in zip(found, requests, strict=True)
        ]

    return score


if __name__ == "__main__":
    main()
