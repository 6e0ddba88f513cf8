"""The command line: every command, and every kind of bad input as one sentence with exit status 2 and no traceback."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import toy

from rlhf_fast import __version__, ops
from rlhf_fast.cli.main import COMMANDS, main
from rlhf_fast.errors import UserError
from rlhf_fast.stages.recipe import finished, read_recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new working folder, and one thread, because the models are tiny."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def error_of(capsys, *argv) -> str:
    """Run a command that must fail with exit status 2; return its error, one line."""
    assert main(list(map(str, argv))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rlhf-fast: error: ") and "Traceback" not in "".join(lines)
    return lines[-1].removeprefix("rlhf-fast: error: ")


def test_help_is_quick_because_it_imports_little():
    code = "import sys; from rlhf_fast.cli.main import main; main(['--help']); "
    code += "print('torch' in sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "False"
    for name in COMMANDS:
        assert f"  {name} " in run.stdout


def test_settings_can_be_shown_without_torch():
    code = (
        "import sys; from rlhf_fast.cli.main import main; main(['show-config', 'ppo']); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"usage: rlhf-fast {name}" in capsys.readouterr().out


def test_version_and_unknown_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-fast {__version__}\n"
    assert error_of(capsys, "rewrd") == 'no command "rewrd"; did you mean reward?'
    assert error_of(capsys, "xyz") == 'no command "xyz"; `rlhf-fast --help` lists them'


@pytest.mark.slow
def test_a_real_process_prints_one_line_and_exits_with_2(tmp_path):
    code = "import sys; from rlhf_fast.cli.main import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "check", "nowhere.jsonl"], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "rlhf-fast: error: nowhere.jsonl: there is no such file; look at the path\n"


def test_interruption_full_disk_and_broken_pipe(monkeypatch, capsys):
    def raising(error, name="env"):
        monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=lambda argv: (_ for _ in ()).throw(error)))

    raising(KeyboardInterrupt())
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "rlhf-fast: stopped\n"
    raising(KeyboardInterrupt(), "sft")
    assert main(["sft"]) == 130
    assert "the same command goes on from the newest checkpoint" in capsys.readouterr().err
    raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"))
    full = "the disk is full while writing runs/x; free some space and start the "
    assert error_of(capsys, "env") == f"{full}command again"
    raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), "reward")
    assert error_of(capsys, "reward") == f"{full}same command again: it goes on"
    raising(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a" * 300))
    assert error_of(capsys, "env").endswith("aaa: Permission denied; give another folder, or change its permissions")
    raising(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert error_of(capsys, "env") == "standard output: Input/output error; look at the path"
    raising(torch.OutOfMemoryError("much"))
    assert "lower optim.micro_batch_tokens" in error_of(capsys, "env")
    raising(UserError("a sentence"))
    assert error_of(capsys, "env") == "a sentence"
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # bugs keep their traceback
        main(["env"])


def test_wrong_settings(capsys, folder):
    assert error_of(capsys, "ppo", "--optim.lrr", "1") == (
        'ppo: no setting "optim.lrr"; did you mean optim.lr? (--optim.lrr)'
    )
    (folder / "c.yaml").write_text("seed: 1\n\nepohcs: 3\n")
    assert error_of(capsys, "sft", "--config", "c.yaml") == 'sft: no setting "epohcs"; did you mean epochs? (c.yaml:3)'
    assert "sft: model.path is not set" in error_of(capsys, "sft")
    assert "check: " in error_of(capsys, "check")
    assert "generate: " in error_of(capsys, "generate", "--prompts", "x")
    for flag, meant in (("--sampling.max-new-tokens", "--max-new-tokens"), ("--tempreature", "--temperature")):
        error = error_of(capsys, "generate", "--model", "m", "--prompts", "x", flag, "3")
        assert error.startswith("generate: ") and error.endswith(f"did you mean {meant}?")


GOOD = {"prompt": "a .", "completion": "a"}
BAD_ROWS = [
    ("sft", [GOOD, "{"], ":2: not JSON"),
    ("sft", [GOOD, {"prompt": "a ."}], ':2: no "completion" in the row; found prompt'),
    ("sft", [{"instruction": "a", "answer": "b"}], "set columns: {prompt: instruction, completion: answer}"),
    ("sft", [GOOD, {"prompt": "a .", "completion": None}], ":2: completion is null"),
    ("sft", [GOOD, GOOD, {"prompt": "a .", "completion": ""}], ":3: completion is empty"),
    ("sft", [{"prompt": "a ." * 200, "completion": "b"}], "none of the 1 rows is left"),
    ("sft", [], "the file holds no rows"),
    ("reward", [{"prompt": "a .", "chosen": "b", "rejected": "b"}], ":1: chosen and rejected are equal"),
    ("reward", [{"prompt": "a .", "responses": ["a", "b"], "ranks": [0]}], ":1: 2 responses but 1 ranks"),
    ("reward", [{"prompt": "a .", "responses": ["a", "b"], "ranks": [2, 2]}], ":1: 2 responses, all of one rank"),
    ("ppo", [{"prompt": "a ."}, {"prompt": 3}], ":2: prompt must be text, found a number"),
]


@pytest.mark.parametrize(("stage", "rows", "sentence"), BAD_ROWS, ids=[case[2][:40] for case in BAD_ROWS])
def test_bad_rows_stop_a_stage_before_it_writes(capsys, folder, stage, rows, sentence):
    (folder / "d.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    model = "--policy.path" if stage == "ppo" else "--model.path"
    reward = ["--reward", "toy:share_of_a"] if stage == "ppo" else []
    limit = ["--data.max-prompt-tokens", "100", *(["--sampling.max-new-tokens", "8"] if stage == "ppo" else [])]
    error = error_of(
        capsys, stage, model, toy.model_at(folder), "--data.path", "d.jsonl", "--out", "run", *reward, *limit
    )
    assert sentence in error and error.startswith("d.jsonl")
    assert not (folder / "run").exists()


def test_a_missing_data_file_is_found_before_the_model_is_loaded(capsys, folder):
    toy.demonstrations(folder / "demos.jsonl")
    error = error_of(capsys, "sft", "--model.path", "no-such-model", "--data.path", "demo.jsonl")
    assert error == "demo.jsonl: there is no such file; did you mean demos.jsonl?"


def test_a_missing_model_folder_is_found_without_asking_the_hub(capsys, folder):
    path = toy.demonstrations(folder / "demos.jsonl")
    (folder / "runs").mkdir()
    for name in ("runs/sft", "./sft", "a/b/c", str(folder / "x")):
        error = error_of(capsys, "sft", "--model.path", name, "--data.path", path)
        assert error == f"{name}: there is no such folder; look at the path, or train that model first"


@pytest.mark.parametrize("failure", [ConnectionError("Name or service not known\nmore"), OSError("no such repository")])
def test_a_model_that_is_neither_here_nor_on_the_hub(capsys, folder, monkeypatch, failure):
    urls = []

    def look(url, **_):
        urls.append(url)
        raise failure

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", look)
    path = toy.demonstrations(folder / "demos.jsonl")
    error = error_of(capsys, "sft", "--model.path", "smolm", "--data.path", path)
    assert error.startswith("smolm: there is no such folder here, and to download it from the hub by that name failed")
    assert f"({str(failure).splitlines()[0]})" in error and len(urls) == 1  # no second try


def test_check_names_each_error_once_with_its_rows_and_fails(capsys, folder):
    nulls = [{"prompt": "a .", "completion": None}] * 25
    path = toy.jsonl(folder / "d.jsonl", [GOOD, *nulls, *({"prompt": "a .", "completion": 5 + i} for i in range(3))])
    assert main(["check", path]) == 2
    lines = capsys.readouterr().out.splitlines()
    first = lines.index(f"  {path}:2: completion is null; give a text or remove the row")
    assert lines[first + 1] == "    25 rows have this error: lines 2, 3, 4, 5, 6, ..."
    assert lines[first + 2] == f"  {path}:27: completion must be text, found a number"
    assert lines[first + 3] == "    3 rows have this error: lines 27, 28, 29"
    thoughts = [{"prompt": "a .", "completion": "c", f"{'a' * i}_thinking": "x"} for i in range(1, 26)]
    assert main(["check", toy.jsonl(folder / "e.jsonl", thoughts)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"  {folder}/e.jsonl:") for line in lines) == 20
    assert "  ... and 5 more, of 5 other kinds" in lines


def test_show_config(capsys):
    assert main(["show-config", "--diff", "paper", "tutorial"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["optim.lr", "5e-06", "1.77e-06"] for line in lines)
    assert main(["show-config", "reward", "--preset", "paper"]) == 0
    assert "batch: 64" in capsys.readouterr().out.splitlines()
    assert "no preset 'papr'" in error_of(capsys, "show-config", "ppo", "--preset", "papr")


def test_env_says_who_answers_for_every_op(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch          {torch.__version__.partition('+')[0]}" in text
    assert "package `kernels` (Hugging Face's, not ours): " in text
    for name in ops.__all__:
        assert f"  {name} " in text


def test_init_writes_a_recipe_that_reads(capsys, folder):
    assert main(["init"]) == 0
    assert "exists already" in error_of(capsys, "init")
    error = error_of(capsys, "run", "recipe.yaml")
    line = 1 + (folder / "recipe.yaml").read_text().splitlines().index("  model.path: PATH-OR-HUB-NAME")
    assert error.startswith(
        "sft: model.path is still PATH-OR-HUB-NAME; write the folder or hub name of a language model"
    )
    assert error.endswith(f"(recipe.yaml:{line})")
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("PATH-OR-HUB-NAME", "m"))
    for name in ("demonstrations", "rankings", "prompts"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    plan = read_recipe("recipe.yaml")
    assert list(plan.stages) == ["sft", "reward", "ppo"]
    assert plan.stages["reward"].model.path == plan.stages["ppo"].policy.path == "runs/first/sft"
    assert plan.stages["ppo"].reward == "runs/first/reward"
    assert "residual_dropout: 0 " in (folder / "recipe.yaml").read_text()


RECIPE = """
out: runs/toy
seed: 1
sft:
  model.path: {model}
  data: {{path: demonstrations.jsonl, valid_fraction: 0.1}}
  epochs: 2
  optim.lr: 3e-3
  sampling.max_new_tokens: 4
  log.live: false
