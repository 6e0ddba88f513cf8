"""`rlhf-fast completion`: the scripts in the shells themselves, and their flags against those of --help."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from rlhf_fast.cli.completion import flags_of, script
from rlhf_fast.cli.main import COMMANDS, main
from rlhf_fast.config.recipe_flags import SECTIONS, read_flags
from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.sections import SHARED
from rlhf_fast.config.stages import STAGES

EXTRA = ("sweep.out",)

CLASSES = {name: command.flags_class() for name, command in COMMANDS.items()}
OF_RECIPES = [name for name, cls in CLASSES.items() if cls is None]
GIVEN = {name: (command.summary, CLASSES[name]) for name, command in COMMANDS.items()}


def complete_in_bash(folder, line):
    """Return what bash offers at the end of a line."""
    (folder / "bash").write_text(script("bash", GIVEN))
    words = [word for part in line.split(" ") for word in re.split("(=)", part) if word or not part]
    code = (
        f"source ./bash; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _rlhf_fast;"
        " printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    run = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def complete_in_fish(folder, line):
    (folder / "fish").write_text(script("fish", GIVEN))
    code = f"source ./fish; complete -C {shlex.quote(line)}"
    run = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return [offer.partition("\t")[0] for offer in run.stdout.splitlines()]


def complete_in_zsh(folder, line):
    """Return what the function gives to zsh's own ones, which print it here, of that what fits the line."""
    (folder / "zsh").write_text(script("zsh", GIVEN))
    words = line.split(" ")
    current = words[-1].rpartition("=")[2]
    code = f"""
        compdef() {{ }}
        compadd() {{ shift; print -l -- "$@" }}
        _describe() {{ print -l -- "${{(@)${{(P@)2}}%%:*}}" }}
        _files() {{ print -l -- *(N) }}
        compset() {{ PREFIX=${{PREFIX#*=}} }}
        source ./zsh
        words=({shlex.join(words)}) CURRENT={len(words)} PREFIX={shlex.quote(words[-1])}
        _rlhf_fast
    """
    run = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, cwd=folder)
    assert not run.stderr, run.stderr
    return [word for word in run.stdout.split() if word.startswith(current)]


SHELLS = [
    pytest.param(complete, marks=pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}"), id=name)
    for name, complete in (("bash", complete_in_bash), ("zsh", complete_in_zsh), ("fish", complete_in_fish))
]


@pytest.mark.parametrize("complete", SHELLS)
def test_commands_flags_values_and_files_are_completed(complete, tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    assert set(COMMANDS) <= set(complete(tmp_path, "rlhf-fast "))
    assert {"chat", "check"} <= set(complete(tmp_path, "rlhf-fast ch"))
    assert "sft" not in complete(tmp_path, "rlhf-fast ch")
    offered = complete(tmp_path, "rlhf-fast ppo --kl.")
    assert {"--kl.coef", "--kl.estimator", "--kl.controller", "--kl.target", "--kl.horizon"} <= set(offered)
    assert "--clip-low" not in offered
    assert {"--model.dtype"} <= set(complete(tmp_path, "rlhf-fast sft --epochs 3 --model.dt"))
    assert "--model.dtype" not in complete(tmp_path, "rlhf-fast show-config sft --")
    assert {"float32", "bfloat16", "float16"} <= set(complete(tmp_path, "rlhf-fast chat m --dtype "))
    assert "float16" not in complete(tmp_path, "rlhf-fast chat m --dtype b")
    assert {"paper", "tutorial"} <= set(complete(tmp_path, "rlhf-fast ppo --preset "))
    assert {"sft", "reward", "ppo"} <= set(complete(tmp_path, "rlhf-fast show-config "))
    assert {"bash", "zsh", "fish"} <= set(complete(tmp_path, "rlhf-fast completion "))
    if complete is complete_in_bash:  # readline itself completes the names of files, where the function offers nothing
        assert complete(tmp_path, "rlhf-fast generate --prompts p") == []
    else:
        for flags in ("generate --prompts", "sft --data.path", "ppo --reward"):  # a text, or several
            assert any(word.endswith("prompts.jsonl") for word in complete(tmp_path, f"rlhf-fast {flags} p"))
    if complete is not complete_in_fish:  # fish itself knows of `=`, and offers the flag with it
        assert complete(tmp_path, "rlhf-fast chat m --dtype=b") == ["bfloat16"]
        assert len(complete(tmp_path, "rlhf-fast chat m --dtype=")) == 3
        assert complete(tmp_path, "rlhf-fast chat m --dtype") == ["--dtype"]
    assert not any("jsonl" in word for word in complete(tmp_path, "rlhf-fast generate --limit "))


def test_bash_uses_the_names_of_files(tmp_path):
    (tmp_path / "bash").write_text(script("bash", GIVEN))
    run = subprocess.run(
        ["bash", "--norc", "-c", "source ./bash; complete -p rlhf-fast"], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout.split() == ["complete", "-o", "default", "-F", "_rlhf_fast", "rlhf-fast"]


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - set(OF_RECIPES)))
def test_flags_are_those_of_the_command(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*(?<!\.)", re.sub(r"`[^`]*`", "", text)))
    ours = {name for flag in flags_of(command, CLASSES[command]) for name in flag.names if name.startswith("--")}
    starts = [match.group(1) for line in text.splitlines() if (match := re.match(r"[│| ]*(-[-\w., ]*)", line))]
    listed = {name for start in starts for name in re.findall(r"--[a-z][\w.-]*", start)}
    assert ours <= shown and listed <= ours
    assert ("--dry-run" in ours) == (command in STAGES)


@pytest.mark.parametrize("command", OF_RECIPES)
def test_flags_of_a_recipe_are_those_that_it_takes(command, capsys):
    """Each is read without an error, and all settings are there."""
    flags = [flag for flag in flags_of(command, CLASSES[command]) if flag.names and flag.names[0] != "--help"]
    assert any("--dry-run" in flag.names for flag in flags) == (command == "run")
    flags = [flag for flag in flags if "--dry-run" not in flag.names]  # taken before the others are read
    names = [name for flag in flags for name in flag.names]
    read = read_flags([word for name in names for word in ([name] if "no-" in name else [name, "1"])], command, EXTRA)
    assert len(read) == len(names)
    settings = {f"{section}.{path}" for section, cls in SECTIONS.items() for path in setting_types(cls)}
    assert {flag.names[0].removeprefix("--").replace("-", "_") for flag in flags} - settings <= {*SHARED, *EXTRA}
    assert settings <= {flag.names[0].removeprefix("--").replace("-", "_") for flag in flags}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--out DIR" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed_without_torch(shell, capsys):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed == script(shell, GIVEN)
    code = "import sys; from rlhf_fast.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code, "completion", shell], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and run.stdout == printed
