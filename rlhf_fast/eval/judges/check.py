"""Check the built-in judges on the labelled files that are there: `rlhf-fast eval --check-judges --data FOLDER`."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.builtin import load_builtin
from rlhf_fast.eval.judges.labelled import missing_files, read_family, read_labelled, xstest_families
from rlhf_fast.eval.judges.make import fold_validation, require_sklearn
from rlhf_fast.eval.judges.protocol import ROLES, Judge, Validation
from rlhf_fast.eval.judges.validation import compare_with_labels
from rlhf_fast.eval.judges.validation_table import Checked

TOLERANCE = 0.005


def stored_figures() -> list[Checked]:
    """Return the figures that are stored with each built-in judge."""
    judges = {role: load_builtin(role) for role in ROLES}
    return [Checked(role, "stored folds", judge.validation) for role, judge in judges.items() if judge.validation]


def check_judges(folder: str | Path) -> tuple[list[Checked], list[str]]:
    """Return the figures of each built-in judge, and notes on what could not be checked.

    Folds are computed again where scikit-learn is installed; else the stored ones are given, and the shipped judge on
    the answers that it was made from. UserError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the one with the labelled files")
    families = xstest_families(folder)
    present = [role for role in ROLES if not missing_files(role, folder)]
    found, notes = [], []
    try:
        require_sklearn()
        refit = True
    except UserError as error:
        refit = False
        notes.append(f"{error}; until then the folds below are the stored ones")
    for role in ROLES:
        judge = load_builtin(role)
        if role not in present:
            missing = ", ".join(missing_files(role, folder))
            notes.append(f"{role}: no {missing} in {folder}; the figures are the stored ones")
        if refit and role in present:
            validation = fold_validation(role, folder)
            found.append(Checked(role, "folds", validation))
            notes += _differences(role, validation, judge.validation)
        elif judge.validation is not None:
            found.append(Checked(role, "stored folds", judge.validation))
        if role in present and not refit:
            found.append(Checked(role, "its own labels", _on_own_labels(role, judge, folder)))
    for family, path in families.items():
        found.append(Checked("refusal", f"XSTest {family}", _on_family(path, family)))
    if not families:
        notes.append(f"no out-of-family labels found: XSTest's model_completions would be read from {folder}")
    return found, notes


def _differences(role: str, found: Validation, stored: Validation | None) -> list[str]:
    """Return a note if folds do not give the figures that are stored with the shipped weights."""
    pairs = zip(found[2:6], stored[2:6] if stored else [None] * 4, strict=True)
    if all(a == b or (a is not None and b is not None and abs(a - b) <= TOLERANCE) for a, b in pairs):
        return []
    return [f"{role}: these folds differ from the figures stored with its weights, which other labels or versions made"]


def _on_own_labels(role: str, judge: Judge, folder: Path) -> Validation:
    """Return the shipped judge's figures on the answers that it was made from: too good, but they show the files."""
    labelled = read_labelled(role, folder)
    verdicts = judge(labelled.prompts, labelled.answers, labelled.rows)
    note = "made from these answers: too good"
    return compare_with_labels(labelled.yes, verdicts, judge.threshold, labels=labelled.source, note=note)


def _on_family(path: Path, family: str) -> Validation:
    labelled, complies = read_family(path)
    judge = load_builtin("refusal")
    verdicts = judge(labelled.prompts, labelled.answers, labelled.rows)
    flagged = [v.score > judge.threshold for v, complying in zip(verdicts, complies, strict=True) if complying]
    note = f"{sum(flagged)} of {len(flagged)} complying answers flagged"
    if family.startswith("mistral"):
        note += "; the judge was made from answers of this family"
    return compare_with_labels(labelled.yes, verdicts, judge.threshold, labels=labelled.source, note=note)