reward:
  data: {{path: rankings.jsonl, valid_fraction: 0.1}}
  batch: 16
  optim.lr: 3e-3
  log.live: false
ppo:
  data.path: prompts.jsonl
  episodes: 32
  batch: 16
  minibatch: 8
  optim.lr: 1e-3
  sampling.max_new_tokens: 4
  log.live: false
"""


def test_a_recipe_runs_its_stages_once_and_hands_on_their_folders(capsys, folder):
    toy.demonstrations(folder / "demonstrations.jsonl", 32)
    toy.rankings(folder / "rankings.jsonl", 32)
    toy.prompt_file(folder / "prompts.jsonl", 16)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=toy.model_at(folder)))
    assert main(["run", "recipe.yaml"]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["stage", "sft", "reward", "ppo"]
    assert "GiB" in table[1] and "valid/accuracy" in table[2] and "objective/scores" in table[3]
    run = json.loads((folder / "runs/toy/ppo/run.json").read_text())
    assert run["config"]["policy"]["path"] == "runs/toy/sft" and run["config"]["reward"] == "runs/toy/reward"
    assert run["config"]["seed"] == 1

    written = (folder / "runs/toy/ppo/model.safetensors").stat().st_mtime_ns
    assert main(["run", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.count("finished already") == 3
    assert (folder / "runs/toy/ppo/model.safetensors").stat().st_mtime_ns == written

    recipe.write_text(recipe.read_text().replace("epochs: 2", "batch: 8\n  epochs: 3"))
    error = error_of(capsys, "run", "recipe.yaml")
    assert error.startswith("runs/toy/sft: was finished with epochs = 2, now 3; batch = 32, now 8; set them back")
    recipe.write_text(
        recipe.read_text().replace("batch: 8\n  epochs: 3", "epochs: 2").replace("live: false", "samples: 0")
    )
    assert all(finished(cfg) for cfg in read_recipe(recipe).stages.values())  # what only shows may change

    (folder / "runs/toy/sft").rename("runs/toy/old")  # the later stages' input is no longer there
    error = error_of(capsys, "run", "recipe.yaml")
    assert error.startswith("runs/toy/reward: was made from another sft run")

    assert "give one of runs/toy/old, runs/toy/ppo, runs/toy/reward" in error_of(capsys, "plot", "runs/toy")
    assert main(["plot", "runs/toy/ppo"]) == 0
    assert (folder / "runs/toy/ppo/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("out: x\n", "holds no stage; give at least one of the sections sft, reward, ppo"),
        ("sft:\n  epohcs: 3\n", 'sft: no setting "epohcs"; did you mean epochs? (r.yaml:2)'),
        ("epochs: 3\nsft:\n", 'r.yaml: no setting "epochs" for all stages; there are out, preset, seed, device,'),
        ("ppo:\n  data.path: p.jsonl\n", "ppo: policy.path is not set"),
        ("sft:\n", "sft: model.path is not set"),
        ("preset: papr\nsft:\n", "sft: no preset 'papr'"),
    ],
)
def test_a_wrong_recipe(capsys, folder, text, sentence):
    (folder / "r.yaml").write_text(text)
    assert sentence in error_of(capsys, "run", "r.yaml")


def test_generate_writes_rows_and_the_batch_size_changes_none(capsys, folder):
    model, prompts = toy.model_at(folder), toy.prompt_file(folder / "p.jsonl", 5)
    args = ["generate", "--model", model, "--prompts", prompts, "-n", "3", "--max-new-tokens", "5", "--seed", "4"]
    assert main([*args, "--out", "a.jsonl"]) == 0
    assert main([*args, "--out", "b.jsonl", "--batch", "2"]) == 0
    rows, others = toy.rows("a.jsonl"), toy.rows("b.jsonl")
    assert [row["completion"] for row in rows] == [row["completion"] for row in others]
    assert [row["prompt"] for row in rows] == [p["prompt"] for p in toy.rows(prompts) for _ in range(3)]
    assert all(1 <= row["tokens"] <= 5 and row["logprob"] < 0 for row in rows)
    ends = {(row["finished"], row["finish_reason"], row["stop_reason"]) for row in rows}
    assert ends <= {(True, "stop", "</s>"), (False, "length", None)}
    assert "generate: 15/15  " in capsys.readouterr().err
    assert main([*args, "--limit", "1", "--temperature", "0"]) == 0
    greedy_rows = capsys.readouterr().out.splitlines()
    greedy = [json.loads(line)["completion"] for line in greedy_rows]
    assert len(greedy) == 3 and len(set(greedy)) == 1
    assert all(json.loads(line)["logprob"] < 0 for line in greedy_rows)
    for size in ("64", "100"):
        assert "has only 64 positions" in error_of(capsys, *args[:6], "1", "--max-new-tokens", size)
    toy.jsonl(folder / "p.jsonl", [{"prompt": "a ."}, {"prompt": "a " * 61}])
    error = error_of(capsys, *args)
    assert "1 of 2 prompts are over the 59 tokens" in error and "p.jsonl:2" in error and "p.jsonl:1" not in error


def test_generate_names_the_stop_text_that_ended_each_response(capsys, folder):
    """Not one that came before min_new_tokens, and not the first in the list that the response has somewhere."""
    model, prompts = toy.model_at(folder), toy.prompt_file(folder / "p.jsonl", 20)
    args = ["generate", "--model", model, "--prompts", prompts, "--max-new-tokens", "20", "--min-new-tokens", "6"]
    stops = [*toy.LETTERS[:6]]
    assert main([*args, "--out", "a.jsonl", "--stop", *stops]) == 0
    rows = [row for row in toy.rows("a.jsonl") if row["stop_reason"] in stops]
    assert len(rows) > 10 and all(row["completion"].split()[-1] == row["stop_reason"] for row in rows)
    assert any(set(stops[: stops.index(row["stop_reason"])]) & set(row["completion"].split()) for row in rows)


def test_plot_needs_a_run_and_leaves_gaps(capsys, folder):
    assert "holds no metrics.jsonl" in error_of(capsys, "plot", ".")
    (folder / "metrics.jsonl").write_text("")
    assert "is empty" in error_of(capsys, "plot", ".")
    rows = [{"step": i, "objective/kl": None if i == 2 else 0.1 * i, "loss/sft": 1.0} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "obj')
    assert main(["plot", ".", "--out", "x.png"]) == 0
    assert (folder / "x.png").stat().st_size > 5000
    (folder / "metrics.jsonl").write_text('{"step": 1, "x": 2}\n')
    assert "none of the metrics that can be drawn" in error_of(capsys, "plot", ".")
