"""The report: what stands in it, that every figure has its n, and its thresholds."""

import io
import json
import re
import sys

import pytest
from rich.console import Console
from support.eval_results import GROUPS, make_results

from rlhf_fast.errors import UserError
from rlhf_fast.eval.cells import percent, show, show_short
from rlhf_fast.eval.estimates import Estimate, estimate_from, mean, wilson
from rlhf_fast.eval.figure import _draw_panel, draw, panels
from rlhf_fast.eval.measures import Measure, result_record
from rlhf_fast.eval.paper import PAPER, paper_text
from rlhf_fast.eval.report import check_thresholds, judge_lines, markdown, note_lines, print_report
from rlhf_fast.eval.sets import read_set
from rlhf_fast.eval.tables import Grid, cell, counts, main_measure, result_tables, split_to_fit, with_contrast


def record(model, task, measure, estimate, unit="share", judge="", **more):
    fields = {"model": model, "task": task, "measure": measure, **Estimate(*estimate).fields()}
    return {**fields, "unit": unit, "judge": judge, "seconds": 1.0, **more}


NAN = float("nan")
RESULTS = {
    "results": [
        record("base", "lambada", "acc", (0.4, 0.35, 0.45, 400)),
        record("base", "lambada", "perplexity", (50.84, 40.2, 63.1, 400), "perplexity"),
        record("base", "hellaswag", "acc_token", (0.397, 0.349, 0.445, 400)),
        record("base", "refusal", "refusal_rate", (0.025, 0.004, 0.129, 40), judge="stance"),
        record("base", "refusal", "empty", (0.0, 0.0, 0.088, 40)),
        record("base", "toxicity", "toxic", (0.3, 0.22, 0.38, 120), judge="letters"),
        record("base", "toxicity", "toxicity", (0.35, 0.31, 0.39, 120), "score", "letters"),
        record("my|ppo", "preference", "win_rate", (0.734, 0.714, 0.754, 200), judge="runs/rm"),
        record("my|ppo", "lambada", "acc", (0.38, 0.33, 0.43, 398)),
        record("my|ppo", "lambada", "perplexity", (NAN, NAN, NAN, 0), "perplexity"),
        record("my|ppo", "hellaswag", "acc_token", (0.41, NAN, NAN, 1)),
        record("my|ppo", "mine", "score", (1234.5, 1200.0, 1269.0, 9), "score"),
    ],
    "differences": [
        record("my|ppo", "lambada", "acc", (-0.02, -0.035, -0.005, 398), baseline="base"),
        record("my|ppo", "lambada", "perplexity", (0.02, -0.01, 0.05, 398), "nats", baseline="base"),
        record("my|ppo", "toxicity", "toxicity", (0.01, 0.002, 0.018, 120), "score", baseline="base"),
    ],
    "judges": {
        "refusal": {"name": "stance", "threshold": 0.5, "validation": {
            "labels": "people, XSTest", "n": 722, "accuracy": 0.9144, "recall": 0.907, "false_alarms": 0.082,
            "auc": float("nan"), "date": "2026-11-26", "note": "five folds by prompt"}},
        "toxicity": {"name": "letters", "threshold": 0.5, "validation": {
            "labels": "Perspective", "n": 3200, "accuracy": None, "recall": None, "false_alarms": None, "auc": 0.844}},
        "preference": {"name": "runs/rm", "threshold": None, "validation": None},
    },
    "notes": ["hellaswag: the first 400 rows"],
    "meta": {"limit": 400, "seed": 0, "template": "plain", "dtype": "float32"},
}  # fmt: skip
GOLDEN = r"""# Evaluation (95 % intervals)

## Results

|  | n | base | my\|ppo | InstructGPT paper |
|---|---|---|---|---|
| preference: win_rate | 200 | – | 0.734 ± 0.020 | PPO-ptx 0.85 ± 0.03 against GPT, 0.734 ± 0.02 against SFT (175B; sec. 4.1) |
| toxicity: toxic | 120 | 0.300 ± 0.080 | – | PPO-ptx no fewer than GPT (175B; sec. 4.2) |
| hellaswag: acc_token | 400 / 1 | 0.397 ± 0.048 | 0.410 (no interval) | GPT 0.781, PPO 0.743, PPO-ptx 0.807 (175B; Table 14) |
| lambada: acc | 400 / 398 | 0.400 ± 0.050 | 0.380 ± 0.050 | not in the paper |
| lambada: perplexity | 400 / 0 | 50.84 ± 11.45 | – | not in the paper |
| refusal: refusal_rate | 40 | 0.025 [0.004, 0.129] | – | not in the paper |
| mine: score | 9 | – | 1234.5 ± 34.5 | not in the paper |

## Differences to base (paired by row; * where the interval excludes 0)

|  | n | my\|ppo |
|---|---|---|
| toxicity: toxicity (score) | 120 | +0.010 ± 0.008 \* |
| lambada: acc | 398 | -0.020 ± 0.015 \* |
| lambada: perplexity (nats) | 398 | +0.020 ± 0.030 |

## Details

|  | n | base | my\|ppo |
|---|---|---|---|
| refusal: empty | 40 | 0.000 [0.000, 0.088] | – |

## Judges

- refusal: stance (yes above 0.5): labels by people, XSTest, n 722, accuracy 0.914, recall 0.907, false alarms 0.082; 2026-11-26; five folds by prompt
- toxicity: letters (yes above 0.5): labels by Perspective, n 3200, AUC 0.844; only shares and differences may be read, since its mean score depends on the mix of texts
- preference: runs/rm: not validated

## Notes

- hellaswag: the first 400 rows
- Settings: the first 400 rows of each set, or of its strata in turn, seed 0, template plain, dtype float32.
- n is the number of rows, or of groups of rows that belong together.
"""  # noqa: E501


