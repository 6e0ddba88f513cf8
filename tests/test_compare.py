"""`plot` and `compare`: whole steps, smoothing, axes of one unit; runs beside one another, texts that are no HTML."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.resolve import to_plain
from rlhf_fast.run import compare as comparing
from rlhf_fast.run.compare import short_names
from rlhf_fast.run.info import run_info
from rlhf_fast.run.plot import Line, draw, load_pyplot, panels, running_mean, smoothing_weight

pytest.importorskip("matplotlib")


def write_run(folder, stage="ppo", metrics=(), samples=(), finished=True, data=None, **config):
    """Write the files of a run of `stage` that compare reads."""
    folder.mkdir(parents=True, exist_ok=True)
    make = {"ppo": toy.ppo, "sft": toy.sft, "reward": toy.reward}[stage]
    inputs = folder.parent / "inputs"
    inputs.mkdir(exist_ok=True)
    info = run_info(stage, make(inputs, out=str(folder), **config)) | {"data": data or {}, "models": {}}
    info |= {"finished": {}} if finished else {}
    (folder / "run.json").write_text(json.dumps(to_plain(info), indent=2))
    toy.jsonl(folder / "metrics.jsonl", list(metrics))
    toy.jsonl(folder / "samples.jsonl", list(samples))
    return str(folder)


def ppo_rows(scores, **more):
    timing = {"time/step": 2.0, "perf/tokens_per_second": 1773.0}
    return [{"step": i, "objective/scores": score, **timing, **more} for i, score in enumerate(scores, 1)]


def sample(step, prompt, response, score, **more):
    return {"step": step, "prompt": prompt, "response": response, "length": 2, "eos": True, "score": score, **more}


def axes_of(lines, smooth=None):
    pyplot = load_pyplot("plot")
    figure = draw(pyplot, [("title", lines)], smooth)
    figure.canvas.draw()
    (axis,) = figure.axes
    pyplot.close(figure)
    return axis


def test_steps_are_whole_and_ticks_have_no_offset():
    for steps in ([1, 2], [1, 2, 3, 4], [7], list(range(1, 11))):
        axis = axes_of([Line(steps, [1 + 1e-7 * i for i in range(len(steps))], "val/ratio_first", "C0")])
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == int(tick) for tick in ticks), ticks
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert axis.yaxis.get_major_formatter().get_offset() == ""
        assert "1.000" in " ".join(labels) and all(len(label) <= 7 for label in labels), labels
        assert axis.get_ylim()[0] < 0.999 < 1.001 < axis.get_ylim()[1]


def test_smoothing_draws_the_logged_curve_faint_behind_its_running_mean():
    assert running_mean([1.0, 3.0, 5.0], 0.0) == [1, 3, 5]
    assert running_mean([2.0] * 9, 0.9) == pytest.approx([2.0] * 9)  # no pull towards 0 at the start
    assert running_mean([1.0, 3.0], 0.5) == pytest.approx([1, (0.5 * 1 + 3) / 1.5])
    assert smoothing_weight(49) == 0 and smoothing_weight(60) == 0.5 and smoothing_weight(3000) == pytest.approx(0.99)
    values = [float(i % 2) for i in range(100)]
    raw, mean = axes_of([Line(range(100), values, "x", "C3")]).lines
    assert list(raw.get_ydata()) == values and raw.get_alpha() < 0.5
    assert max(mean.get_ydata()[50:]) - min(mean.get_ydata()[50:]) < 0.5
    assert raw.get_color() == mean.get_color() == "C3"
    for lines, smooth in (
        ([Line(range(100), values, "x", "C3")], 0.0),
        ([Line(range(9), values[:9], "x", "C3")], None),
    ):
        (only,) = axes_of(lines, smooth).lines
        assert list(only.get_ydata()) == list(lines[0].values)


def test_measures_of_eval_share_axes_only_with_their_unit():
    names = ("lambada.acc", "lambada.perplexity", "toxicity.toxic", "toxicity.toxicity", "text.bits_per_byte",
             "winogender.entropy", "winogender.prefers_male", "winogender.bls_correlation", "truth.true",
             "truth.informative")  # fmt: skip
    shown = panels([{"step": 1, **{f"eval/{name}": 0.5 for name in names}}])
    assert {title: [name.removeprefix("eval/") for name in curves] for title, curves in shown} == {
        "eval/lambada": ["lambada.acc"], "eval/lambada: perplexity": ["lambada.perplexity"],
        "eval/toxicity": ["toxicity.toxic"], "eval/toxicity: score": ["toxicity.toxicity"],
        "eval/text": ["text.bits_per_byte"], "eval/truth": ["truth.true", "truth.informative"],
        "eval/winogender: entropy, bits": ["winogender.entropy"], "eval/winogender": ["winogender.prefers_male"],
        "eval/winogender: correlation": ["winogender.bls_correlation"],
    }  # fmt: skip


class Text(HTMLParser):
    """Texts of a page, by the cells of its tables, and the tags and addresses in it."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.tables, self._inside = set(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._inside = True
        elif tag == "div" and self._inside and self.tables[-1][-1][-1]:
            self.tables[-1][-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.tables[-1][-1][-1] += data


def test_runs_beside_one_another(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "<script>alert(1)</script> & \x1b[2J"
    data = {"inputs/prompts.jsonl": "a" * 64}
    write_run(tmp_path / "runs/a", metrics=ppo_rows([0.0] * 10 + [1.0] * 10, **{"objective/kl": 0.5}), seed=1,
              samples=[sample(1, "one", "old", 0.1), sample(9, "one", evil, 0.25, kl=1.5),
                       sample(9, "two", "only a", 0)],
              data=data)  # fmt: skip
    write_run(tmp_path / "runs/b", metrics=ppo_rows([0.5] * 5, **{"valid/scores": 2.0}), seed=2, finished=False,
              samples=[sample(9, "<u>one", "b's", -3, raw_prompt="one"), sample(1, "one", "b old", 0)],
              data={"inputs/prompts.jsonl": "b" * 64})  # fmt: skip
    assert main(["compare", "runs/a", "runs/b"]) == 0
    printed = capsys.readouterr().out.splitlines()
    table = {tuple(re.split(r" {2,}", line)) for line in printed}
    assert ("last values", "a", "b") in table
    assert ("steps", "20", "5 (not finished)") in table
    assert ("objective/scores", "1", "0.5") in table  # the mean of the last two of twenty points, and of the last
    assert ("objective/kl", "0.5", "-") in table and ("valid/scores", "-", "2") in table
    assert ("time", "0:00:40", "0:00:10") in table and ("speed", "1.77k tok/s", "1.77k tok/s") in table
    assert ("settings that differ", "a", "b") in table and ("seed", "1", "2") in table
    assert not any(line.startswith(("out ", "kl.coef")) for line in printed)
    assert printed[-1].startswith("compare.html: ")

    page = (tmp_path / "compare.html").read_text()
    found = Text(page)
    assert "script" not in found.tags and "\x1b" not in page
    (picture,) = found.addresses  # no other file, no network
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    settings, values, samples = found.tables
    assert ["seed", "1", "2"] in settings and not [row for row in settings if row[0] in ("out", "kl.coef")]
    assert ["objective/scores", "1", "0.5"] in values
    assert samples[0] == ["prompt", "a", "b"]
    assert samples[1:] == [
        ["step 9 | one", "<script>alert(1)</script> & \ufffd[2J | score 0.25  kl 1.5  length 2",
         "b's | score -3  length 2"]
    ]  # fmt: skip

    assert main(["compare", "runs/a", "runs/b", "--samples", "0"]) == 0  # what it wrote itself it may replace
    assert len(Text((tmp_path / "compare.html").read_text()).tables) == 2


def test_samples_of_different_steps_and_of_no_common_prompt(tmp_path):
    def shared(one, other):
        folders = [write_run(tmp_path / name, metrics=ppo_rows([1.0]), samples=rows)
                   for name, rows in (("a", one), ("b", other))]  # fmt: skip
        return comparing.shared_samples(comparing._read(folders), 5)

    pairs, note = shared([sample(1, "p", "old", 0), sample(3, "p", "new", 0)], [sample(2, "p", "b", 1)])
    assert "no prompt at the same step" in note
    ((step, prompt, (ours, theirs)),) = pairs
    assert (step, prompt) == ("", "p") and ours == [("new", "step 3  score 0  length 2")]
    assert theirs == [("b", "step 2  score 1  length 2")]
    assert shared([sample(1, "p", "x", 0)], [sample(1, "q", "x", 0)]) == (
        [], "The rows of samples.jsonl have no prompt in common.")  # fmt: skip
    assert shared([], []) == ([], "No run has a samples.jsonl with rows.")


def test_other_contents_under_the_same_name_are_a_difference(tmp_path):
    runs = []
    for name, digest in (("a", "0" * 64), ("b", "1" * 64)):
        write_run(tmp_path / name, metrics=ppo_rows([1.0]), data={str(tmp_path / "inputs/prompts.jsonl"): digest})
        runs.append(str(tmp_path / name))
    rows = comparing.setting_rows(comparing._read(runs))
    assert rows == [("data.path (sha256)", "0" * 12, "1" * 12)]


def test_settings_without_effect_are_no_difference(tmp_path):
    """ptx_ratio stood there of runs without pretraining text."""
    plain = DataConfig()
    runs = [write_run(tmp_path / str(n), metrics=ppo_rows([1.0]), ptx_ratio=n, pretrain=plain) for n in (1, 8)]
    assert not [row for row in comparing.setting_rows(comparing._read(runs)) if row[0].startswith(("ptx", "pretrain"))]
    mixed = [write_run(tmp_path / f"m{n}", metrics=ppo_rows([1.0]), ptx_ratio=n) for n in (1, 8)]
    assert ("ptx_ratio", "1", "8") in comparing.setting_rows(comparing._read(mixed))


def test_lists_of_files_and_of_rewards_have_checksums_too(tmp_path):
    """A list of files has one of all, a list of rewards one each."""

    def run(folder, files, function):
        sums = {"1.jsonl, 2.jsonl": files * 64, "1.jsonl": "0" * 64, "2.jsonl": files * 64}
        run = write_run(folder, metrics=ppo_rows([1.0]), reward=["m:f", "m:g"])
        manifest = json.loads((folder / "run.json").read_text())
        manifest["config"]["data"]["path"] = ["1.jsonl", "2.jsonl"]
        manifest |= {"data": sums, "functions": {"m:f": "a" * 64, "m:g": function * 64}}
        (folder / "run.json").write_text(json.dumps(manifest))
        return run

    runs = comparing._read([run(tmp_path / "a", "1", "c"), run(tmp_path / "b", "2", "d")])
    rows = {name: cells for name, *cells in comparing.setting_rows(runs)}
    assert rows["data.path (sha256)"] == ["1" * 12, "2" * 12]
    assert rows["reward (sha256)"] == [f"{'a' * 12} {'c' * 12}", f"{'a' * 12} {'d' * 12}"]


def test_long_values_that_differ_are_not_cut_to_the_same():
    one, other = (f"/data/project/experiments/{name}/reward-model-of-the-week" for name in "ab")
    cells = comparing._cut([one, other])
    assert len(set(cells)) == 2 and all(len(cell) <= comparing.CELL for cell in cells)
    assert comparing._cut(["short", "x" * 99])[0] == "short"


def test_each_of_several_rewards_has_a_panel():
    rows = [{"step": 1, "rewards/rm/mean": 0.5, "rewards/rm/std": 0.1, "valid/rewards/rm/mean": 0.4}]
    assert [(title, list(curves)) for title, curves in panels(rows)] == [
        ("rewards/rm", ["rewards/rm/mean", "valid/rewards/rm/mean"])
    ]


def test_three_runs_of_sft_and_of_reward_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage, metric in (("sft", "loss/sft"), ("reward", "loss/reward")):
        ranked = {"step": 1, "prompt": "p", "responses": ["x", "y"], "ranks": [1, 0], "scores": [0.5, 2.0]}
        rows = [{"step": 1, metric: 2.0}, {"step": 2, metric: 1.0}]
        names = [f"{stage}/{name}/run" for name in "abc"]
        for name in names:
            write_run(tmp_path / name, stage, rows, [ranked] if stage == "reward" else [])
        assert main(["compare", *names, "--out", f"{stage}.html"]) == 0
        lines = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
        assert ["last values", "a/run", "b/run", "c/run"] in lines and [metric, "1", "1", "1"] in lines
    samples = Text((tmp_path / "reward.html").read_text()).tables[-1]
    assert samples[1] == ["step 1 | p", *["y | rank 1  score 2 | x | rank 2  score 0.5"] * 3]


def test_a_metric_of_two_runs_has_one_panel_whatever_else_they_logged(tmp_path):
    more = {"objective/rlhf_reward": 0.5, "valid/scores": 2.0, "valid/rlhf_reward": 1.0}
    folders = [write_run(tmp_path / "a", metrics=ppo_rows([0.0, 1.0])),
               write_run(tmp_path / "b", metrics=ppo_rows([0.5, 0.75], **more))]  # fmt: skip
    lines = dict(comparing._lines(comparing._read(folders)))
    assert list(lines) == ["reward: scores", "reward: rlhf_reward"]
    shown = [(line.label, line.colour, line.style, list(line.values)) for line in lines["reward: scores"]]
    assert shown == [("objective/scores", "C0", "-", [0.0, 1.0]), ("objective/scores", "C1", "-", [0.5, 0.75]),
                     ("valid/scores", "C1", "--", [2.0, 2.0])]  # fmt: skip


def test_names_of_folders_are_no_formulas(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [r"$\frac$", "_hidden", "<b>"]
    for name in names:
        write_run(tmp_path / name, metrics=ppo_rows([1.0, 2.0]))
        assert main(["plot", name]) == 0
    pyplot = load_pyplot("compare")
    shown = []
    monkeypatch.setattr(pyplot, "close", lambda figure: shown.append(figure))
    assert main(["compare", *names]) == 0
    (legend,) = shown[0].legends
    assert [text.get_text().strip() for text in legend.get_texts()] == names
    page = (tmp_path / "compare.html").read_text()
    assert "<b>$\\frac$</b>" in page and "<b>&lt;b&gt;</b>" in page


def test_short_names():
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["a/ppo", "b/ppo"]) == ["a/ppo", "b/ppo"]
    assert short_names([".", ".."]) == [Path.cwd().name, Path.cwd().parent.name]


def test_what_cannot_be_compared_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, metrics=ppo_rows([1.0]))
    write_run(tmp_path / "s", "sft", [{"step": 1, "loss/sft": 2.0}])
    write_run(tmp_path / "bare", metrics=[{"step": 1, "x": 1}])
    write_run(tmp_path / "bare2", metrics=[{"step": 1, "x": 1}])
    write_run(tmp_path / "new")
    (tmp_path / "foreign").mkdir()
    toy.jsonl(tmp_path / "foreign/metrics.jsonl", [{"step": 1}])
    (tmp_path / "mine.html").write_text("<p>mine")
    capsys.readouterr()
    for args, sentence in [
        ([], "give two or more folders"),
        (["a"], "give two or more folders"),
        (["a"] * 11, "shows at most 10 runs, got 11"),
        (["a", "b", "a/"], "a/ is given twice"),
        (["a", "s"], "the runs are of different stages, a of ppo and s of sft"),
        (["a", "nodir"], "nodir: there is no such folder"),
        (["a", "new"], "new/metrics.jsonl: is empty"),
        (["a", "foreign"], "foreign: holds no run.json"),
        (["bare", "bare2"], "metrics.jsonl of bare, bare2 have none of the metrics"),
        (["a", "b", "--out", "x.png"], "x.png: is to be an HTML file"),
        (["a", "b", "--out", "mine.html"], "exists already"),
        (["a", "b", "--smooth", "1"], "smooth must be from 0 (as logged) to below 1, got 1"),
        (["a", "b", "--samples", "-1"], "samples must be at least 0, got -1"),
    ]:
        assert main(["compare", *args]) == 2, args
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, (args, error)
    assert main(["plot", "a", "b"]) == 2
    assert "`rlhf-fast compare a b` draws several" in capsys.readouterr().err
    assert main(["plot", "a", "--smooth", "-0.1"]) == 2
    assert "plot: smooth must be from 0" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine" and not (tmp_path / "compare.html").exists()
