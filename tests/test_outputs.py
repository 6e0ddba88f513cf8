"""Nothing of the user's is written over, and a finished run is known by its bytes, not by names and times.

Not among the reported cases: every entry of FOREIGN, OVERLAPS but the model's folder, hard links and `..`, a partial
file, plot and demo over other files, a recipe.json, copies under another name, changed bytes with unchanged times.
"""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from rlhf_fast.cli import generate as generate_module
from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import DataConfig, LogConfig, ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.outputs import check_hub_names, check_run_folder, read_run
from rlhf_fast.stages import sft

pytestmark = pytest.mark.usefixtures("one_thread")

FOREIGN = {
    "a folder of notes": {"notes/keep.txt": "mine"},
    "a hidden file": {".env": "*"},
    "logs of a batch system": {"slurm-1.out": "mine", ".gitkeep": ""},
    "half a run.json of another program": {"run.json.tmp": '{"id": 7'},
    "another lock": {"checkpoints/lock": "pid 7"},
    "a folder called lock": {"checkpoints/lock/keep.txt": "mine"},
    "a file called checkpoints": {"checkpoints": "mine"},
    "checkpoints of another trainer": {"checkpoints/step_7/model.pt": "mine"},
    "a best model": {"checkpoints/best/config.json": "{}"},
    "tensorboard events": {"tensorboard/events": "mine"},
    "samples of ours by their keys": {"samples.jsonl": '{"step": 1, "prompt": "a", "response": "b"}\n'},
    "run.json of a tracker": {"run.json": '{"id": 7, "config": {}}'},
    "run.json with our stage only": {"run.json": '{"stage": "sft"}'},
    "run.json cut short": {"run.json": '{"stage": "sft", "conf'},
    "run.json in another encoding": {"run.json": "\udcff\udcfe{}"},
    "run.json too deep": {"run.json": "[" * 100_000},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_an_out_that_is_not_ours_is_refused_whatever_is_in_it(folder, files):
    for name, text in files.items():
        (folder / "o" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "o" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = contents(folder / "o")
    with pytest.raises(UserError, match=r"^o\S*: (is not empty|was not written|cannot be read)") as error:
        check_run_folder("o", {})
    assert "\n" not in str(error.value)
    assert contents(folder / "o") == before


def test_an_empty_out_and_a_run_that_was_killed_at_its_start_are_taken(folder):
    (folder / "empty").mkdir()
    assert check_run_folder("empty", {}) == check_run_folder("new/deep", {}) == {}
    (folder / "killed/checkpoints").mkdir(parents=True)
    (folder / "killed/checkpoints/lock").touch()
    for text in ("", "{", '{\n  "stage": "sft",\n  "conf'):
        (folder / "killed/run.json.tmp").write_text(text)
        assert check_run_folder("killed", {}) == {}
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "name", [".gitkeep", ".gitignore", ".DS_Store", ".ipynb_checkpoints/x", "lost+found/x", ".nfs01"]
)
def test_what_other_programs_put_into_an_empty_folder_stays(folder, name):
    (folder / "sft" / name).parent.mkdir(parents=True)
    (folder / "sft" / name).write_text("mine")
    sft.run(toy.sft(folder, epochs=1))
    assert (folder / "sft" / name).read_text() == "mine" and (folder / "sft/model.safetensors").exists()


@pytest.mark.parametrize(("model", "out"), [("model", "model/sft"), (".", "runs/a"), ("link", "model/a/b")])
def test_a_run_may_lie_below_its_model(folder, model, out):
    """It starts, and goes on."""
    toy.model_at(folder)
    if model == ".":
        shutil.copytree(folder / "model", folder, dirs_exist_ok=True)
    (folder / "link").symlink_to("model")
    cfg = toy.sft(folder, out=out, model=ModelConfig(model))
    for _ in range(2):
        with RunFolder(cfg) as run:
            run.start_or_resume(1, (), {})
    assert read_run(folder / out)["stage"] == "sft"


@pytest.mark.parametrize(("name", "out"), [("hub-model", "hub-model/sft"), ("someone/model", "someone/model")])
def test_an_out_does_not_hide_a_hub_name(folder, name, out):
    with pytest.raises(UserError, match=f"would make the folder {name}, which the hub name"):
        check_hub_names(out, [name])
    check_hub_names("someone/other", [name])


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("m", "is what model.path names"),
        ("link", "is what model.path names"),
        ("link/../m/.", "is what model.path names"),
        ("all", "holds what data.path names"),
        ("all/d.jsonl", "is a file; give a folder"),
        ("all/d.jsonl/run", "cannot be made, since"),
        ("nowhere_link", "is a link to nowhere"),
        ("x" * 300, "cannot be a folder: File name too long"),
        ("/", "holds what model.path names"),
        ("home", "is the home or the root folder"),
        ("", "out is not set"),
    ],
)
def test_an_out_that_overlaps_an_input_is_refused(folder, monkeypatch, out, sentence):
    for name in ("m", "all", "home"):
        (folder / name).mkdir()
    (folder / "all/d.jsonl").write_text("{}")
    (folder / "link").symlink_to("m")
    (folder / "nowhere_link").symlink_to("nowhere")
    monkeypatch.setenv("HOME", str(folder / "home"))
    with pytest.raises(UserError) as error:
        check_run_folder(out, {"model.path": "m", "data.path": "all/d.jsonl"})
    assert sentence in str(error.value)