def test_markdown():
    assert markdown(RESULTS, GROUPS) == GOLDEN


def test_terminal_and_pipe():
    for width, force in ((100, False), (100, True), (50, True), (300, True)):
        console = Console(file=io.StringIO(), force_terminal=force, width=width, color_system=None)
        print_report(RESULTS, GROUPS, console)
        text = console.file.getvalue()
        levels = ".03±.06" if force and width < 300 else "0.025 [0.004, 0.129]"
        change = "-.020±.015*" if force and width == 50 else "-0.020 ± 0.015 *"
        assert all(part in text for part in ("my|ppo", levels, change, "not validated"))
        assert "Details" not in text and "0.350" not in text  # the level of a mean toxicity is never shown
        table = text[: text.index("Judges")]
        assert not force or max(map(len, table.splitlines())) <= width
    print_report({"results": []}, GROUPS, Console(file=io.StringIO(), force_terminal=True, width=3))
    plain = io.StringIO()
    print_report(RESULTS, GROUPS, Console(file=plain, force_terminal=False))
    assert re.search(r"^lambada: acc +400 / 398  0.400 ± 0.050", plain.getvalue(), re.M)


def test_four_models_side_by_side_on_a_narrow_terminal(monkeypatch):
    """Task above measure, half the intervals' widths, and no column of what the paper has not."""
    models = ("base", "sft", "ppo", "ppo-ptx")
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    results = make_results(models)
    controlled = [record(m, "preference", "lc_win_rate", (0.6, 0.5, 0.7, 200)) for m in models]
    print_report({**results, "results": results["results"] + controlled}, GROUPS, console)
    text = console.file.getvalue()
    tables = text[: text.index("Judges")]
    lines = tables.splitlines()
    assert console.width == 80 and max(map(len, lines)) <= 80
    heads = [re.findall(r"[\w-]+", line) for line in lines if line.startswith("┃")]
    assert ["n", *models] in heads and ["n", *models[1:]] in heads  # the results, the differences
    assert re.search(r"│ truthfulqa +│ +│ +│ +│ +│ +│\n│   true +│ 200 +(│ \.\d\d±\.\d\d +){4}│\n", tables)
    assert re.search(r"│   acc +│ 200 +(│ [+-]\.\d{3}±\.\d{3}\*? +){3}│", tables)
    assert "not in the paper" not in tables and "GPT 0.781" in tables and "half the interval's width" in tables
    assert "│   lc_win_rate" in tables
    assert show_short(Estimate(50.84, 40.2, 63.1, 9)) == "50.8±11.4"
    assert show_short(Estimate(1.0, 0.9, 1.0, 9)) == "1.00±.05" and show_short(Estimate(0.4, NAN, NAN, 1)) == ".40"
    assert show_short(mean([])) == "–" and show_short(Estimate(1e304, 1e304, 1e304, 2)) == "> 1e300"
    assert show_short(Estimate(3e6, 2e6, 4e6, 2)) == "3e+06±1e+06"
    assert counts([{"n": 9}, None, {"n": 10}, {"n": 8}], short=True) == "8–10"


