"""Flags over a recipe's values, a run.json given back, and sweeps."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import toy
from test_cli import RECIPE, error_of

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import LogConfig, ModelConfig, SamplingConfig
from rlhf_fast.config.flags import stage_config
from rlhf_fast.config.recipe_flags import combinations, overrides, read_flags
from rlhf_fast.config.resolve import resolve, setting_types
from rlhf_fast.config.rewards import FunctionOfRun
from rlhf_fast.config.stages import STAGES, PPOConfig, SFTConfig
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.identity import input_checksums
from rlhf_fast.run.info import run_info
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.stages.recipe import read_recipe
from rlhf_fast.stages.sweep import Outcome, Run, equal_rows, plan
from rlhf_fast.training.rewards import find_function, source_file

pytestmark = pytest.mark.usefixtures("one_thread", "folder")


@pytest.fixture
def recipe(folder):
    toy.demonstrations(folder / "demonstrations.jsonl", 32)
    toy.rankings(folder / "rankings.jsonl", 32)
    toy.prompt_file(folder / "prompts.jsonl", 16)
    (folder / "r.yaml").write_text(RECIPE.format(model=toy.model_at(folder)))
    return "r.yaml"


@pytest.fixture
def started(monkeypatch):
    """Collect the settings of the stages that run, which write only that they are finished."""
    found = []

    def run(cfg, dry_run=False, *_):
        if dry_run:
            return
        found.append(cfg)
        Path(cfg.out).mkdir(parents=True)
        (Path(cfg.out) / "config.json").write_text("{}")
        write_json(Path(cfg.out) / "run.json", run_info(cfg.stage, cfg) | input_checksums(cfg) | {"finished": {}})
        row = {"step": 1, "objective/scores": getattr(getattr(cfg, "kl", None), "coef", 0.0), "objective/kl": 0.5}
        (Path(cfg.out) / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    for module in (sft, reward, ppo):
        monkeypatch.setattr(module, "run", run)
    return found


def names(started):
    return [(cfg.stage, cfg.out) for cfg in started]


def test_flags_go_over_the_values_of_a_recipe(recipe):
    words = "--seed 7 --ppo.kl.coef 0.1 --ppo.no-whiten-shift-mean --sft.optim.betas 0.8 0.9 --ppo.sampling.stop x y"
    words += " --sft.data.columns completion answer --reward.epochs=1e0 --ppo.seed 9 --out runs/z"
    flags = overrides(read_flags(words.split(), "run"), "run")
    stages = read_recipe(recipe, flags).stages
    assert (stages["sft"].seed, stages["reward"].seed, stages["ppo"].seed) == (7, 7, 9)  # the recipe has seed 1
    assert stages["ppo"].kl.coef == 0.1 and stages["ppo"].whiten_shift_mean is False
    assert stages["sft"].optim.betas == (0.8, 0.9) and stages["ppo"].sampling.stop == ("x", "y")
    assert stages["sft"].data.columns == {"completion": "answer"} and stages["reward"].epochs == 1
    assert stages["sft"].epochs == 2 and stages["ppo"].policy.path == "runs/z/sft"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--ppo.kl.coeff 1", 'ppo: no setting "kl.coeff"; did you mean kl.coef? (--ppo.kl.coeff)'),
        ("--ppo.kl.coef x", "ppo: kl.coef must be a number, got x (--ppo.kl.coef)"),
        ("--ppo.kl.coef -1", "ppo: kl.coef must be at least 0, got -1.0 (--ppo.kl.coef)"),
        ("--ppo.kl.coef", "run: --ppo.kl.coef needs a value"),
        ("--ppo.kl.coef 1 2", "run: --ppo.kl.coef takes one value, got 1 2; `rlhf-fast sweep` runs one after another"),
        ("--ppo.kl 1", 'ppo: "kl" takes no value; it is a group, of kl.coef,'),
        ("--ppo.resume false", "run: --ppo.resume takes no value: give --ppo.resume alone, or --ppo.no-resume"),
        ("--ppo.no-resume false", "give --ppo.resume alone, or --ppo.no-resume"),
        ("--ppo.data.columns prompt", "run: --ppo.data.columns needs pairs of a name and a value, got prompt"),
        ("--ppo.data.columns prompt a prompt b", "--ppo.data.columns has prompt twice, and only one can be meant"),
        ("--ppo.log.sinks a --ppo.log.sinks b", "--ppo.log.sinks is given twice, and only one would count"),
        ("--kl.coef 1", "run: there is no flag --kl.coef; write --ppo.kl.coef"),
        ("--optim.lr 1", "write --sft.optim.lr or --reward.optim.lr or --ppo.optim.lr"),
        (
            "--pp0.episodes 1",
            "there is no flag --pp0.episodes; there is no section pp0 either; did you mean --ppo.e",
        ),
        ("--sed 1", "run: there is no flag --sed; did you mean --seed?"),
        ("--seed x", "sft: seed must be a whole number, got x (--seed)"),
        ("--ppo 1", "write --ppo.SETTING for a setting of that section"),
        ("--eval.limit 5", "--eval.limit: r.yaml has no section eval; it has sft, reward, ppo"),
        ("other", "run: other belongs to no flag; write the recipe first, then --SETTING VALUE"),
        ("--preset papr", "sft: no preset 'papr'"),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, recipe, words, sentence):
    assert sentence in error_of(capsys, "run", recipe, *words.split())


@pytest.mark.parametrize("stage", [*STAGES])
def test_every_flag_of_a_stage_is_one_of_a_recipe_with_the_same_value(stage):
    """Each setting with a value of its type, once by the parser of the stages and once by that of recipes."""
    values = {int: ["8"], float: ["0.5"], str: ["text"], bool: []}
    argv = []
    for path, kind in setting_types(STAGES[stage]).items():
        choices = getattr(kind, "__args__", ())
        if str(kind).startswith("typing.Literal"):
            words = [choices[-1]]
        elif kind in values:
            words = values[kind]
        else:
            words = ["0.5", "0.6"] if float in choices else ["a", "b"]
        argv.append((f"--{path}", words))
    needed = {"missing_eos_value": ["1"], "dual_clip": ["2"], "exact": None, "top_k": ["0"], "top_p": ["1"]}
    needed |= {"min_p": ["0"], "min_new_tokens": ["0"], "eval_every": ["0"]}
    chosen = []
    for flag, words in argv:
        words = needed.get(flag.rpartition(".")[2].lstrip("-"), words)
        if words is not None:
            chosen.append((flag, words))
    single = stage_config(STAGES[stage], [word for flag, words in chosen for word in (flag, *words)])
    flags = [word for flag, words in chosen for word in (f"--{stage}.{flag[2:]}", *words)]
    layer = overrides(read_flags(flags, "run"), "run")[stage]
    assert resolve(STAGES[stage], layer) == single


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_the_help_is_short(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "r.yaml", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 45 and "show-config" in lines[-1] and "--ppo.    out  seed" in "\n".join(lines)


def test_another_ppo_run_reuses_what_is_finished(capsys, recipe, started):
    assert main(["run", recipe]) == 0
    assert main(["run", recipe, "--ppo.kl.coef", "0.1", "--ppo.out", "runs/b"]) == 0
    assert names(started)[3:] == [("ppo", "runs/b")] and started[3].policy.path == "runs/toy/sft"
    assert capsys.readouterr().out.count("finished already") == 2
    assert {"sft", "reward", "ppo", "ppo: runs/b"} == json.loads(Path("runs/toy/recipe.json").read_text()).keys()
    error = error_of(capsys, "run", recipe, "--ppo.kl.coef", "0.1")
    assert error.endswith("kl.coef = 0.02, now 0.1; set it back or give --ppo.out runs/toy/ppo-2")
    Path("runs/toy/ppo-2").mkdir()
    error = error_of(capsys, "run", recipe, "--sft.epochs", "3")  # the later stages read what would be trained anew
    flags = "--sft.out runs/toy/sft-2 --reward.out runs/toy/reward-2 --ppo.out runs/toy/ppo-3"
    assert error.endswith(f"epochs = 2, now 3; set it back or give {flags}")
    assert main(["run", recipe, "--sft.epochs", "3", *flags.split()]) == 0
    assert [cfg.stage for cfg in started[4:]] == ["sft", "reward", "ppo"]


def test_an_evaluation_of_another_run_has_a_folder_of_its_own(recipe):
    text = Path(recipe).read_text() + "eval: {tasks: [truth]}\n"
    Path(recipe).write_text(text)
    flags = overrides(read_flags(["--ppo.out", "runs/b", "--eval.limit", "5"], "run"), "run")
    found = read_recipe(recipe, flags).evaluation
    assert (found.out, found.limit, found.models[-1]) == ("runs/b-eval", 5, "ppo=runs/b")
    assert read_recipe(recipe).evaluation.out == "runs/toy/eval"


def test_a_sweep_runs_each_value_once_and_shares_the_rest(capsys, folder, recipe, started):
    argv = ["sweep", recipe, "--ppo.kl.coef", "0.01", "1e-1", "--ppo.seed", "0", "3"]
    assert main(argv) == 0
    place = "runs/toy/sweep/ppo.kl.coef={},ppo.seed={}/ppo"
    pairs = [("0.01", "0"), ("0.01", "3"), ("0.1", "0"), ("0.1", "3")]
    expected = [("sft", "runs/toy/sft"), ("reward", "runs/toy/reward"), *(("ppo", place.format(*p)) for p in pairs)]
    assert names(started) == expected
    assert [(cfg.kl.coef, cfg.seed) for cfg in started[2:]] == [(0.01, 0), (0.01, 3), (0.1, 0), (0.1, 3)]
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].split()[:4] == ["ppo.kl.coef", "ppo.seed", "objective/scores", "objective/kl"]
    assert table[3].split()[:4] == ["0.1", "0", "0.1", "0.5"]
    written = json.loads(Path("runs/toy/sweep/sweep.json").read_text())
    assert [run["values"] for run in written["runs"]] == [{"ppo.kl.coef": c, "ppo.seed": s} for c, s in pairs]
    assert written["runs"][2]["metrics"]["objective/scores"] == {"first": 0.1, "last": 0.1}
    assert Path("runs/toy/sweep/sweep.md").read_text().count("\n") == 6
    started.clear()
    assert main([*argv, "4"]) == 0  # one value more
    assert [cfg.seed for cfg in started] == [4, 4]


def test_a_misspelt_section_of_a_recipe(capsys, folder, recipe, started):
    text = Path(recipe).read_text()
    Path(recipe).write_text(text + "\npp0.episodes: 8\n")
    assert 'no section "pp0"; did you mean ppo? (' in error_of(capsys, "run", recipe)
    Path(recipe).write_text(text + "\nvalue.path: x\n")  # a group of a stage, which is near eval
    assert 'no setting "value.path" for all stages' in error_of(capsys, "run", recipe)
    Path(recipe).write_text(text + "\nsft.model.dtype: fp16\n")
    assert "sft: model.dtype must be one of float32, bfloat16, got fp16" in error_of(capsys, "run", recipe)


def test_equal_rows_of_a_sweep_are_not_without_a_word(recipe):
    runs = [Run({"ppo.kl.coef": value}, None, []) for value in ("0.1", "0.2")]
    one, other = {"objective/kl": (0.0, 0.5)}, {"objective/kl": (0.0, 0.6)}
    (said,) = equal_rows([Outcome(run, 1.0 + i, one) for i, run in enumerate(runs)])
    assert "all figures are equal: the runs are too short to differ, or ppo.kl.coef has no effect" in said
    assert not equal_rows([Outcome(runs[0], 1.0, one), Outcome(runs[1], 1.0, other)])
    assert not equal_rows([Outcome(runs[0], 1.0, one), Outcome(runs[1], 1.0, one, "failed")])
    assert not equal_rows([Outcome(runs[0], 1.0, one)])


def test_a_swept_sft_setting_trains_all_that_follows(recipe, started):
    assert main(["sweep", recipe, "--sft.epochs", "1", "2", "--sweep.out", "s"]) == 0
    assert names(started)[:3] == [(stage, f"s/sft.epochs=1/{stage}") for stage in STAGES]
    assert started[2].policy.path == started[1].model.path == "s/sft.epochs=1/sft"
    assert started[5].reward == "s/sft.epochs=2/reward" and not Path("runs").exists()


def test_a_run_that_fails_is_in_the_table_and_the_others_go_on(capsys, recipe, started, monkeypatch):
    run = ppo.run

    def failing(cfg, dry_run=False, *_):
        if dry_run:
            return
        if cfg.kl.coef == 0.05:
            raise ZeroDivisionError("division by zero")
        if cfg.kl.coef == 0.07:
            raise UserError("rm: returned nan")
        run(cfg)

    monkeypatch.setattr(ppo, "run", failing)
    argv = ["sweep", recipe, "--ppo.kl.coef", "0.05", "0.07", "0.1"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    table = out.splitlines()[-4:]
    assert table[0].endswith("failed: ZeroDivisionError: division by zero") and "failed: rm: returned nan" in table[1]
    assert table[2].split()[1] == "0.1" and "rlhf-fast: ppo.kl.coef=0.07: failed: rm: returned nan" in err
    statuses = [run["status"] for run in json.loads(Path("runs/toy/sweep/sweep.json").read_text())["runs"]]
    assert statuses == ["failed", "failed", "finished"]
    monkeypatch.setattr(ppo, "run", run)
    started.clear()
    assert main(argv) == 0
    assert [cfg.kl.coef for cfg in started] == [0.05, 0.07]  # the same command does what is left


@pytest.mark.parametrize("coefs", [("0.05", "0.1"), ("0.1", "0.05")])
def test_a_sweep_says_before_it_trains_which_runs_will_not_fit(capsys, recipe, started, monkeypatch, coefs):
    """A run that does not fit is named whichever its place, and the others are made; without others nothing is."""
    run = ppo.run

    def too_large(cfg, dry_run=False, *_):
        if cfg.kl.coef < 0.1:
            raise UserError("ppo: needs about 99 GiB")
        if not dry_run:
            run(cfg)

    monkeypatch.setattr(ppo, "run", too_large)
    assert main(["sweep", recipe, "--ppo.kl.coef", "0.05", "0.07"]) == 2
    assert not started and "rlhf-fast: error: ppo: needs about 99 GiB" in capsys.readouterr().err
    assert main(["sweep", recipe, "--ppo.kl.coef", *coefs]) == 2
    lines = capsys.readouterr().out.splitlines()
    warned = lines.index("sweep: ppo.kl.coef=0.05 will fail: ppo: needs about 99 GiB")
    assert warned < min(i for i, line in enumerate(lines) if line.startswith("sweep: run 1 of 2"))
    statuses = {
        run["values"]["ppo.kl.coef"]: run["status"]
        for run in json.loads(Path("runs/toy/sweep/sweep.json").read_text())["runs"]
    }
    assert statuses == {"0.05": "failed", "0.1": "finished"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--ppo.kl.coef 0.1", "sweep: give a setting several values, as in --ppo.kl.coef 0.01 0.05 0.1"),
        ("--ppo.kl.coef 0.1,0.2", "--ppo.kl.coef: give the values with spaces between them, without commas"),
        ("--ppo.kl.coef 0.1,0.2 0.3", "got 0.1,0.2 (--ppo.kl.coef); give the values with spaces between them"),
        ("--ppo.kl.coef 0.1 0.10", "sweep: --ppo.kl.coef has the value 0.1 twice"),
        ("--ppo.kl.coef 0.1 -1", "ppo: kl.coef must be at least 0, got -1.0 (--ppo.kl.coef)"),
        ("--ppo.batch 16 12", "ppo: batch must be a multiple of minibatch (8), got 12 (--ppo.batch)"),
        ("--ppo.kl.coef 0.1 0.2 --ppo.out x", "--ppo.out names one folder for several runs; give --sweep.out"),
        ("--out a b", "sweep: --out takes one value"),
        ("--eval.limit 3 4", "sweep: --eval.limit takes one value, since it changes no weights"),
        ("--ppo.reward m:a/b m:a_b", "two of the values would have the folder runs/toy/sweep/ppo.reward=m_a_b/ppo"),
        ("--ppo.kl.coef 0.1 0.2 --sweep.out", "sweep: --sweep.out needs one folder"),
        ("--ppo.sampling.max_new_tokens 4 100", "(run ppo.sampling.max_new_tokens=100)"),
    ],
)
def test_a_wrong_sweep_starts_nothing(capsys, recipe, started, words, sentence):
    assert sentence in error_of(capsys, "sweep", recipe, *words.split())
    assert not started and not Path("runs").exists()


def test_a_swept_reward_is_one_and_leaves_the_recipes_weights_out(capsys, recipe, started):
    text = Path(recipe).read_text().replace("ppo:\n", "ppo:\n  reward: [m:a, m:b]\n  reward_weights: [1, 0.5]\n")
    Path(recipe).write_text(text)
    argv = ["sweep", recipe, "--ppo.reward", "m:a", "m:b"]
    error = error_of(capsys, *argv)
    assert error.startswith("ppo: reward_weights must have one number for each reward (a), got [1.0, 0.5] (r.yaml:")
    assert error.endswith("is one alone: --ppo.reward-weights without a value leaves the recipe's weights out")
    assert "one alone" not in error_of(capsys, "run", recipe, "--ppo.reward", "m:a")  # no sweep
    runs = plan(recipe, combinations(read_flags([*argv[2:], "--ppo.reward-weights"], "sweep"), "sweep"))
    assert [run.recipe.stages["ppo"].reward for run in runs] == ["m:a", "m:b"]
    assert all(run.recipe.stages["ppo"].reward_weights == () for run in runs)
    runs = plan(recipe, combinations(read_flags([*argv[2:], "--ppo.reward-weights", "2"], "sweep"), "sweep"))
    assert all(run.recipe.stages["ppo"].reward_weights == (2,) for run in runs)


def test_a_sweep_writes_over_nothing(capsys, recipe, started):
    Path("s").mkdir()
    Path("s/sweep.md").write_text("mine")
    argv = ["sweep", recipe, "--ppo.kl.coef", "0.1", "0.2", "--sweep.out", "s"]
    assert "s: is not empty and no sweep of ours is in it" in error_of(capsys, *argv)
    Path("s/sweep.json").write_text("[1]")
    assert "s/sweep.json: was not written by a sweep of ours" in error_of(capsys, *argv)
    assert Path("s/sweep.md").read_text() == "mine" and not started


def test_switches_are_swept_by_true_and_false():
    chosen = combinations(read_flags(["--ppo.whiten_shift_mean", "true", "false"], "sweep"), "sweep")
    values = [overrides(flags, "sweep")["ppo"]["whiten_shift_mean"].value for _, flags in chosen]
    assert values == [True, False] and [c.values["ppo.whiten_shift_mean"] for c in chosen] == ["true", "false"]


def test_a_sweep_evaluates_the_models_of_all_runs_side_by_side(recipe, started, monkeypatch):
    Path(recipe).write_text(Path(recipe).read_text() + "eval: {tasks: [truth]}\n")
    evaluated = []
    monkeypatch.setattr("rlhf_fast.eval.evaluate.evaluate_and_print", lambda cfg: evaluated.append(cfg) or ["below"])
    assert main(["sweep", recipe, "--ppo.kl.coef", "0.1", "0.2"]) == 1
    (cfg,) = evaluated
    assert list(cfg.model_paths()) == ["base", "sft", "ppo(0.1)", "ppo(0.2)"] and cfg.out == "runs/toy/sweep/eval"
    assert cfg.model_paths()["ppo(0.2)"] == "runs/toy/sweep/ppo.kl.coef=0.2/ppo"


# run.json as --config


def written_run(folder, **changes):
    cfg = toy.sft(folder, out="runs/x", epochs=1)
    relative = {"model": replace(cfg.model, path="model"), "data": replace(cfg.data, path="demonstrations.jsonl")}
    relative |= {"pretrain": replace(cfg.pretrain, path="texts.jsonl"), "out": "runs/x"}
    cfg = replace(cfg, **relative)
    saved = run_info("sft", cfg)
    saved["config"] |= changes
    (folder / "runs/x").mkdir(parents=True)
    (folder / "runs/x/run.json").write_text(json.dumps(saved))
    return cfg


def test_a_run_json_gives_the_run_back(folder, capsys):
    cfg = written_run(folder)
    assert stage_config(SFTConfig, ["--config", "runs/x/run.json"]) == cfg
    found = stage_config(SFTConfig, ["--config", "runs/x/run.json", "--out", "y", "--optim.lr", "1"])
    assert (found.out, found.optim.lr) == ("y", 1.0) and found == replace(cfg, out="y", optim=found.optim)
    assert "is of a run of sft, not ppo" in error_of(capsys, "ppo", "--config", "runs/x/run.json")
    assert main(["show-config", "sft", "--config", "runs/x/run.json"]) == 0
    assert "epochs: 1" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("moved", [False, True])
def test_its_paths_are_those_of_the_directory_where_it_was_started(folder, monkeypatch, moved):
    """Also when the project was moved since; a hub name and a path that leads nowhere stay as they are."""
    (folder / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder / "a")
        written_run(folder / "a", select_reward="org/name")
    place = folder / "a"
    if moved:
        place = place.rename(folder / "b")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    found = stage_config(SFTConfig, ["--config", "../" + place.name + "/runs/x/run.json"])
    assert (found.model.path, found.data.path) == (str(place / "model"), str(place / "demonstrations.jsonl"))
    assert (found.out, found.select_reward, found.data.valid) == (str(place / "runs/x"), "org/name", "")


def test_its_functions_are_those_of_the_directory_where_it_was_started(folder, monkeypatch):
    """A function is imported from there, with what its module imports, and sys.path is as before."""
    (project := folder / "project").mkdir()
    own = "from letters_of_run import letters\n\ndef score(texts):\n    return letters(texts)\n"
    (project / "scores_of_run.py").write_text(own)
    (project / "letters_of_run.py").write_text("def letters(texts):\n    return [float(len(text)) for text in texts]\n")
    cfg = toy.ppo(folder, out="runs/x", reward=("scores_of_run:score", "math:fsum", "org/name"))
    (project / "runs" / "x").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.chdir(project)
        (project / "runs/x/run.json").write_text(json.dumps(run_info("ppo", cfg)))
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "scores_of_run.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.setattr(sys, "path", [str(folder / "elsewhere"), *sys.path])
    before = list(sys.path)
    found = replace(stage_config(PPOConfig, ["--config", "../project/runs/x/run.json"]), seed=3).reward
    assert found == cfg.reward and sys.path == before
    function = find_function(copy.deepcopy(found)[0])
    assert function(["abc"]) == [3.0] and sys.path == before
    assert source_file(found[0]) == project / "scores_of_run.py"
    assert find_function(found[1]) is math.fsum
    with pytest.raises(UserError, match="reward scores_of_run:other: cannot be imported"):
        find_function(FunctionOfRun("scores_of_run:other", str(project)))
    assert sys.path == before


def test_settings_that_are_gone_are_named_and_left_out(folder, capsys):
    cfg = written_run(folder, new_one=3, optimizer={"kind": "muon"})
    capsys.readouterr()
    assert stage_config(SFTConfig, ["--config", "runs/x/run.json"]) == cfg
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: runs/x/run.json: was written by version ")
    assert line.endswith("; this one has no new_one, optimizer.kind, so they are left out")


def test_a_run_goes_on_from_another_directory(folder, monkeypatch, capsys):
    """Its inputs and its folder have other names there, and the same bytes."""
    toy.demonstrations(folder / "demonstrations.jsonl", 16)
    argv = ["--epochs", "1", "--sampling.max-new-tokens", "4", "--log.live"]
    toy.model_at(folder)
    (folder / "data").mkdir()
    assert main(["sft", "--model.path", "model", "--data.path", "demonstrations.jsonl", "--out", "x", *argv]) == 0
    monkeypatch.chdir(folder / "data")
    capsys.readouterr()
    paths = ["--model.path", "../model", "--data.path", "../demonstrations.jsonl", "--out", "../x"]
    assert main(["sft", *paths, *argv]) == 0
    assert "../x is finished already" in capsys.readouterr().err
    assert main(["sft", "--config", "../x/run.json"]) == 0
    assert "x is finished already" in capsys.readouterr().err


def test_a_copy_of_a_copied_run_has_the_functions_of_the_first(folder, monkeypatch):
    """The directory of the copy may have another function of that name, which would train another model."""
    for name, value in (("first", 1.0), ("second", 2.0)):
        (folder / name / "runs" / "x").mkdir(parents=True)
        (folder / name / "scores_of_copy.py").write_text(f"def score(texts):\n    return [{value}] * len(texts)\n")
    cfg = toy.ppo(folder, out="runs/x", reward="scores_of_copy:score")
    with monkeypatch.context() as patch:
        patch.chdir(folder / "first")
        Path("runs/x/run.json").write_text(json.dumps(run_info("ppo", cfg)))
        patch.chdir(folder / "second")
        copied = stage_config(PPOConfig, ["--config", "../first/runs/x/run.json", "--out", "runs/x"])
        Path("runs/x/run.json").write_text(json.dumps(run_info("ppo", copied)))
        here = stage_config(PPOConfig, ["--config", "runs/x/run.json"]).reward
    monkeypatch.chdir(folder)
    there = stage_config(PPOConfig, ["--config", "second/runs/x/run.json"]).reward
    assert here.folder == there.folder == str(folder / "first")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert find_function(there)(["abc"]) == [1.0]


def test_a_finished_run_needs_its_data_no_more(folder, capsys):
    """Rows that a script gave are in no file, and those of a file may be gone."""
    rows = toy.rows(toy.demonstrations(folder / "demonstrations.jsonl", 16))
    made = {"epochs": 1, "select": "last", "sampling": SamplingConfig(max_new_tokens=4), "log": LogConfig(live=False)}
    for out, data in (("rows", rows), ("set", datasets.Dataset.from_list(rows)), ("file", "demonstrations.jsonl")):
        sft.run(SFTConfig(out=out, model=ModelConfig(toy.model_at(folder)), data=data, **made))
        if out == "file":
            (folder / "demonstrations.jsonl").unlink()
        capsys.readouterr()
        again = ["sft", "--config", f"{out}/run.json"]
        assert main(again) == main([*again, "--dry-run"]) == 0
        assert f"sft: {out} is finished already; nothing is done" in capsys.readouterr().err
        assert f"{out}: was finished with seed = 0, now 1" in error_of(capsys, *again, "--seed", "1")
        sentence = "there is no such file" if out == "file" else "stands for rows that a script gave; start the script"
        assert sentence in error_of(capsys, *again, "--out", "another")


# what is found before the first stage


def test_a_missing_peft_is_found_before_the_first_stage(capsys, recipe, started, monkeypatch):
    monkeypatch.setattr("rlhf_fast.stages.fit.find_spec", lambda name: None)
    error = error_of(capsys, "run", recipe, "--ppo.policy.lora.rank", "4")
    assert error.startswith("ppo: policy.lora.rank is 4, which needs the package peft; pip install peft")
    assert not started


def test_gold_without_samples_of_ppo_is_found_before_the_first_stage(capsys, recipe, started):
    text = Path(recipe).read_text()
    section = "eval: {tasks: [truth], reward: toy:share_of_a, gold: toy:share_of_a}\n"
    Path(recipe).write_text(text[: text.index("ppo:")] + section)
    assert "eval: gold: none of the models (base, sft) is the folder of a PPO run" in error_of(capsys, "run", recipe)
    Path(recipe).write_text(text + section)
    error = error_of(capsys, "run", recipe, "--ppo.log.samples", "0")
    assert error.startswith("eval: gold needs the samples of a PPO run; set log.samples of ppo above 0")
    assert not started
    assert main(["show-config", "eval"]) == 0
    assert "limit: 0" in capsys.readouterr().out.splitlines()
    assert "eval has no presets" in error_of(capsys, "show-config", "eval", "--preset", "paper")