def test_finish_keeps_what_a_user_put_into_a_running_folder(folder, capsys):
    """value/ and config.json of the user's are renamed; equal files, of an interrupted finish, are replaced."""
    cfg = toy.sft(folder)

    def write(path):
        (path / "value").mkdir()
        for name in ("config.json", "value/weights", "same.json"):
            (path / name).write_text(f"ours {name}")

    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
        for name in ("value/keep.txt", "checkpoints/step_1_copy/keep.txt", "checkpoints/step_9.txt"):
            (folder / "sft" / name).parent.mkdir(exist_ok=True)
            (folder / "sft" / name).write_text("mine")
        (folder / "sft/config.json").write_text("mine")
        (folder / "sft/same.json").write_text("ours same.json")
        run.checkpoint(1, {})
        run.finish(write, {})
    found = contents(folder / "sft")
    assert sum(text == b"mine" for text in found.values()) == 4
    assert found["config.json.kept1"] == found["value.kept1/keep.txt"] == b"mine"
    assert found["config.json"] == b"ours config.json" and found["value/weights"] == b"ours value/weights"
    assert "same.json.kept1" not in found and not (folder / "sft/checkpoints/step_1").exists()
    assert "config.json was not of this run; it is" in capsys.readouterr().err


# generate, plot, init, demo, run


@pytest.fixture
def prompts(folder):
    """Write four prompts with columns of their own, under several names."""
    rows = [{"id": i, "prompt": text} for i, text in enumerate(toy.prompts(4))]
    toy.jsonl(folder / "p.jsonl", rows)
    (folder / "link.jsonl").symlink_to("p.jsonl")
    os.link(folder / "p.jsonl", folder / "hard.jsonl")
    (folder / "sub").mkdir()
    toy.jsonl(folder / "others.jsonl", [{"prompt": "a", "completion": "b"}])
    (folder / "notes.txt").write_text("mine")
    return toy.model_at(folder)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("p.jsonl", "is the file that --prompts names"),
        ("link.jsonl", "is the file that --prompts names"),
        ("hard.jsonl", "is the file that --prompts names"),
        ("sub/../p.jsonl", "is the file that --prompts names"),
        ("others.jsonl", "exists already and no such command wrote it"),
        ("notes.txt", "exists already and no such command wrote it"),
        ("o.jsonl", "which is the file that --prompts names"),
        ("link_to_o.jsonl", "which is the file that --prompts names"),
        ("hard.out", "which is the file that --prompts names"),
        ("model/config.json", "exists already and no such command wrote it"),
        ("sub", "is a folder"),
        ("no/where.jsonl", "there is no folder"),
        ("notes.txt/x", "there is no folder"),
    ],
)
def test_generate_writes_over_nothing_of_the_users(folder, prompts, capsys, monkeypatch, out, sentence):
    rows = [dict.fromkeys(("prompt", *generate_module.RESPONSE), "once .")]
    toy.jsonl(folder / "o.jsonl.partial", rows)  # an earlier call's rows, which are prompts now
    os.link(folder / "o.jsonl.partial", folder / "hard.out.partial")
    (folder / "link_to_o.jsonl").symlink_to("o.jsonl")
    before = contents(folder)
    monkeypatch.setattr(generate_module.Model, "load", lambda *_, **__: pytest.fail("the model is loaded first"))
    source = "o.jsonl.partial" if "which is" in sentence else "p.jsonl"
    argv = ["generate", "--model", prompts, "--prompts", source, "--out", out, "--max-new-tokens", "3"]
    assert main(argv) == main([*argv, "--overwrite"]) == 2
    assert sentence in capsys.readouterr().err
    assert contents(folder) == before


