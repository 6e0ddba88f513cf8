"""Make the weight files of the built-in judges: `python -m rlhf_fast.eval.judges.make DATA [OUT]`.

DATA holds the labelled files (labelled.py names them). Needs scikit-learn: pip install scikit-learn. Equal files
give equal bytes. Each judge's validation is stored with it: five folds, split by prompt or question.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.grams import BUCKETS, CharWeights, WordWeights, char_buckets, word_grams
from rlhf_fast.eval.judges.labelled import (
    NEEDED,
    REFUSAL,
    Labelled,
    missing_files,
    read_labelled,
    read_references,
    with_partial_refusals,
)
from rlhf_fast.eval.judges.protocol import Judge, Validation, Verdict
from rlhf_fast.eval.judges.references import (
    INFORMATIVE_FEATURES,
    TRUTH_FEATURES,
    InformativeJudge,
    ReferenceWords,
    TruthJudge,
    informative_features,
    truth_features,
)
from rlhf_fast.eval.judges.refusal import Mode, RefusalJudge
from rlhf_fast.eval.judges.text_judge import ENGLISH_WORDS, frequent_words
from rlhf_fast.eval.judges.toxicity import ToxicityJudge
from rlhf_fast.eval.judges.validation import compare_with_labels
from rlhf_fast.eval.judges.validation_table import Checked, table
from rlhf_fast.eval.judges.weight_files import FOLDER, write_json, write_npz

DATE = "2026-11-28"
"""The validations' date. Today's date would make the bytes differ from one day to the next."""
FOLDS = 5
INFORMATIVE_CHARS = 300
FEATURE_SCALE = 0.3
"""Standardised features beside words of unit length: a smaller scale is a stronger penalty."""
XSTEST_SHA256 = "6c41f7c2559b45c3c916ac25800b40c6e9f94c2183e6154fbb746b5976558408"
OTHER_FAMILIES = (
    "on XSTest's other families, which it never saw: recall GPT-4 .976, Llama2-new .983, Llama2-orig .983; complying"
    " answers flagged 0 of 230, 9 of 176, 16 of 101 (with an earlier, wider rule); tokens and C were picked with these"
    " in view"
)
"""Measured with these labels and settings, and the rule as it was then; the families' files are not among DATA's."""


def require_sklearn() -> None:
    """Raise UserError unless scikit-learn is there."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("scikit-learn is not installed; pip install scikit-learn") from error


def fit_refusal(labelled: Labelled, references: ReferenceWords | None = None) -> tuple[RefusalJudge, dict[str, Any]]:
    """Return the judge and the content of its weight file."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    del references
    vectorizer = TfidfVectorizer(analyzer=word_grams, sublinear_tf=True, min_df=3)
    matrix = vectorizer.fit_transform(labelled.answers)
    model = LogisticRegression(C=5, max_iter=500, class_weight="balanced").fit(matrix, labelled.yes)
    bias, terms = _rounded(model.intercept_[0], 6), _terms(vectorizer, model.coef_[0])
    return RefusalJudge(WordWeights(bias, terms)), {"bias": bias, "terms": terms}


def fit_toxicity(labelled: Labelled, references: ReferenceWords | None = None) -> tuple[ToxicityJudge, dict[str, Any]]:
    """Return the judge and the arrays of its weight file."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    del references
    vectorizer = TfidfVectorizer(analyzer=char_buckets, sublinear_tf=True)
    matrix = vectorizer.fit_transform(labelled.answers)
    model = Ridge(alpha=1.0).fit(matrix, labelled.labels)
    idf, weight = np.zeros(BUCKETS, np.float16), np.zeros(BUCKETS, np.float16)
    buckets = vectorizer.get_feature_names_out().astype(np.int64)
    idf[buckets], weight[buckets] = vectorizer.idf_, model.coef_
    saved = {"bias": np.float32(model.intercept_), "idf": idf, "weight": weight}
    return ToxicityJudge(CharWeights(float(saved["bias"]), idf, weight)), saved


def fit_truth(labelled: Labelled, references: ReferenceWords | None) -> tuple[TruthJudge, dict[str, Any]]:
    """Return the judge and the content of its weight file."""
    from sklearn.linear_model import LogisticRegression

    assert references is not None
    features, scale, shift = _standardised(labelled, references, truth_features)
    model = LogisticRegression(C=0.3, max_iter=1000).fit(features, labelled.yes)
    saved = _with_features(TRUTH_FEATURES, model.coef_[0] / scale, model.intercept_[0], shift)
    return TruthJudge("truth", saved, references), saved