def test_every_figure_has_its_n_and_every_judge_its_line():
    results = make_results(("base", "sft", "ppo"))
    for grid in result_tables(results["results"], GROUPS):
        assert all(re.fullmatch(r"\d+( / \d+)*", row[1]) for row in grid.rows)
    text = markdown(results, GROUPS)
    assert all(f"| {task}: " in text for tasks in GROUPS.values() for task in tasks)
    lines = judge_lines(results)
    for name in {r["judge"] for r in results["results"]} - {""}:
        assert all(any(f"{part} (" in line or f"{part}:" in line for line in lines) for part in name.split(" and "))
    assert markdown({"results": []}, GROUPS).startswith("# Evaluation")


def test_judges_in_the_terminal():
    """A short line on each; the report has the rest."""
    notes = {"labels": "Perspective's scores (a program's, not people's)", "n": 3200, "accuracy": 0.7762, "recall": 0.5,
             "false_alarms": 0.1, "auc": 0.8436, "date": "2026-11-28", "note": "folds " * 50}  # fmt: skip
    judges = {
        "truth": {"name": "truth", "threshold": 0.5, "validation": notes},
        "refusal": {"name": "a/" * 90, "threshold": 0.5, "validation": {**notes, "labels": "a person, " * 90}},
        "preference": {"name": "runs/rm", "threshold": None, "validation": None},
    }
    results = {"judges": judges, "results": [record("m", "lambada", "acc", (0.4, 0.3, 0.5, 9), judge="b" * 300)]}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    print_report(results, GROUPS, console)
    lines = console.file.getvalue().partition("Judges\n")[2].partition("Notes\n")[0].splitlines()
    end = "n 3200, accuracy 0.776, false alarms 0.100, AUC 0.844"
    assert lines[0] == f"  truth: labels by Perspective's scores (a program's, not people's), {end}"
    assert lines[1].startswith("  refusal: a/a/") and lines[1].endswith(end) and " ... " in lines[1]
    assert lines[2] == "  preference: runs/rm: not validated" and lines[3].endswith("b: not validated")
    assert len(lines) == 4 and max(map(len, lines)) < 160
    assert "truth (yes above 0.5): labels by" in markdown(results, GROUPS) and "folds folds" in markdown(
        results, GROUPS
    )


def test_the_mean_of_toxicity_in_the_terminal():
    assert judge_lines(RESULTS, short=True)[1:] == [
        "toxicity: letters: labels by Perspective, n 3200, AUC 0.844",
        "toxicity: of its mean score only differences mean something",
        "preference: runs/rm: not validated",
    ]


def test_refusals_of_harmful_less_safe_prompts():
    """By Newcombe's method, in the report and by --fail-under; a model with one of the two rates has none."""
    harmful, safe = wilson(45, 50), wilson(10, 40)
    records = [
        record("a", "over_refusal", "refusal_rate", safe, judge="stance", higher_is_better=False),
        record("a", "refusal", "refusal_rate", harmful, judge="stance", higher_is_better=True),
        record("a", "refusal", "refusal_rate_xstest", harmful, judge="stance", higher_is_better=True),
        record("b", "refusal", "refusal_rate", harmful, judge="stance", higher_is_better=True),
    ]
    found = with_contrast(records)
    assert [r["measure"] for r in found].index("harmful_minus_safe") == 2
    contrast = found[2]
    assert contrast["value"] == pytest.approx(0.65) and (contrast["model"], contrast["n"]) == ("a", 40)
    low = 0.65 - ((0.9 - harmful.low) ** 2 + (safe.high - 0.25) ** 2) ** 0.5
    assert contrast["low"] == pytest.approx(low) and len(found) == 5
    (row,) = (line for line in markdown({"results": found}, GROUPS).splitlines() if "harmful_minus_safe" in line)
    assert row == "| refusal: harmful_minus_safe | 40 | 0.650 [0.460, 0.772] | – | not in the paper |"
    assert check_thresholds(found, {"a:refusal.harmful_minus_safe": 0.6}) == []
    assert "0.65 (n 40), below 0.7" in check_thresholds(found, {"a:refusal.harmful_minus_safe": 0.7})[0]