def test_generate_replaces_its_own_file_only_when_it_is_whole(folder, prompts, capsys, monkeypatch):
    argv = ["generate", "--model", prompts, "--prompts", "p.jsonl", "--out", "o.jsonl", "--max-new-tokens=3"]
    argv.append("--overwrite")
    assert main(argv) == 0
    first = (folder / "o.jsonl").read_bytes()
    assert main([*argv, "--seed", "1"]) == 0
    second = (folder / "o.jsonl").read_bytes()
    assert first != second
    edited = second.replace(b'"completion": "', b'"completion": "mended by hand ', 1)
    for content in (edited, edited.rstrip(b"\n"), edited[:-9], b'{"prompt": "a"'):  # edited, or cut by a copy
        (folder / "o.jsonl").write_bytes(content)
        assert main(argv[:-1]) == 2
        assert (folder / "o.jsonl").read_bytes() == content
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"o\.jsonl: (holds responses already; .*--overwrite|exists already and no)", sentence)
    (folder / "o.jsonl").write_bytes(second)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "BATCHES_PER_CALL", 1)
        rows, calls = generate_module._rows, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return rows(*args)

        patch.setattr(generate_module, "_rows", interrupted)
        assert main([*argv, "--batch", "1"]) == 130
    assert "the rows so far are in" in capsys.readouterr().err
    assert (folder / "o.jsonl").read_bytes() == second
    assert (folder / "o.jsonl.partial").read_bytes().splitlines() == first.splitlines()[:1]
    assert main(argv) == 0  # over the partial file
    assert (folder / "o.jsonl").read_bytes() == first and not (folder / "o.jsonl.partial").exists()
    (folder / "o.jsonl.partial").write_text("mine")
    assert main(argv) == 2
    assert (folder / "o.jsonl.partial").read_text() == "mine"


def test_generate_writes_to_pipes_and_devices(folder, prompts):
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    argv = ["generate", "--model", prompts, "--prompts", "p.jsonl", "--max-new-tokens", "3"]
    assert main([*argv, "--out", "pipe"]) == 0
    assert len(os.read(reader, 1 << 16).splitlines()) == 4
    os.close(reader)
    assert (folder / "pipe").is_fifo()
    assert main([*argv, "--out", "/dev/null"]) == 0