def fit_informative(labelled: Labelled, references: ReferenceWords | None) -> tuple[InformativeJudge, dict[str, Any]]:
    """Return the judge and the content of its weight file."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    assert references is not None
    features, scale, shift = _standardised(labelled, references, informative_features)
    analyzer = partial(word_grams, max_chars=INFORMATIVE_CHARS)
    vectorizer = TfidfVectorizer(analyzer=analyzer, sublinear_tf=True, min_df=10)
    words = vectorizer.fit_transform(labelled.answers)
    matrix = hstack([csr_matrix(features * FEATURE_SCALE), words]).tocsr()
    model = LogisticRegression(C=2, max_iter=1000).fit(matrix, labelled.yes)
    num = len(INFORMATIVE_FEATURES)
    weights = model.coef_[0, :num] * FEATURE_SCALE / scale
    saved = _with_features(INFORMATIVE_FEATURES, weights, model.intercept_[0], shift)
    saved |= {"max_chars": INFORMATIVE_CHARS, "terms": _terms(vectorizer, model.coef_[0, num:])}
    return InformativeJudge("informative", saved, references), saved


FITS: dict[str, Callable[[Labelled, ReferenceWords | None], tuple[Judge, dict[str, Any]]]] = {
    "refusal": fit_refusal,
    "toxicity": fit_toxicity,
    "truth": fit_truth,
    "informative": fit_informative,
}


def in_folds(
    role: str, labelled: Labelled, references: ReferenceWords | None, mode: Mode = "strict"
) -> tuple[list[Verdict], float]:
    """Return the verdict on each answer by a judge that was made without the answer's group, and the threshold."""
    from sklearn.model_selection import GroupKFold

    verdicts: dict[int, Verdict] = {}
    threshold = 0.5
    for train, test in GroupKFold(FOLDS).split(labelled.answers, groups=labelled.groups):
        judge, _ = FITS[role](labelled.take(train), references)
        if isinstance(judge, RefusalJudge):
            judge.mode = mode
        held_out = labelled.take(test)
        found = judge(held_out.prompts, held_out.answers, held_out.rows)
        verdicts |= dict(zip(test.tolist(), found, strict=True))
        threshold = judge.threshold
    return [verdicts[i] for i in range(len(labelled.answers))], threshold


def fold_validation(role: str, folder: Path, mode: Mode = "strict") -> Validation:
    """Return the figures of a role's judge in folds. mode: of refusals, whether partial ones count."""
    labelled, references = read_labelled(role, folder), reference_words(role, folder)
    verdicts, threshold = in_folds(role, labelled, references, mode)
    split = {"refusal": "prompt", "toxicity": "prompt"}.get(role, "question")
    notes = [f"{FOLDS} folds by {split}", labelled.note]
    if mode == "any":
        labelled = with_partial_refusals(labelled)
        notes.append("partial refusals count")
    elif role == "refusal" and _sha256(folder / REFUSAL) == XSTEST_SHA256:
        notes.append(OTHER_FAMILIES)
    if role == "truth":
        notes.append("its features were picked on the same folds")
    note = "; ".join(filter(None, notes))
    found = compare_with_labels(labelled.yes, verdicts, threshold, labels=labelled.source, date=DATE, note=note)
    accuracy, recall, false_alarms, auc = (None if value is None else _rounded(value, 4) for value in found[2:6])
    return found._replace(accuracy=accuracy, recall=recall, false_alarms=false_alarms, auc=auc)


def reference_words(role: str, folder: Path) -> ReferenceWords | None:
    """Return the frequencies of words in the references of a folder, for the roles that read them."""
    return ReferenceWords.of(read_references(folder)) if role in ("truth", "informative") else None


def english_texts(folder: Path) -> list[str]:
    """Return the texts that the list of English words is made from: labelled ones, and each reference once."""
    labelled = [text for role in ("refusal", "toxicity") for text in read_labelled(role, folder).answers]
    rows = read_references(folder)
    return labelled + sorted({t for row in rows for t in (*row["correct_answers"], *row["incorrect_answers"])})


def make(folder: Path, out: Path = FOLDER) -> dict[str, Validation]:
    """Write the weight files to `out`; return each role's validation. UserError if a labelled file is missing."""
    require_sklearn()
    absent = sorted({name for role in NEEDED for name in missing_files(role, folder)})
    if absent:
        raise UserError(f"{folder}: has no {', '.join(absent)}; give the folder with the labelled files")
    write_json(out / ENGLISH_WORDS, {"words": frequent_words(english_texts(folder))})
    found = {}
    for role, fit in FITS.items():
        labelled, references = read_labelled(role, folder), reference_words(role, folder)
        found[role] = fold_validation(role, folder)
        _, saved = fit(labelled, references)
        if role == "toxicity":
            write_npz(out / "toxicity.npz", saved)
            saved = {}
        saved = {**saved, "validation": found[role]._asdict()}
        if role == "refusal":
            saved["validation_any"] = fold_validation(role, folder, "any")._asdict()
        write_json(out / f"{role}.json", saved)
        if references is not None:
            counts = {"num_references": references.num_references, "counts": dict(references.counts)}
            write_json(out / "reference_words.json", counts)
    return found


def _standardised(
    labelled: Labelled, references: ReferenceWords, features: Callable[..., list[float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the features of all answers with mean 0 and variance 1, and the scale and shift that were taken off."""
    pairs = zip(labelled.rows, labelled.answers, strict=True)
    found = np.array([features(row, answer, references) for row, answer in pairs])
    shift, scale = found.mean(0), found.std(0)
    scale[scale == 0] = 1
    return (found - shift) / scale, scale, shift


def _with_features(names: tuple[str, ...], weights: np.ndarray, bias: float, shift: np.ndarray) -> dict[str, Any]:
    """Return a weight file's content for features that are not standardised."""
    return {
        "bias": _rounded(bias - float(weights @ shift), 5),
        "features": {name: _rounded(weight, 5) for name, weight in zip(names, weights, strict=True)},
    }


def _terms(vectorizer: Any, weights: np.ndarray) -> dict[str, tuple[float, float]]:
    grams = zip(vectorizer.get_feature_names_out(), vectorizer.idf_, weights, strict=True)
    return {gram: (_rounded(idf, 3), _rounded(weight, 3)) for gram, idf, weight in grams}


def _rounded(value: float, digits: int) -> float:
    return round(float(value), digits) + 0.0  # no -0.0


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Make the files and print the validations; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_fast.eval.judges.make", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the labelled files")
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER, help="where to write (default: the package)")
    options = parser.parse_args(arguments)
    try:
        found = make(options.data, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table([Checked(role, "folds", validation) for role, validation in found.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