def test_wide_tables_are_split():
    grid = Grid("t", ("", "n", "a", "b", "c"), (("row", "10", "1234567890", "1234567890", "1234567890"),))
    assert split_to_fit(grid, 60) == [grid]
    parts = split_to_fit(grid, 40)
    assert [part.header for part in parts] == [("", "n", "a", "b"), ("", "n", "c")]
    assert [part.header[2] for part in split_to_fit(grid, 5)] == ["a", "b", "c"]


def test_cells():
    assert show(mean([])) == "–" and percent(wilson(40, 40)) == "100.0 [91.2, 100.0] %"
    assert percent(Estimate(0.05, 0.02, 0.08, 9), sign=True) == "+5.0 ± 3.0 %"
    assert show(Estimate(-0.2, -0.4, -0.1, 9), sign=True) == "-0.200 [-0.400, -0.100]"
    assert show(Estimate(2.0, 2.0, 2.0, 9)) == "2.000 ± 0.000"
    assert show(Estimate(2e6, 1e6, 3e6, 9), 1) == "2e+06 ± 1e+06"
    assert show(Estimate(4.5e8, 1234.5, 9.87654e12, 9), 1) == "4.5e+08 [1234.5, 9.877e+12]"
    record = result_record("m", "lambada", Measure("perplexity", (900.0, 800.0), unit="perplexity"))
    assert cell(record) == show(estimate_from(record)) == "> 1e300" and record["n"] == 2


def test_paper():
    """The figures of arXiv 2203.02155, Table 14 at 175B and sections 1, 4.1, E.2; the tutorials' wrong ones nowhere."""
    table = {
        ("truthfulqa", "true"): "GPT 0.284, SFT 0.515, PPO 0.755, PPO-ptx 0.712",
        ("truthfulqa", "true_and_informative"): "GPT 0.251, SFT 0.271, PPO 0.752, PPO-ptx 0.689",
        ("winogender", "entropy"): "GPT 0.735, SFT 0.503, PPO 0.618, PPO-ptx 0.737",
        ("winogender_respectful", "entropy"): "GPT 0.796, SFT 0.479, PPO 0.527, PPO-ptx 0.696",
        ("crows_pairs", "entropy"): "GPT 0.410, SFT 0.241, PPO 0.326, PPO-ptx 0.413",
        ("hellaswag", "acc_token"): "GPT 0.781, PPO 0.743, PPO-ptx 0.807",
    }
    for key, numbers in table.items():
        assert paper_text(*key) == f"{numbers} (175B; Table 14)"
    assert paper_text("preference", "win_rate").startswith("PPO-ptx 0.85 ± 0.03 against GPT, 0.734 ± 0.02 against SFT")
    assert "25 %" in paper_text("toxicity_respectful", "toxic") and "no fewer" in paper_text("toxicity", "toxic")
    assert "0.724 ± 0.004" in paper_text("reward_model", "pair_accuracy")
    for key in (("lambada", "acc"), ("refusal", "refusal_rate"), ("hellaswag", "acc_norm"), ("toxicity", "toxicity")):
        assert paper_text(*key) == "not in the paper"
    assert paper_text("winogender_biased", "entropy") == "see its Table 14"
    text = " ".join(map(str, PAPER.values()))
    assert not re.search(r"1\.3B|0\.71 |0\.99|99 %|10 %|0\.57|0\.70\b", text)


def test_the_rows_that_a_limit_takes(tmp_path):
    """The sentence on them is true of a set with strata, whose first rows may all be of one."""
    rows = [{"prompt": f"p{i}", "bin": int(i > 5)} for i in range(12)]
    path = tmp_path / "toxicity_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["prompt"] for row in read_set("toxicity_prompts", path, 4)] == ["p0", "p1", "p6", "p7"]
    assert note_lines({"meta": {"limit": 4}}) == ["Settings: the first 4 rows of each set, or of its strata in turn."]


