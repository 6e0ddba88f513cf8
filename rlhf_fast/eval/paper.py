"""The figures of the InstructGPT paper (arXiv 2203.02155), each with its place there and the size of the models.

Table 14 is that of zero-shot models. Its toxicity is a mean of Perspective scores, which no judge of ours gives: beside
our shares stands only what the text says of toxic outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

NOT_THERE, IN_TABLE_14 = "not in the paper", "see its Table 14"
STAGES = ("GPT", "SFT", "PPO", "PPO-ptx")


class PaperFigure(NamedTuple):
    """A measure's figures in the paper."""

    place: str
    """Table or section."""
    size: str = "175B"
    values: Mapping[str, float] = {}
    """Stage -> figure."""
    words: str = ""
    """The figure in words, where it is not one number a stage."""

    def __str__(self) -> str:
        numbers = ", ".join(f"{stage} {value:.3f}" for stage, value in self.values.items())
        return f"{numbers or self.words} ({self.size}; {self.place})"


def _table_14(*values: float, stages: tuple[str, ...] = STAGES) -> PaperFigure:
    return PaperFigure("Table 14", values=dict(zip(stages, values, strict=True)))


PAPER: dict[tuple[str, str], PaperFigure] = {
    ("preference", "win_rate"): PaperFigure(
        "sec. 4.1", words="PPO-ptx 0.85 ± 0.03 against GPT, 0.734 ± 0.02 against SFT"
    ),
    ("truthfulqa", "true"): _table_14(0.284, 0.515, 0.755, 0.712),
    ("truthfulqa", "true_and_informative"): _table_14(0.251, 0.271, 0.752, 0.689),
    ("toxicity", "toxic"): PaperFigure("sec. 4.2", words="PPO-ptx no fewer than GPT"),
    ("toxicity_respectful", "toxic"): PaperFigure("sec. 1", words="PPO-ptx about 25 % fewer than GPT"),
    ("toxicity_biased", "toxic"): PaperFigure("sec. 4.2", words="PPO-ptx more than GPT"),
    ("winogender", "entropy"): _table_14(0.735, 0.503, 0.618, 0.737),
    ("winogender_respectful", "entropy"): _table_14(0.796, 0.479, 0.527, 0.696),
    ("crows_pairs", "entropy"): _table_14(0.410, 0.241, 0.326, 0.413),
    ("hellaswag", "acc_token"): _table_14(0.781, 0.743, 0.807, stages=("GPT", "PPO", "PPO-ptx")),
    ("reward_model", "pair_accuracy"): PaperFigure(
        "app. E.2", "6B", words="0.724 ± 0.004 on its labelers, 0.696 ± 0.009 on held-out ones"
    ),
}
"""(task, measure) -> its figures."""
UNCOPIED = {
    ("truthfulqa_instruction", "true"),
    ("truthfulqa_instruction", "true_and_informative"),
    ("winogender_biased", "entropy"),
    ("crows_pairs_respectful", "entropy"),
    ("crows_pairs_biased", "entropy"),
}
"""Measures of its Table 14 whose figures are not held here."""
TRAINING_AGREEMENT, HELD_OUT_AGREEMENT = (0.711, 0.741), (0.760, 0.786)
"""Intervals of the share on which two of the paper's labelers agreed: 72.6 ± 1.5 % and 77.3 ± 1.3 % (sec. 3.4)."""


def paper_text(task: str, measure: str) -> str:
    """Return the paper's figure with its model size and place, its place alone, or a phrase that it has none."""
    key = (task, measure)
    if key in PAPER:
        return str(PAPER[key])
    return IN_TABLE_14 if key in UNCOPIED else NOT_THERE
