"""Streams and signals: closed, narrow, of another encoding, or gone; every case one sentence or none, no traceback.

Not among the reported cases: a full or broken stdout, a broken stderr, closed stdin and stderr, ASCII, surrogates,
SIGHUP twice and without a terminal, nohup, SIGTERM twice and while a model is loaded.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.cli.streams import Unbreakable
from rlhf_fast.run import checkpoint
from rlhf_fast.run.folder import RunFolder

MAIN = [sys.executable, "-c", "import sys; from rlhf_fast.cli.main import main; sys.exit(main())"]
SHOW = "show-config sft"


@pytest.mark.parametrize(
    ("shell", "status", "err"),
    [
        (f"{SHOW} >&-", 0, ""),
        (f"{SHOW} <&- >&- 2>&-", 0, ""),
        (f"{SHOW} > /dev/full", 2, "rlhf-fast: error: the disk is full;"),
        ("show-config nothing 2>/dev/full", 2, ""),
        pytest.param("generate --model m --prompts p.jsonl >&-", 2, "output is closed", marks=pytest.mark.slow),
    ],
)
def test_a_closed_or_full_stream(tmp_path, shell, status, err):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    command = " ".join(f"'{part}'" for part in MAIN)
    run = subprocess.run(["bash", "-c", f"{command} {shell}"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == status
    assert err in run.stderr and run.stderr.count("\n") == bool(err), run.stderr


def test_a_reader_that_leaves(tmp_path):
    """Without stdout the command stops; without stderr it goes on."""
    command = " ".join(f"'{part}'" for part in MAIN)
    run = subprocess.run(
        ["bash", "-c", f"{command} show-config all | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert run.stdout.strip() in ("0", "1") and run.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        unbreakable = Unbreakable(stream)
        for _ in range(3):
            print("x" * 100_000, file=unbreakable)
            unbreakable.flush()


def test_files_of_a_run_never_get_the_number_of_a_closed_stream(tmp_path):
    code = """
        import os, sys
        from rlhf_fast.cli.main import COMMANDS, main
        COMMANDS["env"] = COMMANDS["env"]._replace(run=lambda argv: os._exit(os.open("file", os.O_CREAT) > 2))
        main(["env"])
    """
    shell = f"{sys.executable} -c '{textwrap.dedent(code)}' <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_rows_are_json_in_every_encoding(tmp_path, monkeypatch, encoding, one_thread):
    import io

    text = "Zoë 你好 😀"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    prompts = toy.jsonl(tmp_path / "p.jsonl", [{"prompt": text}])
    argv = ["generate", "--model", toy.model_at(tmp_path), "--prompts", prompts, "--max-new-tokens", "2"]
    assert main(argv) == 0
    assert json.loads(stream.buffer.getvalue().decode(encoding))["prompt"] == text


@pytest.mark.parametrize("width", ["20", "40", "400"])
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("generate --prompts x", "generate: --model must be given"),
        ("generate", "generate: --model and --prompts must be given"),
        ("check", "check: FILE must be given"),
        ("plot --out x.png", "plot: RUN must be given"),
        (
            "generate --model m --prompts x --dtype f9",
            "generate: --dtype must be one of float32, bfloat16, float16, got f9",
        ),
        ("generate --model", "generate: --model needs a value"),
        ("generate --modle m --prompts x", "Unrecognized options: --modle"),
        ("show-config all --diff paper", "--diff"),
    ],
)
def test_a_wrong_argument_is_named_at_any_width(capsys, monkeypatch, width, argv, sentence):
    monkeypatch.setenv("COLUMNS", width)
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert os.environ["COLUMNS"] == width


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["check", "x" * 300], "there is no such file"),
        (["plot", "x" * 300], "there is no such folder"),
        (["run", "x" * 300], "cannot be read: File name too long"),
        (["init", "x" * 300], "could not be written (File name too long); give a shorter name"),
        (["generate", "--model", "x" * 300, "--prompts", "p.jsonl"], "File name too long"),
        (["generate", "--model", "m", "--prompts", "p.jsonl", "--out", "x" * 300], "File name too long"),
        (["sft", "--model.path", "m", "--data.path", "p.jsonl", "--out", "x" * 300], "File name too long"),
        (["sft", "--model.path", "x" * 300, "--data.path", "p.jsonl"], "File name too long"),
        (["sft", "--model.path", "m", "--data.path", "p.jsonl", "--out", "p.jsonl/x"], "p.jsonl is a file"),
        (["demo", "--out", "x" * 300], "File name too long"),
        (["demo", "--out", "p.jsonl"], "is a file"),
    ],
)
def test_names_that_cannot_be_are_a_sentence(folder, capsys, argv, sentence):
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "m").mkdir()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission_are_found_first(folder, capsys):
    (folder / "closed").mkdir(mode=0o500)
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n')
    for argv in (["sft", "--model.path", "m", "--data.path", "p.jsonl", "--out", "closed/x"],):
        assert main(argv) == 2
        assert "you may not write to" in capsys.readouterr().err


# signals


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_repeated_signal_still_saves(folder, number, one_thread):
    """A closing terminal may send SIGHUP twice; the line that is written then fails."""
    with RunFolder(toy.sft(folder)) as run:
        run.start_or_resume(2, (), {})
        for _ in range(3):
            signal.raise_signal(number)
        with pytest.raises(SystemExit) as stop:
            run.checkpoint(1, {})
    assert stop.value.code == 128 + number
    assert checkpoint.latest(folder / "sft/checkpoints").name == "step_1"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_respected(folder, one_thread):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunFolder(toy.sft(folder)) as run:
            run.start_or_resume(2, (), {})
            signal.raise_signal(signal.SIGHUP)
            run.checkpoint(1, {})
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_sighup_with_its_terminal_gone(folder, one_thread):
    """The terminal is closed in the middle of a run: a checkpoint, and status 129."""
    import pty

    cfg = toy.sft(folder)  # writes the files
    argv = ["sft", "--model.path", cfg.model.path, "--data.path", cfg.data.path, "--epochs", "1000", "--select", "last"]
    argv += ["--out", "run", "--batch", "8", "--sampling.max-new-tokens", "2", "--log.validate-every", "100000"]
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [*MAIN, *argv])
    metrics = folder / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert checkpoint.latest(folder / "run/checkpoints") is not None