def test_plot_init_demo_and_run_write_over_nothing_of_the_users(folder, capsys):
    (folder / "r").mkdir()
    toy.jsonl(folder / "r/metrics.jsonl", [{"step": 1, "loss/sft": 1.0}, {"step": 2, "loss/sft": 0.5}])
    (folder / "photo.png").write_bytes(b"\x89PNG mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "demo").mkdir()
    (folder / "demo/table.txt").write_text("mine")
    (folder / "broken").mkdir()
    (folder / "broken/demo.json").write_text("[1]")
    (folder / "link.yaml").symlink_to("new.yaml")
    (folder / "recipe.json").write_text('{"mine": 1}')
    (folder / "r.yaml").write_text(f"out: .\nsft: {{model.path: {toy.model_at(folder)}, data.path: d.jsonl}}\n")
    toy.demonstrations(folder / "d.jsonl")
    before = contents(folder)
    for argv, sentence in (
        (["plot", "r", "--out", "photo.png"], "exists already"),
        (["plot", "r", "--out", "notes.txt"], "is to be a PNG"),
        (["plot", "r", "--out", "r/metrics.jsonl"], "is to be a PNG"),
        (["plot", "nodir"], "nodir: there is no such folder"),
        (["plot", "notes.txt"], "notes.txt: is a file"),
        (["init", "link.yaml"], "exists already"),
        (["init", "no/where.yaml"], "could not be written (No such file or directory); look at the path"),
        (["demo", "--out", "demo", "--quick"], "is not empty and no demo of ours is in it"),
        (["demo", "--out", "broken", "--quick"], "is not empty and no demo of ours is in it"),
        (["run", "r.yaml"], "recipe.json: was not written by a recipe of ours"),
    ):
        assert main(argv) == 2, argv
        assert sentence in capsys.readouterr().err
        assert contents(folder) == before
    assert main(["plot", "r", "--out", "mine.png"]) == main(["plot", "r", "--out", "mine.png"]) == 0
    assert main(["plot", "r"]) == main(["plot", "r"]) == 0


BROKEN_TIMES = ("[]", "0", '""', "null", "[1]", '{"sft": []}', '{"sft": {"seconds": "1", "peak": 2}}', '{"sft": {}}')
BROKEN_TIMES += (
    '{"sft": {"seconds": 1, "peak": null}}',
    '{"sft": {"seconds": NaN, "peak": 2}}',
    '{"rm": {"seconds": 1}}',
)


@pytest.mark.parametrize("text", BROKEN_TIMES)
def test_a_recipe_json_that_is_not_ours_is_refused_first(folder, capsys, monkeypatch, text):
    monkeypatch.setattr(sft, "run", lambda *_: pytest.fail("the stage begins first"))
    (folder / "runs").mkdir()
    (folder / "runs/recipe.json").write_text(text)
    toy.demonstrations(folder / "d.jsonl", 4)
    (folder / "r.yaml").write_text(f"out: runs\nsft: {{model.path: {toy.model_at(folder)}, data.path: d.jsonl}}\n")
    assert main(["run", "r.yaml"]) == 2
    assert "recipe.json: was not written by a recipe of ours" in capsys.readouterr().err
    assert (folder / "runs/recipe.json").read_text() == text


def test_a_tilde_is_the_home_folder(folder, monkeypatch, capsys):
    """In a YAML file and after `=`, where no shell replaces it."""
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    toy.model(home / "m")
    toy.demonstrations(home / "d.jsonl", 8)
    (home / "r.yaml").write_text("out: ~/runs\nsft: {model.path: ~/m, data: {path: ~/d.jsonl}, epochs: 1}\n")
    assert main(["run", "~/r.yaml"]) == 0
    assert (home / "runs/sft/model.safetensors").exists() and (home / "runs/recipe.json").exists()
    toy.prompt_file(home / "p.jsonl", 2)
    argv = ["--prompts=~/p.jsonl", "--model=~/runs/sft", "--out=~/o.jsonl", "--max-new-tokens=2"]
    assert main(["generate", *argv]) == 0
    assert (home / "o.jsonl").exists()
    assert main(["init", "~/new.yaml"]) == main(["plot", "~/runs/sft", "--out=~/c.png"]) == 0
    assert [entry.name for entry in folder.iterdir()] == ["home"]


@pytest.mark.parametrize("text", ['{"mine": 1}\n', "[1, 2]\n", '{"step": "one"}\n'])
def test_rows_of_others_in_a_runs_log_are_a_sentence(folder, text):
    cfg = toy.sft(folder)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    (folder / "sft/samples.jsonl").write_text(text)
    with RunFolder(cfg) as run, pytest.raises(UserError, match=r"samples\.jsonl:"):
        run.start_or_resume(1, (), {})
    assert (folder / "sft/samples.jsonl").read_text() == text


# identity by content


def test_a_finished_run_is_known_under_other_names_and_times(folder, monkeypatch):
    cfg = toy.sft(folder, epochs=1)
    sft.run(cfg)
    monkeypatch.setattr(sft.Model, "load", lambda *_, **__: pytest.fail("it runs again"))
    shutil.copytree(folder / "model", folder / "copy", copy_function=shutil.copyfile)
    (folder / "link").symlink_to("model")
    shutil.copyfile(folder / "demonstrations.jsonl", folder / "moved.jsonl")
    (folder / "demonstrations.jsonl").unlink()
    data = replace(cfg.data, path="moved.jsonl")
    (folder / "sft").rename(folder / "renamed")
    for model in ("copy", "link", "model", "sub/../model", str(folder / "copy")):
        (folder / "sub").mkdir(exist_ok=True)
        sft.run(replace(cfg, out="renamed", model=ModelConfig(model), data=data))
    with pytest.raises(UserError, match=r"data\.path = \S*demonstrations\.jsonl, now \S*texts\.jsonl"):
        sft.run(replace(cfg, out="renamed", data=replace(data, path=str(folder / "texts.jsonl"))))


@pytest.mark.parametrize("name", ["model/model.safetensors", "demonstrations.jsonl", "model/tokenizer.json"])
def test_changed_bytes_are_noticed_though_size_and_times_are_the_same(folder, name):
    cfg = toy.sft(folder)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    stat = (folder / name).stat()
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(bytes(content))
    os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="has changed since"):
        RunFolder(cfg)


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "eval.json", "my_tokens.json", "trainer_state.json"])
def test_a_note_in_a_model_folder_is_no_change_of_the_model(folder, name):
    """Only notes.txt was reported. Files that make the model are."""
    cfg = toy.sft(folder)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    (folder / "model" / name).write_text("mine")
    RunFolder(cfg)
    for own in ("modeling_x.py", "chat_template.jinja", "model-2.safetensors", "vocab.json", "added_tokens.json"):
        (folder / "model" / own).write_text("other")
        with pytest.raises(UserError, match="the model in it has changed since"):
            RunFolder(cfg)
        (folder / "model" / own).unlink()


