"""The sets of rows that the tasks read: the files of each in a folder, and its rows in our layout.

Every set accepts our layout and the official files of its benchmark. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.data.fields import InvalidRow, column_names
from rlhf_fast.errors import UserError, listed
from rlhf_fast.eval import layouts
from rlhf_fast.eval.files import SUFFIXES, Row, peek_row
from rlhf_fast.eval.layouts import Layout
from rlhf_fast.eval.selection import Stratum, join_winogender, of_kind, same_number, without_duplicates

DEMO_SETS = Path(__file__).parent / "demo_sets"
"""Small sets of the demo's world, one file each, in our layouts: a smoke test of every task, not a benchmark."""

DEMO_JUDGES = {"toxicity": "rlhf_fast.demo.eval_sets:rude"}
"""Judges that know the demo's words better than the built-in ones, by role."""


class DataSet(NamedTuple):
    """A set of rows: the names of its files without their endings, and the layouts that they may have."""

    name: str
    stems: tuple[str, ...]
    """Names that are looked for, in this order; the first that is there is read."""
    layouts: tuple[Layout, ...]
    parts: tuple[str, ...] = ()
    """Names of files that are read together if none of `stems` is there."""
    finish: Callable[[str, list[Row]], list[Row]] = lambda _name, rows: rows
    """Function of the set's name and all its rows that returns the set."""
    stratum: Stratum | None = None
    """A limit takes the same number of rows of each stratum; None = the first rows."""
    equal_strata: bool = False
    """Without a limit too, the strata have the same number of rows."""


OURS = "ours"
HARMFUL_STEMS = ("harmful_prompts",)
HARMFUL_PARTS = (
    *("xstest_prompts", "xstest_v2_prompts", "xstest", "harmful_behaviors", "advbench", "strongreject_dataset"),
    *("strongreject", "harmbench_behaviors_text_all", "harmbench"),
)
HARMFUL_LAYOUTS = (
    Layout(OURS, ("prompt", "kind", "source"), layouts.harmful_prompt),
    Layout("XSTest", ("prompt", "type"), layouts.xstest),
    Layout("AdvBench", ("goal", "target"), layouts.advbench),
    Layout("StrongREJECT", ("category", "source", "forbidden_prompt"), layouts.strongreject),
    Layout("HarmBench", ("Behavior", "FunctionalCategory", "SemanticCategory"), layouts.harmbench),
)
SETS = {
    found.name: found
    for found in (
        DataSet("prompts", ("prompts",), (Layout("prompts", (), layouts.prompt),)),
        DataSet(
            "truthfulqa",
            ("truthfulqa", "mc_task", "truthfulqa_mc"),
            (
                Layout(OURS, ("question", "best_answer", "correct_answers", "incorrect_answers"), layouts.truthfulqa),
                Layout(
                    "TruthfulQA.csv",
                    ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
                    layouts.truthfulqa_csv,
                ),
                Layout(
                    "TruthfulQA's multiple choice",
                    ("question", "mc1_targets", "mc2_targets"),
                    layouts.truthfulqa_choices,
                ),
            ),
        ),
        DataSet(
            "toxicity_prompts",
            ("toxicity_prompts", "realtoxicityprompts", "real_toxicity_prompts", "real-toxicity-prompts"),
            (
                Layout("RealToxicityPrompts", ("prompt", "continuation", "challenging", "begin"),
                       layouts.real_toxicity_prompt),
                Layout(OURS, ("prompt",), layouts.toxicity_prompt),
            ),
            stratum=lambda row: row["bin"],
            equal_strata=True,
        ),
        DataSet(
            "winogender",
            ("winogender",),
            (
                Layout(OURS, ("occupation", "male", "female"), layouts.winogender),
                Layout("Winogender's sentences", ("sentid", "sentence"), layouts.winogender_sentence),
                Layout("Winogender's occupations", ("occupation", "bls_pct_female"), layouts.winogender_percentage),
            ),
            parts=("all_sentences", "occupations-stats"),
            finish=join_winogender,
        ),
        DataSet(
            "crows_pairs",
            ("crows_pairs", "crows_pairs_anonymized"),
            (
                Layout(OURS, ("a", "b"), layouts.crows_pairs),
                Layout("CrowS-Pairs", ("sent_more", "sent_less", "bias_type"), layouts.crows_pairs_official),
            ),
        ),
        DataSet(
            "hellaswag",
            ("hellaswag", "hellaswag_val", "hellaswag_validation"),
            (
                Layout("HellaSwag with lm-eval's text", ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
                       layouts.hellaswag_official),
                Layout(OURS, ("ctx", "endings", "label"), layouts.hellaswag),
            ),
        ),
        DataSet(
            "lambada",
            ("lambada", "lambada_test", "lambada_openai", "lambada_test_en"),
            (
                Layout(OURS, ("context", "target"), layouts.lambada),
                Layout("LAMBADA", ("text",), layouts.lambada_official),
            ),
        ),
        DataSet("text", ("text", "texts", "held_texts", "pretrain"), (Layout(OURS, ("text",), layouts.text),)),
        DataSet("harmful_prompts", HARMFUL_STEMS, HARMFUL_LAYOUTS, HARMFUL_PARTS, of_kind("harmful"),
                lambda row: row["source"]),
        DataSet("safe_prompts", HARMFUL_STEMS, HARMFUL_LAYOUTS, HARMFUL_PARTS, of_kind("safe"),
                lambda row: row["source"]),
    )
}  # fmt: skip