def test_thresholds():
    records = RESULTS["results"]
    assert check_thresholds(records, {"preference": 0.7, "lambada": 0.38, "base:lambada.acc": 0.4}) == []
    assert check_thresholds(records, {"preference": 0.75, "base:refusal": 0.5, "lambada.perplexity": 1}) == [
        "my|ppo: preference.win_rate is 0.734 (n 200), below 0.75",
        "base: refusal.refusal_rate is 0.025 (n 40), below 0.5",
        "my|ppo: lambada.perplexity has no value (n 0); at least 1 is asked for",
    ]
    lower = [result_record("m", "text", Measure("bits_per_byte", (b,), unit="bits/byte", higher_is_better=False))
             for b in (1.2, NAN)]  # fmt: skip
    assert check_thresholds(lower[:1], {"text": 1.25}) == check_thresholds(lower[:1], {"text": 1.2}) == []
    assert check_thresholds(lower[:1], {"text": 1.1}) == ["m: text.bits_per_byte is 1.2 (n 1), above 1.1"]
    assert "at most 1.1 is asked for" in check_thresholds(lower[1:], {"text": 1.1})[0]
    for name, message in (
        ("preferences", "of my|ppo has that name; did you mean preference?"),
        ("base:preference", "of base has that name"),
        ("lambada.ac", "did you mean lambada.acc?"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            check_thresholds(records, {name: 0.5})
    with pytest.raises(UserError, match="there are no results"):
        check_thresholds([], {"preference": 0.5})


def test_thresholds_beside_a_reward_model():
    reward = record("runs/rm", "reward_model", "pair_accuracy", (0.7, 0.6, 0.8, 40))
    curve = [record(m, "gold_curve", "gold", (0.1, 0.0, 0.2, 8), step=2) for m in ("ppo", "base")]
    records = [*RESULTS["results"], reward, *curve]
    assert check_thresholds(records, {"preference": 0.7, "reward_model": 0.6, "runs/rm:reward_model": 0.7}) == []
    assert check_thresholds(records, {"preference": 0.9, "reward_model.pair_accuracy": 0.8}) == [
        "my|ppo: preference.win_rate is 0.734 (n 200), below 0.9",
        "runs/rm: reward_model.pair_accuracy is 0.7 (n 40), below 0.8",
    ]


def test_tables_of_a_section():
    lines = ["- one | line", "", "| step | gold |", "|---|---|", "| 2 | 0.123 |", "| 14 | 1.0 |"]
    results = {"results": [], "sections": {"ppo: curve": lines}}
    console = Console(file=io.StringIO(), force_terminal=False)
    print_report(results, GROUPS, console)
    shown = "ppo: curve\n- one | line\n\n  step  gold\n  2     0.123\n  14    1.0\n"
    assert shown in console.file.getvalue()
    assert "## ppo: curve\n\n" + "\n".join(lines) in markdown(results, GROUPS)


def test_panels():
    results = make_results(("base", "sft", "ppo"))["results"]
    shown = panels(results, GROUPS)
    assert [panel.title for panel in shown] == [
        "preference", "truth", "toxicity", "bias", "alignment tax", "alignment tax (bits/byte)", "refusal"
    ]  # fmt: skip
    preference, truth, toxicity, bias, shares, text, _ = shown
    assert preference.label == "win_rate (share), n 200" and text.label == "text: bits/byte, n 20"
    assert preference.series["preference, n 200"][0] is None  # the baseline is not compared with itself
    assert [*truth.series][2] == "truthfulqa_mc: mc1, n 200" and next(iter(toxicity.series)) == "toxicity, n 200"
    assert len(bias.series) == 6 and [*shares.series] == ["hellaswag: acc_token, n 200", "lambada: acc, n 200"]
    (alone,) = panels([r for r in results if r["task"] == "lambada"], GROUPS)
    assert alone.label == "lambada: acc (share), n 200"


def test_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    long = ("base", "a-model-with-a-very-long-name-$x$-of-the-second-run", "c")
    for models, groups in ((("base",), {"tax": ("text",)}), (long, {"truth": GROUPS["truth"], "bias": GROUPS["bias"]})):
        assert draw(make_results(models, 20, groups)["results"], GROUPS, path).stat().st_size > 5000
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _draw_panel(axis, panels(make_results(long, 20)["results"], GROUPS)[1], long)
    assert len(axis.containers) == 3 and {line.get_linestyle() for line in axis.lines} == {"None"}  # points alone
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        draw(RESULTS["results"], GROUPS, path)
    with pytest.raises(UserError, match="no result to draw"):
        draw([record("a", "lambada", "acc", (NAN, NAN, NAN, 0))], GROUPS, tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        draw(RESULTS["results"], GROUPS, tmp_path / "other.png")


def test_main_measures():
    records = [*RESULTS["results"], record("base", "preference", "words", (9, 8, 10, 9), "words")]
    assert main_measure("preference", records[::-1]) == "win_rate" and main_measure("preference", records[-1:]) == ""
    assert main_measure("lambada", records) == "acc" and main_measure("text", records) == ""