def test_a_moved_reward_function_is_known_by_its_source(folder, monkeypatch):
    from rlhf_fast.run.identity import check_same_run, input_checksums

    (folder / "moved_reward.py").write_text("def f(texts):\n    return [0.0] * len(texts)\n")
    cfg = toy.ppo(folder, reward="moved_reward:f")
    now = input_checksums(cfg)
    saved = {"stage": "ppo", "config": json.loads(json.dumps(toy_config(cfg))), **now}
    assert not any("moved_reward.py" in name for name in now["data"])
    assert not check_same_run(saved, cfg, now)
    other = {**now, "functions": {"moved_reward:f": "0"}}
    assert check_same_run(saved, cfg, other) == now["functions"]  # before the first step it may change
    with pytest.raises(UserError, match="moved_reward:f: has changed since"):
        check_same_run({**saved, "finished": {}}, cfg, other)


def toy_config(cfg):
    from rlhf_fast.config.resolve import to_plain

    return to_plain(cfg)


def test_a_run_of_an_older_version_goes_on(folder):
    """Its run.json lacks settings that have come since and sections that were added; today's rules do not judge it."""
    cfg = toy.sft(folder, data=DataConfig(toy.demonstrations(folder / "d.jsonl"), valid_fraction=0.1))
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    saved = json.loads((folder / "sft/run.json").read_text())
    del saved["functions"], saved["models"], saved["config"]["data"]["dedupe_prefix"], saved["config"]["packing"]
    saved["config"]["epochs"] = 4
    (folder / "sft/run.json").write_text(json.dumps(saved))
    assert not RunFolder(cfg).finished
    with pytest.raises(UserError, match="packing = true, now false"):
        RunFolder(replace(cfg, packing=False, log=LogConfig()))


def test_a_recipe_copied_without_times_or_moved_is_finished(folder, capsys):
    toy.demonstrations(folder / "d.jsonl", 32)
    toy.rankings(folder / "r.jsonl", 32)
    text = f"""
out: runs
sft: {{model.path: {toy.model_at(folder)}, data.path: d.jsonl, epochs: 1, sampling.max_new_tokens: 4, log.live: false}}
reward: {{data.path: r.jsonl, log.live: false}}
"""
    (folder / "r.yaml").write_text(text)
    assert main(["run", "r.yaml"]) == 0
    shutil.copytree(folder / "runs", folder / "x", copy_function=shutil.copyfile)
    shutil.rmtree(folder / "runs")
    (folder / "r.yaml").write_text(text.replace("out: runs", "out: x"))
    capsys.readouterr()
    assert main(["run", "r.yaml"]) == 0
    assert capsys.readouterr().out.count("finished already") == 2
    weights = folder / "x/sft/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert main(["run", "r.yaml"]) == 2
    assert "model.path = runs/sft, now x/sft with other contents;" in capsys.readouterr().err