def find_set(name: str, folder: str | Path) -> tuple[Path, ...]:
    """Return the files of a set in a folder; () if none is there. UserError if there is no such folder."""
    folder = Path(folder)
    try:
        entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_file()}
    except OSError as error:
        raise UserError(f"{folder}: is no folder that can be read ({error.strerror}); give the sets' folder") from error

    def file_of(stem: str) -> Path | None:
        names = [f"{stem}{suffix}{gz}" for suffix in SUFFIXES for gz in ("", ".gz")]
        return next((entries[name] for name in names if name in entries), None)

    whole = [path for stem in SETS[name].stems if (path := file_of(stem))]
    parts = [path for stem in SETS[name].parts if (path := file_of(stem))]
    return tuple(whole[:1] or parts)


def require_set(name: str, folder: str | Path) -> tuple[Path, ...]:
    """Return the files of a set in a folder. UserError if none is there, which names those that are accepted."""
    paths = find_set(name, folder)
    if not paths:
        wanted = [*SETS[name].stems, *SETS[name].parts]
        others = [p.name for p in Path(folder).iterdir() if p.name.lower().partition(".")[0] in wanted]
        hint = f"; {listed(others)} must be converted" if others else ""
        raise UserError(
            f"{folder}: has no file of the set {name}: {listed(wanted, len(wanted))}, as {', '.join(SUFFIXES)} or"
            f" one of these with .gz, in the layout of {accepted_layouts(name)}{hint}"
        )
    return paths


def accepted_layouts(name: str) -> str:
    """Return the layouts of a set with their columns, for messages."""
    return "; ".join(f"{found.name} ({', '.join(found.columns) or 'prompt'})" for found in SETS[name].layouts)


def read_set(
    name: str, paths: str | Path | Sequence[str | Path], limit: int = 0, notes: list[str] | None = None
) -> list[Row]:
    """Return the rows of a set in our layout, from all its files.

    limit: number of rows, 0 = all; toxicity_prompts has the same number of each bin, and the sets of harmful and safe
    prompts of each source. notes: gets a sentence on each thing that was left out, and on official layouts.
    UserError with file and line for what cannot be read.
    """
    data, notes = SETS[name], [] if notes is None else notes
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    in_order = limit > 0 and data.stratum is None and not data.parts
    rows: list[Row] = []
    for path in files:
        for row in _converted_rows(data, path, notes):
            rows.append(row)
            if in_order and len(rows) == limit:
                break
    rows = data.finish(name, rows)
    if name in ("harmful_prompts", "safe_prompts"):
        rows = without_duplicates(name, rows, notes)
    if data.stratum is not None:
        kept = same_number(rows, data.stratum, limit, data.equal_strata)
        if len(kept) < len(rows) and not limit:
            notes.append(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows were left out, so that bins are equal")
        rows = kept
    return rows[:limit] if limit else rows


def _converted_rows(data: DataSet, path: Path, notes: list[str]) -> Iterator[Row]:
    first, rows = peek_row(path)
    if first is None:
        raise UserError(f"{path}: the file holds no rows; expected {accepted_layouts(data.name)}")
    layout = next((found for found in data.layouts if set(found.columns) <= first.keys()), None)
    if layout is None:
        raise UserError(
            f"{path}: its columns ({column_names(first)}) are of no layout of {data.name}; accepted are"
            f" {accepted_layouts(data.name)}"
        )
    if layout.name not in (OURS, data.name):
        notes.append(f"{data.name}: {path.name} was read as {layout.name}")
    left_out = 0
    for line, row in rows:
        for column in layout.columns:
            if column not in row:
                raise UserError(f"{path}:{line}: the column {column} is missing; add it, or remove the row")
        try:
            converted = layout.convert(row)
        except InvalidRow as error:
            raise UserError(f"{path}:{line}: {error}") from error
        if converted is not None:
            yield converted
        else:
            left_out += 1
    if left_out:
        notes.append(f"{data.name}: {left_out} rows of {path.name} were left out, which {layout.name} marks as others")
